"""Losses on which units are active, and on how features change from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.activations import activation_boundary, solution_flow
from lightning_distill.losses.base import DistillationLoss, FormulaLoss

__all__ = ["ActivationBoundaryLoss", "SolutionFlowLoss"]


class ActivationBoundaryLoss(FormulaLoss):
    r"""Squared hinge on the student's responses, averaged over units and examples.

    .. math:: \frac{1}{N D} \sum_n \sum_d \begin{cases} \max(0, m - f^s_{nd})^2 & f^t_{nd} > 0 \\
        \max(0, m + f^s_{nd})^2 & f^t_{nd} \le 0 \end{cases}

    The student learns which units of the teacher are active. Take both features before the ReLU, such as those of the
    batch normalisation. See :func:`lightning_distill.functional.activation_boundary`.

    Args:
        margin: Distance m from zero that the student's responses should have, greater than 0; may be set while
            training.

    Returns:
        A scalar when called with features of equal shape ``(N, ...)`` of the student, then the teacher.

    Raises:
        TypeError: If the margin is not a number.
        ValueError: If the margin is not greater than 0.

    Example:
        >>> import torch
        >>> ActivationBoundaryLoss()(torch.tensor([[0.5, -3.0, 2.0]]), torch.tensor([[4.0, -1.0, -0.1]]))
        tensor(3.0833)

    References:
        Heo et al. 2019, arXiv:1811.03233, where it initialises the student before the training; deviation:
        the mean instead of the sum over the units.
    """

    _formula = staticmethod(activation_boundary)

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__()
        checks.positive("margin", margin)
        self._fix(margin=float(margin))


class SolutionFlowLoss(DistillationLoss):
    r"""Mean squared difference of the products between the channels of consecutive layers, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_l \frac{1}{C_l C_{l+1}} \sum_{a,b} (G^s_{nl,ab} - G^t_{nl,ab})^2, \qquad
        G_{nl,ab} = \frac{1}{P} \sum_{i=1}^{P} f_{nl,a,i} \, f_{n(l+1),b,i}

    It compares how one layer's feature becomes the next one. Give a FeatureDistillation lists of two layers or more:
    ``FeatureDistillation(["layer1", "layer2"], ["layer1", "layer2"], SolutionFlowLoss())``. See
    :func:`lightning_distill.functional.solution_flow`.

    Returns:
        A scalar when called with a list of features ``(N, C, H, W)`` or ``(N, L, C)`` of the student, then the teacher.

    Example:
        >>> import torch
        >>> student = [torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])]
        >>> teacher = [torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[4.0, 2.0]]]])]
        >>> SolutionFlowLoss()(student, teacher)
        tensor(4.)

    References:
        Yim et al. 2017, equations 1 and 2 (CVPR), where it initialises the student before the training; deviations, as
        in published code: the mean over the pairs of channels, and averages where the paper has max pooling.
    """

    positions_must_match: ClassVar[bool] = False
    several_layers: ClassVar[bool] = True

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        return solution_flow(student, teacher, mask=mask, reduction="mean")
