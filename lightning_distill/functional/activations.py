"""Formulas on which units are active, and on how features change from layer to layer: one value per example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.primitives import product
from lightning_distill.functional.vectors import (
    channel_maps,
    channels_at,
    over_examples,
    over_numbers,
    positions_mask,
    prepare_equal,
    without,
)

__all__ = ["activation_boundary", "solution_flow"]


def activation_boundary(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Squared hinge on the student's responses, on the side of zero on which the teacher's are.

    .. math:: \frac{1}{D} \sum_d \begin{cases} \max(0, m - f^s_d)^2 & f^t_d > 0 \\
        \max(0, m + f^s_d)^2 & f^t_d \le 0 \end{cases}

    It compares which units are active, not how strong they are, with features taken before the ReLU. A student whose
    responses are on the teacher's side with the margin m has a loss of 0.

    Args:
        student: The student's feature before its activation, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature before its activation, same shape.
        margin: Distance m from zero that the student's responses should have, greater than 0.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean squared hinge, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the margin is not a number.
        ValueError: If the shapes differ or the margin is not greater than 0.

    Example:
        >>> activation_boundary(torch.tensor([[0.5, -3.0, 2.0]]), torch.tensor([[4.0, -1.0, -0.1]]))
        tensor([3.0833])

    References:
        Heo et al. 2019, arXiv:1811.03233; deviation: the mean instead of the sum over the units. Published
        code has a factor of 0.003 and halves it for each layer before the last.
    """
    checks.positive("margin", margin)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    values = F.relu(margin - torch.where(teacher > 0, student, -student)).square()
    return over_numbers(values, channels_at(student) if student.ndim > 1 else None, positions, reduction)


def solution_flow(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Mean squared difference of the two models' products between the channels of consecutive layers.

    .. math:: \sum_l \frac{1}{C_l C_{l+1}} \sum_{a,b} (G^s_{l,ab} - G^t_{l,ab})^2, \qquad
        G_{l,ab} = \frac{1}{P} \sum_{i=1}^{P} f_{l,a,i} \, f_{l+1,b,i}

    The products describe how a layer's feature becomes the next one: the flow of the solution. Of two maps of one model
    the larger is averaged down to the size of the other.

    Args:
        student: The student's features, two or more in the order of the layers, each ``(N, C_l, H, W)`` or
            ``(N, L, C_l)``.
        teacher: The teacher's features, as many, with the same channels; the positions may differ.
        mask: True where an example counts, shape ``(N,)``, or a position, if all features have the same positions; None
            where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Mean squared difference, added over the pairs of layers, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If there are fewer than two layers, or their examples, dimensions or channels do not fit.

    Example:
        >>> student = [torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])]
        >>> teacher = [torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[4.0, 2.0]]]])]
        >>> solution_flow(student, teacher)
        tensor([4.])

    References:
        Yim et al. 2017, equations 1 and 2 (CVPR); deviations, as in published code: the mean over the pairs of
        channels, and averages where the paper has max pooling.
    """
    if len(student) != len(teacher) or len(student) < 2:
        expected = "`student` and `teacher` to be lists of as many features, at least 2"
        raise ValueError(checks.message(expected, f"{len(student)} and {len(teacher)}", "Name two layers or more."))
    flows: list[list[Tensor]] = [[], []]
    features = [prepare(*pair) for pair in zip(student, teacher, strict=True)]
    for side, flow in enumerate(flows):
        for first, second in pairwise(pair[side] for pair in features):
            flow.append(_flow(first, second, mask))
    total = torch.zeros_like(flows[0][0][:, 0, 0])
    for student_flow, teacher_flow in zip(*flows, strict=True):
        checks.same_shape(
            student_flow,
            teacher_flow,
            names=("products of the student's channels", "products of the teacher's"),
            remedy="Map the student's features to the teacher's channels with adapters.",
        )
        total = total + (student_flow - teacher_flow).square().mean(dim=(1, 2))
    return over_examples(total, positions_mask(mask, features[0][0]), reduction)


def _flow(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """Products of the channels of two layers, averaged over the positions that count, shape ``(N, C_1, C_2)``."""
    if first.ndim != second.ndim or first.ndim < 3 or len(first) != len(second):
        expected = "the features of two layers to be maps (N, C, H, W) or tokens (N, L, C) of the same examples"
        raise ValueError(checks.message(expected, f"{tuple(first.shape)} and {tuple(second.shape)}"))
    positions = [positions_mask(mask, feature) for feature in (first, second)]
    first, second = (without(*pair) for pair in zip((first, second), positions, strict=True))
    if first.ndim == 4:
        size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
        first, second = (_averaged(feature, size) for feature in (first, second))
    first, second = channel_maps(first), channel_maps(second)
    if first.shape[2] != second.shape[2]:
        expected = "the features of two layers to have the same positions, or to be maps (N, C, H, W)"
        raise ValueError(checks.message(expected, f"{first.shape[2]} and {second.shape[2]} positions"))
    count: Tensor | int = first.shape[2]
    if mask is not None and mask.ndim > 1 and positions[0] is not None:
        count = positions[0].flatten(1).sum(dim=1).clamp(min=1)[:, None, None]
    return product(first, second.mT) / count


def _averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if tuple(maps.shape[2:]) == size else F.adaptive_avg_pool2d(maps, size)
