"""The same random numbers for every method, and the time, the curve and the first batches of a run."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy

from distill_core.guidance.records import digest
from distill_core.guidance.timing import typical_seconds
from lightning_distill.cache.data import leaves
from lightning_distill.recording.recorder import random_state, restored


@contextmanager
def kept_random_state() -> Iterator[None]:
    """A context after which the global generators of Python, NumPy and torch are as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with restored(random_state()):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def seed_everything(seed: int, epoch: int | None = None) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Args:
        seed: The seed of a run.
        epoch: The epoch whose random numbers are to come; None is the time before the first.
    """
    words = f"{seed}" if epoch is None else f"{seed}, epoch {epoch}"
    number = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def digest_of(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers; those that a lazy layer has not made yet count by name."""
    return digest(
        part
        for name, value in module.state_dict().items()
        for part in (name, *([] if is_lazy(value) else leaves(value)))
    )


class RunObserver(Callback):
    """Seeds each epoch, and measures a run.

    Every epoch begins with random numbers of its own, however many a method has drawn before: the order of the data and
    the student's dropout at the start of an epoch are those of the same epoch of the student alone.

    Args:
        seed: The seed of the run.

    Attributes:
        seconds: Duration of the training so far, without validation.
        steps: Number of finished batches.
        curve: The logged values after each validation.
        batches: A digest of the first batch of each epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.seconds, self.steps = seed, 0.0, 0
        self.curve: list[dict[str, float | None]] = []
        self.batches: list[str] = []
        self._times: list[float] = []  # of steps, from the end of one to the end of the next
        self._alone: list[float] = []  # of steps, without the loading of their batch
        self._since: float | None = None  # the training goes on since then; None in validation
        self._last: float | None = None
        self._begun = 0.0

    @property
    def step_seconds(self) -> float | None:
        """Duration of a step with the loading of its batch, undisturbed; None before the first."""
        return typical_seconds(self._times or self._alone)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the loaders are made: seed the first epoch."""
        seed_everything(self.seed, 0)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the sanity check, which may have drawn random numbers: seed the first epoch again."""
        seed_everything(self.seed, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start: start the clock."""
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the order of an epoch is drawn: seed it."""
        self._last = None
        seed_everything(self.seed, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a step: keep a digest of the first batch of an epoch."""
        if batch_idx == 0:
            self.batches.append(digest(leaves(batch)))
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step: stop the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # the device works behind the host
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._alone.append(now - self._begun)
        self._last = now
        self.steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before validation: it does not count."""
        self.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After validation: keep the logged values."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.curve.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **values})
        self._since, self._last = time.perf_counter(), None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end: stop the clock."""
        self.stop()

    def stop(self) -> None:
        """Stop the clock of the training."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None
