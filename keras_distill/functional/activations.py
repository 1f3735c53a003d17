"""Formulas on which units are active, and on how features change from layer to layer: one value per example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_equal
from keras_distill.functional.vectors import flattened, per_example, resized, transposed

__all__ = ["activation_boundary", "solution_flow"]


def activation_boundary(student: Any, teacher: Any, *, margin: float = 1.0, per_position: bool = False) -> Any:
    r"""Squared hinge on the student's responses, on the side of zero on which the teacher's are.

    .. math:: \frac{1}{D} \sum_d \begin{cases} \max(0, m - f^s_d)^2 & f^t_d > 0 \\
        \max(0, m + f^s_d)^2 & f^t_d \le 0 \end{cases}

    It compares which units are active, not how strong they are, with features taken before the ReLU. A student whose
    responses are on the teacher's side with the margin m has a loss of 0.

    Args:
        student: The student's feature before its activation, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature before its activation, same shape.
        margin: Distance m from zero that the student's responses should have, greater than 0.
        per_position: Whether the positions are left as they are.

    Returns:
        Mean squared hinge, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the margin is not a number.
        ValueError: If the shapes differ or the margin is not greater than 0.

    Example:
        >>> round(float(activation_boundary([[0.5, -3.0, 2.0]], [[4.0, -1.0, -0.1]])[0]), 4)
        3.0833

    References:
        Heo et al. 2019, arXiv:1811.03233; deviation: the mean instead of the sum over the units. Published
        code has a factor of 0.003 and halves it for each layer before the last.
    """
    checks.positive("margin", margin)
    student, teacher = prepare_equal(student, teacher)
    values = ops.square(ops.relu(margin - ops.where(teacher > 0, student, -student)))
    if per_position and len(values.shape) > 1:
        return ops.mean(values, axis=-1)
    return per_example(values)


def solution_flow(student: Sequence[Any], teacher: Sequence[Any]) -> Any:
    r"""Mean squared difference of the two models' products between the channels of consecutive layers.

    .. math:: \sum_l \frac{1}{C_l C_{l+1}} \sum_{a,b} (G^s_{l,ab} - G^t_{l,ab})^2, \qquad
        G_{l,ab} = \frac{1}{P} \sum_{i=1}^{P} f_{l,a,i} \, f_{l+1,b,i}

    The products describe how a layer's feature becomes the next one: the flow of the solution. Of two maps of one model
    the larger is averaged down to the size of the other.

    Args:
        student: The student's features, two or more in the order of the layers, each ``(N, H, W, C_l)`` or
            ``(N, L, C_l)``.
        teacher: The teacher's features, as many, with the same channels; the positions may differ.

    Returns:
        Mean squared difference, added over the pairs of layers, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If there are fewer than two layers, or their examples, dimensions or channels do not fit.

    Example:
        >>> student = [[[[[1.0], [3.0]]]], [[[[2.0], [0.0]]]]]
        >>> teacher = [[[[[1.0], [1.0]]]], [[[[4.0], [2.0]]]]]
        >>> float(solution_flow(student, teacher)[0])
        4.0

    References:
        Yim et al. 2017, equations 1 and 2 (CVPR); deviations, as in published code: the mean over the pairs of
        channels, and averages where the paper has max pooling.
    """
    if len(student) != len(teacher) or len(student) < 2:
        expected = "`student` and `teacher` to be lists of as many features, at least 2"
        raise ValueError(checks.message(expected, f"{len(student)} and {len(teacher)}", "Name two layers or more."))
    features = [prepare(*pair) for pair in zip(student, teacher, strict=True)]
    flows = [[_flow(*layers) for layers in pairwise(pair[side] for pair in features)] for side in (0, 1)]
    values = []
    for student_flow, teacher_flow in zip(*flows, strict=True):
        checks.same_shape(
            student_flow,
            teacher_flow,
            names=("products of the student's channels", "products of the teacher's"),
            remedy="Map the student's features to the teacher's channels with adapters.",
        )
        values.append(per_example(ops.square(student_flow - teacher_flow)))
    return sum(values[1:], values[0])


def _flow(first: Any, second: Any) -> Any:
    """Products of the channels of two layers, averaged over the positions, shape ``(N, C_1, C_2)``."""
    shapes = tuple(first.shape), tuple(second.shape)
    if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 3 or checks.shapes_differ(shapes[0][:1], shapes[1][:1]):
        expected = "the features of two layers to be maps (N, H, W, C) or tokens (N, L, C) of the same examples"
        raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}"))
    if len(shapes[0]) == 4:
        size = [_smaller(*sizes) for sizes in zip(*shapes, strict=True)]
        first, second = resized(first, size), resized(second, size)
    if checks.shapes_differ(tuple(first.shape)[1:-1], tuple(second.shape)[1:-1]):
        expected = "the features of two layers to have the same positions, or to be maps (N, H, W, C)"
        raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}"))
    first, second = (flattened(feature, 1, len(feature.shape) - 1) for feature in (first, second))
    return ops.matmul(transposed(first), second) / ops.cast(ops.shape(first)[1], first.dtype)


def _smaller(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else min(first, second)
