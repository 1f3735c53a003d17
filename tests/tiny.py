"""The smallest networks and modules, for tests that start processes, compilers and command lines.

Everything is drawn from its own seed, and can be named in YAML by class path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

INPUTS, CLASSES = 4, 3


class Mlp(nn.Module):
    """A network of three layers with names: body, act, head."""

    def __init__(self, width: int, seed: int = 0, inplace: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body, self.act, self.head = nn.Linear(INPUTS, width), nn.ReLU(inplace), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class Classifier(LightningModule):
    """A LightningModule in the commonest form: it calls ``self.model(x)`` in its step."""

    def __init__(self, model: nn.Module | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.model, self.lr = Mlp(5) if model is None else model, lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ValidatedClassifier(Classifier):
    """The same with a validation, test and predict step."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.model(x), y), batch_size=len(x))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.model(x), y), batch_size=len(x))

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


def dataset(rows: int = 16, seed: int = 0) -> TensorDataset:
    """Rows of normal inputs and of labels."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(rows, INPUTS, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)
    )


def loader(rows: int = 16, batch_size: int = 4, seed: int = 0) -> DataLoader:
    """Those rows in batches, in order."""
    return DataLoader(dataset(rows, seed), batch_size=batch_size)


class Data(LightningDataModule):
    """Those rows, for the command line."""

    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader(rows=6)
