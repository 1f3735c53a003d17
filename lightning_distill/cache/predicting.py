"""A build of a cache inside ``Trainer.predict``, which starts the processes and chooses device and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from distill_core.store import CacheError
from lightning_distill import compat
from lightning_distill.teachers.hold import Hold


class _Build(LightningModule):
    """A build as a module of one step, in which each process writes its shards."""

    def __init__(self, teacher: nn.Module, work: Callable[[], None]) -> None:
        super().__init__()
        self.teacher = teacher  # so that the Trainer moves it to its device
        self._work = work

    def predict_dataloader(self) -> list[int]:
        return [0]

    def predict_step(self, *args: Any) -> bool:
        with torch.inference_mode(False), torch.no_grad():  # the teacher's parameters must stay ordinary tensors
            self._work()
        return True  # Lightning warns of None


def predict(trainer: Trainer, teacher: nn.Module, device: torch.device | str | None, work: Callable[[], None]) -> None:
    """Do the work inside ``Trainer.predict``: in its processes, on its device and in its precision.

    Args:
        trainer: The Trainer.
        teacher: The teacher, which is moved to the Trainer's device and back.
        device: The device that the user has named, which must be None.
        work: Builds the cache; it must be picklable for strategies that spawn processes.

    Raises:
        CacheError: If the Trainer's strategy or precision changes the teacher.
        TypeError: If ``trainer`` is not a Trainer.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"Expected `trainer` to be a Lightning Trainer, but got a {type(trainer).__name__}.")
    if device is not None:
        raise CacheError(f"Expected `device` to be None with `trainer`, which chooses it, but got device={device!r}.")
    whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or compat.has_strategy(trainer, "DeepSpeedStrategy"):  # which Lightning derives from DDP's
        raise CacheError(
            "Expected `trainer` to run a whole teacher in each process, but got the strategy"
            f" {type(trainer.strategy).__name__}. Use one device, or strategy='ddp'."
        )
    if type(trainer.precision_plugin) not in (Precision, MixedPrecision):
        raise CacheError(
            "Expected `trainer` to leave the teacher's weights as they are, but its precision"
            f" {trainer.precision!r} converts them. Use '32-true', 'bf16-mixed' or '16-mixed', or convert the teacher"
            " itself."
        )
    module, hold = _Build(teacher, work), Hold(teacher)
    hold.take()
    try:
        trainer.predict(module, return_predictions=False)
    finally:
        hold.release()
