"""The loss between maps at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_distill import checks
from lightning_distill.functional.pyramids import hierarchical_context
from lightning_distill.losses.base import FormulaLoss

__all__ = ["HierarchicalContextLoss"]


class HierarchicalContextLoss(FormulaLoss):
    r"""Mean squared difference of two maps, and of the same maps averaged to a few positions.

    .. math:: \frac{1}{N} \sum_n \frac{1}{\sum_k 2^{-k}} \sum_{k=0}^{K} 2^{-k}
        \frac{1}{D_k} \| P_k(f^s_n) - P_k(f^t_n) \|_2^2

    :math:`P_0` is the map itself, and the next ones are its averages over 4 x 4, 2 x 2 and 1 x 1 cells. A level that is
    not smaller than the map is left out. ``ReviewDistillation`` uses it between fused layers, as the paper does; a
    FeatureDistillation takes it between single ones. See :func:`lightning_distill.functional.hierarchical_context`.

    Args:
        levels: Cells along a side, each 1 or more, in the order in which the weights halve.

    Returns:
        A scalar when called with features of equal shape, ``(N, C, H, W)`` or ``(N, L, C)``, of the student, then the
        teacher.

    Raises:
        TypeError: If a level is not an integer.
        ValueError: If a level is less than 1.

    Example:
        >>> import torch
        >>> HierarchicalContextLoss()(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]]))
        tensor(3.6667)

    References:
        Chen et al. 2021 (ReviewKD), section 3.3, arXiv:2104.09044; deviation: maps that are not square, whose height
        alone decides in the authors' code.
    """

    _formula = staticmethod(hierarchical_context)

    def __init__(self, *, levels: Sequence[int] = (4, 2, 1)) -> None:
        super().__init__()
        for level in levels:
            checks.integer("levels", level)
            checks.at_least("levels", level, 1)
        self._fix(levels=tuple(int(level) for level in levels))
