"""A temperature that is learned against the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.schedules import Cosine, Schedule, Setting

__all__ = ["CurriculumTemperature"]


class CurriculumTemperature(nn.Module):
    r"""Temperature that is learned to make the loss harder for the student, by gradient reversal.

    .. math:: T = T_{min} + (T_{max} - T_{min}) \, \sigma(\theta), \qquad
        \text{gradient of } \theta = -\lambda \frac{\partial L}{\partial \theta}

    One number is learned for all examples. It is trained by the student's optimizer or the optimizer of the adapters,
    saved and resumed as they are, and logged as ``<term>_temperature``. The reversal weight :math:`\lambda` grows from
    0 to 1 over the first epochs, so that the task becomes harder little by little.

    Pass it as ``temperature=`` of SoftTargetLoss, SoftCrossEntropyLoss, DecoupledKDLoss, NormalizedKDLoss,
    WeightedSoftLabelLoss or DISTLoss in a LogitsDistillation or SequenceDistillation. Other losses refuse it. Each
    callback, module or distiller learns its own.

    Args:
        minimum: Least temperature, greater than 0.
        maximum: Largest temperature, greater than ``minimum``.
        reversal_weight: The weight :math:`\lambda`, 0 or greater, a number or a schedule; ``None`` is
            ``Cosine(0.0, 1.0, duration=10, over="epochs")``.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> temperature = CurriculumTemperature()
        >>> round(float(temperature.value.detach()), 4), temperature.reversal_weight
        (15.6212, 0.0)

    References:
        Li et al. 2023 (CTKD), sections 3.2 and 3.3, arXiv:2211.16231, the global temperature from 1 to 21, with the
        schedule over 10 epochs; :math:`\theta` begins at 1, as in the authors' code.
    """

    reversal_weight = Setting(checks.non_negative)

    def __init__(
        self, minimum: float = 1.0, maximum: float = 21.0, *, reversal_weight: float | Schedule | None = None
    ) -> None:
        super().__init__()
        checks.positive("minimum", minimum)
        checks.number("maximum", maximum)
        if not maximum > minimum:
            raise ValueError(checks.message("`maximum` to be greater than `minimum`", f"{maximum!r} and {minimum!r}"))
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.schedules: dict[str, Schedule] = {}
        standard = Cosine(0.0, 1.0, duration=10, over="epochs")
        self.reversal_weight = standard if reversal_weight is None else reversal_weight
        self.theta = nn.Parameter(torch.ones(()))

    @property
    def value(self) -> Tensor:
        """The temperature, a scalar."""
        return self.minimum + (self.maximum - self.minimum) * torch.sigmoid(self.theta)

    def reset(self) -> None:
        """Start again from the first value."""
        # a new parameter: a state that was taken before keeps the old one's value
        self.theta = nn.Parameter(torch.ones_like(self.theta))

    def forward(self) -> Tensor:
        """The temperature, with a reversed gradient."""
        value = self.value
        # exactly the value: the difference is 0, and its gradient is minus one
        reversed_gradient: Tensor = value.detach() + self.reversal_weight * (value.detach() - value)
        return reversed_gradient

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        weight = self.schedules.get("reversal_weight", self.reversal_weight)
        return f"minimum={self.minimum}, maximum={self.maximum}, reversal_weight={weight}"
