"""Data whose samples know their number, and a module that notes which samples it got, for the tests of the loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from device import ACCELERATOR
from lightning.pytorch import LightningModule, Trainer
from plain_trainer import PLAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_distill import DistillCallback, LogitMSELoss, LogitsDistillation, TeacherCache

SAMPLES = 24
QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR}


class Numbers(Dataset[Any]):
    """Samples that hold their own number, so that a wrong answer shows."""

    classes = ("even", "odd")

    def __init__(self, samples: int = SAMPLES, first: int = 0) -> None:
        self.samples, self.first = samples, first

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -self.samples <= index < self.samples:
            raise IndexError(index)
        number = self.first + index % self.samples
        return torch.tensor([float(number), 1.0]), number % 2


class InBatches(Numbers):
    """Reads in batches, as ``datasets.Dataset`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.reads.append(len(indices))
        return [self[index] for index in indices]


class MakesBatches(Numbers):
    """Makes a batch by itself where it is given a list of indices, for ``batch_size=None``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return torch.utils.data.default_collate([super(MakesBatches, self).__getitem__(item) for item in index])
        return super().__getitem__(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(2), 0)] * 8)


class Bag:
    """A batch object of the user's own."""

    def __init__(self, samples: Any) -> None:
        self.x, self.y = torch.utils.data.default_collate(samples)

    def __getitem__(self, index: int) -> Tensor:
        return (self.x, self.y)[index]


class Doubled(nn.Module):
    """The teacher: its answer to sample n is (2 n, 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def answers_for(data: Any, folder: Path, **settings: Any) -> TeacherCache:
    return TeacherCache.build(Doubled(), data, folder, dtype="float32", progress=False, **settings)


class Noted(LogitsDistillation):
    """Notes for each step which samples the teacher's answers are for."""

    def __init__(self) -> None:
        super().__init__(LogitMSELoss())
        self.rows: list[list[int]] = []

    def forward(self, student: Any, teacher: Any, labels: Any = None) -> Tensor:
        self.rows.append([round(float(value) / 2) for value in teacher.logits[:, 0]])
        return super().forward(student, teacher, labels)


class Student(LightningModule):
    """Notes the numbers of the samples in each step."""

    def __init__(self, data: Any = None, batch_size: int = 4) -> None:
        super().__init__()
        self.model, self.data, self.batch_size, self.lr = nn.Linear(2, 2), data, batch_size, 1e-4
        self.got: list[list[int]] = []

    def train_dataloader(self) -> Any:
        return self.data(self)

    def val_dataloader(self) -> Any:
        return loader(Numbers(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch["a"] if isinstance(batch, dict) else batch
        self.got.append([int(number) for number in batch[0][:, 0]])
        return 0.0 * self.model(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(batch[0]).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Hooked(Student):
    """Notes the types of what its batch-transfer hooks get."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[str] = set()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.kinds.add(type(batch).__name__)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.kinds.add(type(batch).__name__)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def fitted(
    cache: TeacherCache, data: Any, module: Student | None = None, *callbacks: Any, epochs: int = 2, **settings: Any
) -> tuple[Student, Noted, Trainer]:
    """Fit, and check that every step got the teacher's answers for its own samples."""
    module, term = module or Student(), Noted()
    settings = {**QUIET, "max_epochs": epochs, **settings}
    trainer = Trainer(callbacks=[DistillCallback(cache, term), *callbacks], **settings)
    trainer.fit(module, data)
    check(module, term)
    return module, term, trainer


def check(module: Student, term: Noted) -> None:
    assert module.got
    assert module.got == term.rows


def loader(data: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 4, **settings})


def is_untouched(used: DataLoader[Any]) -> bool:
    return "_get_iterator" not in vars(used) and "_twin_of" not in vars(used)
