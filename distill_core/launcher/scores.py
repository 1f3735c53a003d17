"""Scores of students, and the best of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from distill_core.launcher.words import Words


class BestStudent:
    """The best weights that a student has had, judged by a function that scores a model.

    Each half of the project overrides the last two methods, and ``_evaluate`` if scoring a model needs preparation.

    Args:
        score: Called with a model; returns a number, or several in a list or dict. The first one counts. With ``None``
            no weights are kept.
        higher_is_better: Whether a larger number is better.
        frequency: Number of epochs between two scores, 1 or more.

    Attributes:
        checks: The module ``checks`` of a half.
        teacher_score: The teacher's score before the training, or None.
        first_score: The student's score before it, or None.
        best_score: The best score of the student so far, or None.

    Raises:
        ValueError: If ``frequency`` is less than 1.
        TypeError: If ``frequency`` is not a number.
    """

    checks: Words

    def __init__(self, score: Callable[[Any], Any] | None, higher_is_better: bool, frequency: int) -> None:
        self.checks.at_least("eval_frequency", frequency, 1)
        self._score, self._higher, self._frequency = score, higher_is_better, frequency
        self._log = logging.getLogger(type(self).__module__.partition(".")[0])
        self._epochs = 0
        self._weights: Any = None
        self.teacher_score: float | None = None
        self.first_score: float | None = None
        self.best_score: float | None = None

    def begin(self, student: Any, teacher: Any) -> None:
        """Score both models before the training.

        Args:
            student: The student, whose weights are the best so far.
            teacher: The teacher, or None.
        """
        if self._score is None:
            return
        self.teacher_score = None if teacher is None else self._judged(teacher)
        self._take(student)
        self.first_score = self.best_score
        self._log.info("Scores before training: teacher %s, student %s.", self.teacher_score, self.first_score)

    def end_epoch(self, student: Any) -> None:
        """Count an epoch, and score the student if ``frequency`` epochs have passed."""
        self._epochs += 1
        if self._score is not None and self._epochs % self._frequency == 0:
            self._take(student)

    def restore(self, student: Any) -> None:
        """Load the best weights into the student."""
        if self._weights is not None:
            self._fill(student, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The number of epochs, the scores and the best weights."""
        scores = (self.teacher_score, self.first_score, self.best_score)
        return {"epochs": self._epochs, "weights": self._weights, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved training."""
        self._epochs, self._weights = state["epochs"], state["weights"]
        self.teacher_score, self.first_score, self.best_score = state["scores"]

    def _take(self, student: Any) -> None:
        score, best = self._judged(student), self.best_score
        if best is None or best != best or (score > best if self._higher else score < best):
            self.best_score, self._weights = score, self._copy(student)
        self._log.info("Score after %d epochs: %s, the best %s.", self._epochs, score, self.best_score)

    def _judged(self, model: Any) -> float:
        return judge(self._evaluate(model), self.checks)

    def _evaluate(self, model: Any) -> Any:
        """The score of a model."""
        return self._score(model) if self._score is not None else None

    def _copy(self, student: Any) -> Any:
        """A copy of the student's weights."""
        raise NotImplementedError

    def _fill(self, student: Any, weights: Any) -> None:
        """Load copied weights into the student."""
        raise NotImplementedError


def judge(score: Any, checks: Words) -> float:
    """The number by which models are compared.

    Args:
        score: A number, or several in a list or dict. The first one counts.
        checks: The module ``checks`` of a half.

    Returns:
        The number.

    Raises:
        TypeError: If the score is not a number, and the first of several is not either.

    Example:
        >>> from distill_core import checks
        >>> judge({"accuracy": 0.75, "loss": 1.2}, checks)
        0.75
    """
    first: Any = score
    while isinstance(first, (Mapping, list, tuple)) and first:
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    try:
        return float(first)
    except (TypeError, ValueError):
        raise TypeError(checks.message("`eval_func` to return a number, or several", f"{score!r}")) from None
