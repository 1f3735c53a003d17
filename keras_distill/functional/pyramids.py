"""The distance between maps at several resolutions: student first, channels last, one value per example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_equal
from keras_distill.functional.vectors import per_example, resized_along

__all__ = ["hierarchical_context"]


def hierarchical_context(student: Any, teacher: Any, *, levels: Sequence[int] = (4, 2, 1)) -> Any:
    r"""Mean squared difference of two maps, and of the same maps averaged to a few positions.

    .. math:: \frac{1}{\sum_k 2^{-k}} \sum_{k=0}^{K} 2^{-k} \frac{1}{D_k} \| P_k(f^s) - P_k(f^t) \|_2^2

    :math:`P_0` is the map itself, and the next ones are its averages over 4 x 4, 2 x 2 and 1 x 1 cells: local
    differences and those of the whole image both count. A level that is not smaller than the map is left out, and a
    side that is smaller than a level stays as it is.

    Args:
        student: The student's feature, shape ``(N, H, W, C)`` or ``(N, L, C)``, whose sizes are known.
        teacher: The teacher's feature, same shape.
        levels: Cells along a side, each 1 or more, in the order in which the weights halve.

    Returns:
        Weighted mean over the levels, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ, a feature has no positions or unknown sizes, or a level is less than 1.

    Example:
        >>> round(float(hierarchical_context([[[[1.0], [3.0]]]], [[[[2.0], [0.0]]]])[0]), 4)
        3.6667

    References:
        Chen et al. 2021 (ReviewKD), section 3.3, arXiv:2104.09044, with the weights of the authors' code; deviation:
        maps that are not square, whose height alone decides there.
    """
    for level in levels:
        checks.at_least("levels", level, 1)
    student, teacher = prepare_equal(student, teacher)
    shape = tuple(student.shape)
    if not 3 <= len(shape) <= 5 or None in shape[1:-1]:
        expected = "`student` to have positions of known sizes, and 3 to 5 dimensions"
        raise ValueError(checks.message(expected, f"shape {shape}"))
    # Averages are linear: the difference of two averages is the average of the difference.
    difference, sizes = student - teacher, shape[1:-1]
    values, weight, total = per_example(ops.square(difference)), 1.0, 1.0
    for level in levels:
        if level < max(sizes):
            weight /= 2
            total += weight
            pooled = difference
            for axis, size in enumerate(sizes, start=1):
                pooled = resized_along(pooled, axis, min(level, size))
            values = values + weight * per_example(ops.square(pooled))
    return values / total
