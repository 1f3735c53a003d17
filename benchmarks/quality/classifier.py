"""The plain LightningModule that trains a network, and the training of teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TRAINER = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
UNLABELLED = -100  # cross entropy ignores this label


def loaders(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], batch_size: int = 100) -> tuple[Any, Any]:
    """The loaders of a run: shuffled batches for training, and the test examples in their order."""
    return (
        DataLoader(TensorDataset(*train), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(*test), 1000),
    )


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


def trained_once(make: Callable[[], Any], loaders: Sequence[Any], epochs: int, path: Path) -> nn.Module:
    """A teacher: the ``net`` of a LightningModule, trained once with seed 0, then read from its file."""
    seed_everything(0, verbose=False)
    module = make()
    net: nn.Module = module.net
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=epochs, **quiet, **TRAINER).fit(module, *loaders)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net
