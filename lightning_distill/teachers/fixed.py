"""The base of the sources of teachers that stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_distill.recording.student import StudentFinder


class FixedTeacher:
    """Base of the sources whose teachers do not change: no steps, no state, no schedules.

    Attributes:
        moves: Whether the teacher changes with the steps of the student's optimizer.
    """

    moves = False

    @property
    def scheduled(self) -> list[tuple[str, Any]]:
        """Objects with settings that may be schedules, each with the prefix of their names in logs."""
        return []

    def check_student(self, student: nn.Module) -> None:
        """No-op: any student will do.

        Args:
            student: The student, or the module that contains it.
        """

    def meet(self, student: StudentFinder) -> None:
        """Take note of the student.

        Args:
            student: Finds it.
        """

    def follow(self, leader: Optimizer) -> None:
        """Take note of the student's optimizer.

        Args:
            leader: The optimizer, without its wrapper.
        """

    def unfollow(self) -> None:
        """Stop following the optimizer."""

    def before_step(self) -> None:
        """Called before the student is called in a step, and before its optimizer steps."""

    def check_followed(self) -> None:
        """Raise if an optimizer is missing."""

    def state_dict(self) -> dict[str, Any]:
        """State to save; empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, or from the start if it is empty.

        Args:
            state: The state.
        """
