"""Schedules: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

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

__all__ = ["Cosine", "Linear", "Progress", "Schedule", "Scheduler", "Setting", "Step", "WarmUp", "first_value"]


class Scheduler:
    """Sets every scheduled weight and temperature to its number at a point of the training.

    Schedules are searched in the terms and in every module inside them at each use, so a schedule that is assigned
    during training counts too.

    Args:
        terms: The terms.
        owner: The object with the task weight.

    Attributes:
        values: The numbers set last, by their names in the logs.
    """

    def __init__(self, terms: Sequence[nn.Module], owner: Any) -> None:
        self._terms, self._owner = terms, owner
        self._modules = [_Known() for _ in terms]
        self.values: dict[str, float] = {}

    def __bool__(self) -> bool:
        return any(True for _ in self._scheduled())

    @property
    def names(self) -> list[str]:
        """The names that logs give the scheduled settings."""
        return [label for label, *_ in self._scheduled()]

    def _scheduled(self) -> Iterator[tuple[str, Any, str, Schedule]]:
        """Label in the logs, object, name and schedule of each scheduled setting."""
        for name, schedule in self._owner.schedules.items():
            yield name, self._owner, name, schedule
        for term, known in zip(self._terms, self._modules, strict=True):
            children = list(term._modules.values())
            if children != known.children:  # parts were made or dropped, or a loss was replaced
                known.children, known.modules = children, list(_settings_in(term))
            for label, module in known.modules:
                for name, schedule in module.__dict__["schedules"].items():
                    yield f"{label}{name}", module, name, schedule

    def advance(self, progress: Progress) -> None:
        """Set the numbers.

        Args:
            progress: The point of the training.

        Raises:
            ValueError: If a position is not known, or the setting does not allow the number.
        """
        values = {}
        for label, owner, name, schedule in list(self._scheduled()):
            value = schedule.at(progress)
            (checks.non_negative if name.endswith("weight") else checks.positive)(label, value)
            set_scheduled(owner, name, value)
            values[label] = value
        self.values = values


class _Known:
    """The modules of a term that can have schedules, kept until its parts change, because a search takes time."""

    def __init__(self) -> None:
        self.children: list[nn.Module | None] | None = None
        self.modules: list[tuple[str, nn.Module]] = []


def _settings_in(term: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Prefix in the logs and module of everything in a term that keeps schedules."""
    for path, module in term.named_modules():
        if "schedules" in module.__dict__:
            # the loss is the term's own, and copies of a learned loss have its settings
            inside = "" if not path or path.split(".")[0] in ("loss", "learned") else f"{path.replace('.', '_')}_"
            yield f"{term.name}_{inside}", module
