"""Data, networks and a LightningModule for the tests of the cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from device import ACCELERATOR
from lightning.pytorch import LightningModule, Trainer
from plain_trainer import PLAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_distill import DistillCallback

ITEMS = 40


def network(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 10))


def table(items: int = ITEMS, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(items, 6, generator=generator), torch.arange(items) % 10)


class Numbered(IterableDataset[Any]):
    """A stream of the table's inputs, each with its number."""

    def __iter__(self) -> Iterator[Any]:
        yield from ((x, number) for number, (x, _) in enumerate(table()))


class Augmented(Dataset[Any]):
    """Items with noise from all three random states; images would be cropped and flipped like that."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return (x if random.random() < 0.5 else x.flip(0)) + noise, index % 10


class Views(Dataset[Any]):
    """The views of a cache as a data set of their own, in the order of the epochs; ``module`` is that of the run."""

    def __init__(self, views: Any, count: int) -> None:
        self.views, self.count, self.module = views, count, None

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Any:
        return self.views[index + len(self) * (self.module.trainer.current_epoch % self.count)].batch


class Module(LightningModule):
    """A user's module, which knows nothing of a cache and notes what its code sees."""

    def __init__(self, data: Any, batch_size: int = 8, shuffle: bool = True, **loading: Any) -> None:
        super().__init__()
        self.model, self.data = network(8, seed=3), data
        self.loading = {"batch_size": batch_size, "shuffle": shuffle, **loading}
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.batches.append(batch)
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.model(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        torch.manual_seed(5)
        return DataLoader(self.data, **self.loading)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(table(), batch_size=8)


def trained(module: Module, teacher: Any, terms: Any, epochs: int = 2, **settings: Any) -> Module:
    trainer = Trainer(
        max_epochs=epochs, callbacks=[DistillCallback(teacher, terms)], accelerator=ACCELERATOR, **PLAIN, **settings
    )
    trainer.fit(module)
    return module


def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)
