"""Schedules: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from distill_core.guidance.balance import Balanced, TermWeight, Weight
from distill_core.schedules import (
    Cosine,
    Linear,
    Progress,
    Schedule,
    Setting,
    Step,
    WarmUp,
    first_value,
    set_scheduled,
)
from lightning_distill import checks

__all__ = [
    "Balanced",
    "Cosine",
    "Linear",
    "Progress",
    "Schedule",
    "Scheduler",
    "Setting",
    "Step",
    "TermWeight",
    "WarmUp",
    "Weight",
    "first_value",
]


class Scheduler:
    """Sets every scheduled weight and temperature to its number at a point of the training.

    Schedules are searched in the terms and in every module inside them at each use, so a schedule that is assigned
    during training counts too.

    Args:
        terms: The terms.
        owner: The object with the task weight, and perhaps with settings for text of the student.
        others: Further objects with schedules, each with the prefix of their names in the logs.
    """

    def __init__(self, terms: Sequence[nn.Module], owner: Any, others: Sequence[tuple[str, Any]] = ()) -> None:
        self._terms, self._owner, self._others = terms, owner, others

    def __bool__(self) -> bool:
        return any(True for _ in self._scheduled())

    @property
    def values(self) -> dict[str, float]:
        """The current numbers of the scheduled settings, by their names in the logs."""
        return {label: getattr(owner, name) for label, owner, name, _ in self._scheduled()}

    @property
    def names(self) -> list[str]:
        """The names that logs give the scheduled settings."""
        return [label for label, *_ in self._scheduled()]

    def _scheduled(self) -> Iterator[tuple[str, Any, str, Schedule]]:
        """Label in the logs, object, name and schedule of each scheduled setting."""
        for name, schedule in self._owner.schedules.items():
            yield name, self._owner, name, schedule
        on_policy = getattr(self._owner, "on_policy", None)
        for prefix, other in [*self._others] if on_policy is None else [("on_policy", on_policy), *self._others]:
            for name, schedule in other.schedules.items():
                yield f"{prefix}_{name}", other, name, schedule
        for term in self._terms:
            for path, module in term.named_modules():
                schedules = module.__dict__.get("schedules")
                if not schedules:
                    continue
                # the loss is the term's own, and copies of a learned loss have its settings
                inside = "" if not path or path.split(".")[0] in ("loss", "learned") else f"{path.replace('.', '_')}_"
                for name, schedule in schedules.items():
                    yield f"{term.name}_{inside}{name}", module, name, schedule

    def advance(self, progress: Progress) -> None:
        """Set the numbers.

        Args:
            progress: The point of the training.

        Raises:
            ValueError: If a position is not known, or the setting does not allow the number.
        """
        for label, owner, name, schedule in list(self._scheduled()):
            value = schedule.at(progress)
            checked = getattr(type(owner), name, None)
            check = checks.non_negative if name.endswith("weight") else checks.positive
            (checked.check if isinstance(checked, Setting) else check)(label, value)
            set_scheduled(owner, name, value)
