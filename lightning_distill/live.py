"""Callbacks that show the progress: a live curve in notebooks, a summary at the end."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill_core.live import Curve, summary
from lightning_distill.callback import DistillCallback


class LiveCurve(Callback):
    """The losses of every :class:`DistillCallback` as a figure in a notebook, drawn again while training goes on.

    Only the first process draws. Outside of a notebook nothing is drawn, and a warning says so.

    Args:
        every: Number of optimizer steps between two drawings.

    Raises:
        TypeError: If ``every`` is not an integer.
        ValueError: If it is not greater than 0.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LiveCurve(every=20)], accelerator="cpu", logger=False)
    """

    def __init__(self, every: int = 50) -> None:
        self.curve = Curve(every)
        self._last = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start: begin a new figure."""
        self.curve.begin()
        self._last = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a batch: draw, if the optimizer has made so many steps."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last and step % self.curve.every == 0:
            self._last = step
            self.curve.add(step, _losses(trainer))
            self.curve.draw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end: draw the last point."""
        if trainer.is_global_zero:
            if trainer.global_step != self._last:
                self.curve.add(trainer.global_step, _losses(trainer))
            self.curve.draw()


class DistillSummary(Callback):
    """Prints a few lines at the end of a fit: steps, seconds, each loss with its weight, the agreement.

    The values are those of the last epoch. Only the first process prints.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DistillSummary()], accelerator="cpu", logger=False)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start: look at the clock."""
        self._began, self._steps = time.perf_counter(), trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end: print the lines."""
        steps, seconds = trainer.global_step - self._steps, time.perf_counter() - self._began
        for callback in _callbacks(trainer):
            start = f"{callback.name}/"
            values = {
                key.removeprefix(start): float(value)
                for key, value in trainer.callback_metrics.items()
                if key.startswith(start) and key.endswith(("loss", "teacher_agreement"))
            }
            trainer.print(summary(steps, seconds, values, {term.name: term.weight for term in callback.terms}))


def _callbacks(trainer: Trainer) -> list[DistillCallback]:
    return [each for each in trainer.callbacks if isinstance(each, DistillCallback)]  # type: ignore[attr-defined]


def _losses(trainer: Trainer) -> dict[str, float]:
    """The losses of the training that were logged last, without the weighted sums."""
    starts = tuple(f"{callback.name}/" for callback in _callbacks(trainer))
    return {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if key.startswith(starts) and key.endswith("_loss") and "/val_" not in key and "distillation" not in key
    }
