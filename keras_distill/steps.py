"""What one step of training or evaluation knows, on the thread that runs or traces it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from keras_distill.taps import Call

_THREAD = threading.local()


class Step:
    """One step of one model.

    Args:
        model: The model that makes the step.
        task_alone: Whether only the compiled loss is asked for, without regularisers.

    Attributes:
        student: The student's call, once it has run.
        tracked: Names of the metrics that the step has updated.
        training: Whether the student is trained in it.
    """

    def __init__(self, model: Any, *, task_alone: bool = False) -> None:
        self.model, self.task_alone = model, task_alone
        self.student: Call | None = None
        self.tracked: set[str] = set()
        self.training = True


@contextlib.contextmanager
def in_step(step: Step) -> Iterator[None]:
    """Makes a step the current one of this thread; ``tf.distribute`` gives each replica a thread of its own.

    Args:
        step: The step.
    """
    before = getattr(_THREAD, "step", None)
    _THREAD.step = step
    try:
        yield
    finally:
        _THREAD.step = before


def current_step(model: Any) -> Step | None:
    """The step that this thread makes with a model, or None."""
    step = getattr(_THREAD, "step", None)
    return step if step is not None and step.model is model else None


def trains() -> bool | None:
    """Whether the step that this thread makes is one of training; None outside of any step."""
    step = getattr(_THREAD, "step", None)
    return None if step is None else step.training
