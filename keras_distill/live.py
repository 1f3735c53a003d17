"""Callbacks that show the progress: a live curve in notebooks, a summary at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

import keras

from distill_core.live import Curve, summary
from distill_core.terminal import write_line
from keras_distill import backends, compat


class LiveCurve(keras.callbacks.Callback):
    """The losses of a :class:`DistillModel` as a figure in a notebook, drawn again while ``fit`` goes on.

    Outside of a notebook nothing is drawn, and a warning says so. The values are Keras' own running means of an epoch.

    Args:
        every: Number of batches between two drawings.

    Raises:
        TypeError: If ``every`` is not an integer.
        ValueError: If it is not greater than 0.

    Example:
        >>> LiveCurve(every=20).curve.every
        20
    """

    def __init__(self, every: int = 50) -> None:
        super().__init__()
        self.curve, self._batches = Curve(every), 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin a new figure."""
        self.curve.begin()
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Draw, after so many batches."""
        self._batches += 1
        if self._batches % self.curve.every == 0:
            self._draw(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Draw the epoch's last point."""
        if self._batches % self.curve.every:
            self._draw(logs)

    def _draw(self, logs: dict[str, Any] | None) -> None:
        own = ("task_loss", *(f"{term.name}_loss" for term in getattr(self.model, "terms", ())))
        self.curve.add(self._batches, {name: float(value) for name, value in (logs or {}).items() if name in own})
        self.curve.draw()


class DistillSummary(keras.callbacks.Callback):
    """Prints a few lines at the end of ``fit``: steps, seconds, each loss with its weight, the agreement.

    The values are those of the last epoch.

    Example:
        >>> isinstance(DistillSummary(), keras.callbacks.Callback)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._began, self._steps, self._logs = 0.0, 0, dict[str, Any]()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Look at the clock."""
        self._began, self._steps, self._logs = time.perf_counter(), self._count(), {}

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keep the values of the last epoch."""
        self._logs = dict(logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Print the lines."""
        values = {
            name: backends.as_float(value)
            for name, value in self._logs.items()
            if name.endswith(("loss", "teacher_agreement"))
        }
        weights = {term.name: term.weight for term in getattr(self.model, "terms", ())}
        seconds = time.perf_counter() - self._began
        for line in summary(self._count() - self._steps, seconds, values, weights).splitlines():
            write_line(sys.stdout, line)

    def _count(self) -> int:
        batches, accumulated = compat.raw_iterations(self.model.optimizer)
        return batches // accumulated
