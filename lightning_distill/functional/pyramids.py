"""The distance between maps at several resolutions: student first, one value per example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction
from lightning_distill.functional.vectors import (
    channels_at,
    mean_of_counted,
    over_examples,
    per_example,
    prepare_equal,
)

__all__ = ["hierarchical_context"]

_POOLS: Final[dict[int, Callable[..., Any]]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}


def hierarchical_context(
    student: Tensor,
    teacher: Tensor,
    *,
    levels: Sequence[int] = (4, 2, 1),
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Mean squared difference of two maps, and of the same maps averaged to a few positions.

    .. math:: \frac{1}{\sum_k 2^{-k}} \sum_{k=0}^{K} 2^{-k} \frac{1}{D_k} \| P_k(f^s) - P_k(f^t) \|_2^2

    :math:`P_0` is the map itself, and the next ones are its averages over 4 x 4, 2 x 2 and 1 x 1 cells: local
    differences and those of the whole image both count. A level that is not smaller than the map is left out, and a
    side that is smaller than a level stays as it is.

    Args:
        student: The student's feature, shape ``(N, C, H, W)`` or ``(N, L, C)``.
        teacher: The teacher's feature, same shape.
        levels: Cells along a side, each 1 or more, in the order in which the weights halve.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count. A
            cell is the average of its positions that count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Weighted mean over the levels, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ, a feature has no positions, or a level is less than 1.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
        >>> hierarchical_context(student, teacher)
        tensor([3.6667])

    References:
        Chen et al. 2021 (ReviewKD), section 3.3, arXiv:2104.09044, with the weights of the authors' code; deviation:
        maps that are not square, whose height alone decides there.
    """
    for level in levels:
        checks.at_least("levels", level, 1)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    if student.ndim not in _POOLS:
        expected = "`student` to have positions, and 3 to 5 dimensions"
        raise ValueError(checks.message(expected, f"shape {tuple(student.shape)}"))
    dim = channels_at(student)
    # Averages are linear: the difference of two averages is the average of the difference.
    difference = (student - teacher).movedim(dim, 1)
    counts = None if positions is None or positions.ndim == 1 else positions.unsqueeze(1)
    shares = None if counts is None else counts.to(difference.dtype)
    values, weight, total = _squares(difference, counts), 1.0, 1.0
    for level in levels:
        sizes = difference.shape[2:]
        if level < max(sizes):
            weight /= 2
            total += weight
            cells = [min(level, size) for size in sizes]
            pooled, counted = _POOLS[student.ndim](difference, cells), None
            if shares is not None:
                share = _POOLS[student.ndim](shares, cells)
                counted = share > 0
                pooled = pooled / torch.where(counted, share, 1.0)
            values = values + weight * _squares(pooled, counted)
    return over_examples(values / total, positions, reduction)


def _squares(difference: Tensor, counts: Tensor | None) -> Tensor:
    """Mean square of each example over the positions that count; the channels are dimension 1."""
    squares = difference.square()
    return per_example(squares) if counts is None else mean_of_counted(squares.mean(dim=1), counts.squeeze(1))
