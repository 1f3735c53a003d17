"""The calls of a step to distill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_distill.recording import Call


@dataclass
class StepCalls:
    """The calls of a step to distill, and the teachers' answers if they exist already.

    Args:
        calls: The recorded calls that count, by index or slice, or a list of other calls; ``None`` is the mean over all
            recorded calls.
        answers: The teachers' answers to every call; ``None`` asks the teacher.
        stored: The answers of a cache, which came with the batch.
    """

    calls: int | slice | list[Call] | None = None
    answers: list[Call] | None = None
    stored: Any = None

    def of(self, recorded: Sequence[Call]) -> list[Call]:
        """The calls that count."""
        if isinstance(self.calls, list):
            return self.calls
        if self.calls is None or not recorded:
            return list(recorded)
        return list(recorded[self.calls]) if isinstance(self.calls, slice) else [recorded[self.calls]]
