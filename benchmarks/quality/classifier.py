"""The plain LightningModule that trains a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

UNLABELLED = -100  # cross entropy ignores this label


class Classifier(LightningModule):
    """A network, Adam on a one-cycle schedule, and the accuracy on the test examples after each epoch."""

    def __init__(self, make: Callable[[], nn.Module], lr: float) -> None:
        super().__init__()
        self.net, self.lr = make(), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        total = F.cross_entropy(self.net(inputs), labels, ignore_index=UNLABELLED, reduction="sum")
        return total / (labels != UNLABELLED).sum().clamp(min=1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        hits = (self.net(inputs).argmax(1) == labels).float()
        self.log("accuracy", hits.mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
