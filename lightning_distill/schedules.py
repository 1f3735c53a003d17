"""Schedules: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_core.schedules import Cosine, Linear, Progress, Schedule, Step, WarmUp, first_value
from lightning_distill import checks

__all__ = ["Cosine", "Linear", "Progress", "Schedule", "Scheduler", "Step", "WarmUp", "first_value"]


class Scheduler:
    """Sets every scheduled weight and temperature to its number at a point of the training.

    Args:
        terms: The terms, whose weights and whose losses' settings may be scheduled.
        owner: What holds the task's weight.

    Attributes:
        values: The numbers set last, by the names that logs give them.
    """

    def __init__(self, terms: Sequence[Any], owner: Any) -> None:
        owners = [("", owner)]
        owners += [(f"{term.name}_", one) for term in terms for one in (term, getattr(term, "loss", None))]
        self._scheduled = [
            (f"{prefix}{name}", one, name, schedule)
            for prefix, one in owners
            for name, schedule in getattr(one, "schedules", {}).items()
        ]
        self.values: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._scheduled)

    def advance(self, progress: Progress) -> None:
        """Set the numbers.

        Args:
            progress: The point of the training.

        Raises:
            ValueError: If a position is not known, or a number is none that the setting may have.
        """
        for label, owner, name, schedule in self._scheduled:
            value = schedule.at(progress)
            (checks.non_negative if name.endswith("weight") else checks.positive)(label, value)
            setattr(owner, name, value)
            self.values[label] = value
