"""A small LightningModule, its data and its teacher for comparisons, also in other processes and from YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill_core.guidance.comparison import Comparison
from lightning_distill import LogitsDistillation, compare

SOFT = {"soft targets": [LogitsDistillation()]}
TRAINER: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1}


class LitClassifier(LightningModule):
    """A plain module that logs an accuracy in validation and in the test; keeps the batches that it has seen."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nets.ConvNet(2, dropout)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append(labels)
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.accuracy(batch), batch_size=len(batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_acc", self.accuracy(batch), batch_size=len(batch[1]))

    def accuracy(self, batch: Any) -> Tensor:
        return (self.net(batch[0]).argmax(1) == batch[1]).float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def teacher() -> nn.Module:
    return nets.make(nets.ConvNet, 2, 4)


def loaders(count: int = 40) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders that shuffle by the global generator."""
    images, labels = nets.digits(count)
    labels = teacher().eval()(images).argmax(1)
    data = TensorDataset(images, labels)
    return DataLoader(data, 8, shuffle=True), DataLoader(data, 16)


class DataModule(LightningDataModule):
    """The same data, with a test set."""

    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]

    def test_dataloader(self) -> Any:
        return loaders()[1]


def compared(folder: Path, **changed: Any) -> Comparison:
    """A comparison with these settings, of which some are changed."""
    settings: dict[str, Any] = {"module": LitClassifier, "data": loaders, "teacher": teacher(), "methods": SOFT}
    settings |= {"metric": "val_acc", "seeds": 2, "trainer": TRAINER, "folder": folder, "progress": False}
    return compare(**{**settings, **changed})
