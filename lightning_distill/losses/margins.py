"""The loss that leaves alone what a ReLU cuts off, with margins from the teacher's batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_core.margins import margins_of
from lightning_distill import checks
from lightning_distill.functional.margins import margin_relu_distance
from lightning_distill.losses.base import DistillationLoss

__all__ = ["MarginReLULoss"]


class MarginReLULoss(DistillationLoss):
    r"""Squared difference from the teacher's response, except where both are cut off by a ReLU.

    .. math:: \frac{1}{N D} \sum_n \sum_d \begin{cases} 0 & f^s_{nd} \le t_{nd} \le 0 \\
        (f^s_{nd} - t_{nd})^2 & \text{else} \end{cases}, \qquad t_{nd} = \max(f^t_{nd}, m_{c(d)})

    Take both features before the ReLU: the layers that a FeatureDistillation names are then batch normalisations. The
    margin :math:`m_c` of a channel is the mean of its negative responses. The batch normalisation's scale and shift
    give it, so it is known before the training. See :func:`lightning_distill.functional.margin_relu_distance`.

    Args:
        margins: The margin of each channel, at most 0. ``None`` takes them from the teacher's layer that the term
            names, which must be a batch normalisation.

    Returns:
        A scalar when called with features of equal shape, ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)``, of the
        student, then the teacher.

    Raises:
        ValueError: If a margin is greater than 0, or none is known when the loss is called.

    Example:
        >>> loss = MarginReLULoss(margins=(-1.0, -1.0, -1.0))
        >>> loss(torch.tensor([[0.5, -3.0, 2.0]]), torch.tensor([[1.5, -1.0, -4.0]]))
        tensor(3.3333)

    References:
        Heo et al. 2019 ("overhaul"), section 3, arXiv:1904.01866; deviations: the mean instead of the sum over the
        numbers; the exact mean of the negative responses also for channels that are hardly ever negative, where
        published code takes three deviations. The paper's connector is a 1x1 convolution with a batch normalisation:
        pass it as the term's adapter.
    """

    reads_teacher: ClassVar[bool] = True
    margins: tuple[float, ...] | None
    _numbers: Tensor | None

    def __init__(self, *, margins: Sequence[float] | None = None) -> None:
        super().__init__()
        if margins is not None:
            margins = tuple(float(margin) for margin in margins)
            if not margins or max(margins) > 0:
                raise ValueError(checks.message("`margins` to be numbers that are at most 0", f"margins={margins}"))
        self._fix(margins=margins)
        # The term moves a buffer with the loss; it is made again from the setting or from the teacher, never saved.
        numbers = None if margins is None else torch.tensor(margins, dtype=torch.float64)
        self.register_buffer("_numbers", numbers, persistent=False)

    def read_teacher(self, layer_of: Callable[[str | None], nn.Module]) -> None:
        """Take the margins from the tapped layer, if none are set."""
        if self.margins is not None:
            return
        layer: Any = layer_of(None)
        if getattr(layer, "running_mean", None) is None:
            remedy = "Name the batch normalisation before the ReLU, or pass margins=[one number for each channel]."
            raise ValueError(
                checks.message("the teacher's layer to be a batch normalisation", type(layer).__name__, remedy)
            )
        channels = len(layer.running_mean) if layer.weight is None else len(layer.weight)
        scales = [1.0] * channels if layer.weight is None else layer.weight.detach().tolist()
        shifts = [0.0] * channels if layer.bias is None else layer.bias.detach().tolist()
        self._numbers = torch.tensor(margins_of(scales, shifts), dtype=torch.float64)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        if self._numbers is None:
            expected = "`margins` to be given where no term reads them from the teacher"
            raise ValueError(checks.message(expected, "margins=None", "Pass them, or use a FeatureDistillation."))
        return margin_relu_distance(student, teacher, margins=self._numbers, mask=mask, reduction="mean")
