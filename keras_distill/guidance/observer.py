"""The time and the curve of a run, and its end after a number of steps."""

from __future__ import annotations

import time
from typing import Any

import keras

from distill_core.guidance.timing import typical_seconds


class RunObserver(keras.callbacks.Callback):
    """Measures a run, and ends it after a number of steps.

    Args:
        last: Number of steps after which the training ends; None leaves that to ``epochs``.

    Attributes:
        seconds: Duration of the training so far, without validation.
        steps: Number of finished steps.
        epochs: Number of epochs that have begun.
        curve: The logs of each epoch.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last, self.seconds, self.steps, self.epochs = last, 0.0, 0, 0
        self.curve: list[dict[str, float | None]] = []
        self._times: list[float] = []  # of steps, from the end of one to the end of the next
        self._alone: list[float] = []  # of steps, without the loading of their batch
        self._since: float | None = None
        self._last: float | None = None
        self._begun, self._batch = 0.0, 0

    @property
    def step_seconds(self) -> float | None:
        """Duration of a step with the loading of its batch, undisturbed; None before the first."""
        return typical_seconds(self._times or self._alone)

    def on_train_begin(self, logs: Any = None) -> None:
        """At the start: start the clock."""
        self._since = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """At the start of an epoch: count it."""
        self.epochs, self._last, self._batch = epoch + 1, None, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Before a step: start its clock."""
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """After a step, or several in one execution: stop its clock."""
        if logs:
            float(logs["loss"])  # some backends run ahead of Python: this waits for the step
        now, count = time.perf_counter(), batch + 1 - self._batch
        if self._last is not None:
            self._times.append((now - self._last) / count)
        self._alone.append((now - self._begun) / count)
        self._last, self._batch = now, batch + 1
        self.steps += count
        if self.last is not None and self.steps >= self.last:
            self.model.stop_training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Before validation, which does not count: stop the clock."""
        self.stop()

    def on_test_end(self, logs: Any = None) -> None:
        """After validation: start the clock again."""
        self._since, self._last = time.perf_counter(), None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """At the end of an epoch: keep its logs."""
        values = {name: float(value) for name, value in (logs or {}).items()}
        self.curve.append({"epoch": epoch, "step": self.steps, **values})

    def on_train_end(self, logs: Any = None) -> None:
        """At the end: stop the clock."""
        self.stop()

    def stop(self) -> None:
        """Stop the clock of the training."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None
