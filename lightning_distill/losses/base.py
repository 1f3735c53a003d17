"""What all losses share: the class attributes by which a term knows how to call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_distill import checks
from lightning_distill.schedules import Schedule, first_value


class DistillationLoss(nn.Module):
    """Base of every loss: a module called with the student's tensor, then the teacher's, that returns a scalar.

    A subclass stores checked settings and defines ``forward(student, teacher)``, or
    ``forward(student, teacher, labels)`` with ``needs_labels = True``. Six attributes tell a term what to hand over:

    - ``needs_labels``: the batch's labels are the third argument.
    - ``channels_must_match``: the two features need the same number of channels, if necessary through an adapter.
    - ``positions_must_match``: the two features need the same positions; a term resizes the teacher's map.
    - ``several_layers``: the two arguments are lists of features, one for each layer.
    - ``merges_classes``: it is a divergence between the distributions of a row, also where classes of the row are
      merged, so that a cache of the likeliest classes is enough.
    - ``learned``: :meth:`build` makes parameters. A FeatureDistillation builds a copy of the loss for each pair of
      layers, and treats it as it does adapters.

    Example:
        >>> import torch
        >>> class LargestDifference(DistillationLoss):
        ...     def forward(self, student, teacher):
        ...         return (student - teacher.detach()).abs().amax(dim=-1).mean()
        >>> LargestDifference()(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 2.0], [0.0, 1.0]]))
        tensor(2.)
    """

    needs_labels: ClassVar[bool] = False
    channels_must_match: ClassVar[bool] = True
    positions_must_match: ClassVar[bool] = True
    several_layers: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    merges_classes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        schedules = self.__dict__.get("schedules")
        if schedules and name in schedules and name in self.__dict__:  # not when the constructor sets it
            del schedules[name]  # a number that is assigned later takes the place of the schedule
        super().__setattr__(name, value)

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the parameters of a loss with ``learned = True``.

        Args:
            student: Shape of the student's feature, after the adapter.
            teacher: Shape of the teacher's feature.

        Raises:
            ValueError: If the loss cannot compare features of these shapes.
        """

    def _setting(
        self, name: str, value: float | Schedule, check: Callable[[str, Any], None] = checks.positive
    ) -> float:
        """A setting that may be a schedule, whose numbers pass a check: the number that it has at first."""
        return first_value(name, value, check, self.schedules)
