"""Steps of balanced weights for several tests, and the script that two processes run for test_balanced.py."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import PLAIN
from processes import run_as_process
from tiny import CLASSES, INPUTS, Classifier, Mlp, dataset
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation
from lightning_distill.schedules import Balanced

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Manual(Classifier):
    """Adds the distillation loss by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        task = F.cross_entropy(self.model(x), y)
        self.manual_backward(task + self.trainer.callbacks[0].loss(task_loss=task))
        optimizer.step()


class First(Callback):
    """Notes the weights of the first step."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill, self.weights = distill, dict[str, float]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.weights = self.weights or {term.name: term.weight for term in self.distill.terms}


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def batches(count: int, rows: int = 6, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(rows, INPUTS, generator=generator, dtype=dtype)  # noqa: E731
    return [(draw(), torch.randint(CLASSES, (rows,), generator=generator)) for _ in range(count)]


def train(distiller: Distiller, data: Any, lr: float = 0.1) -> list[dict[str, float]]:
    """The weights of each step."""
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=lr)
    distiller.follow(optimizer)
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        with distiller.record():
            loss = F.cross_entropy(distiller.student(x), y)
        distiller.total(loss, (x, y)).backward()
        optimizer.step()
        seen.append(distiller.scheduler.values)
    return seen


def fitted(*, devices: int, strategy: Any, batch_size: int, module: Any = None) -> dict[str, Any]:
    """The weights of the first step and the fixed ones."""
    distill = DistillCallback(
        Mlp(5, seed=1),
        [
            LogitsDistillation(weight=Balanced(steps=3)),
            FeatureDistillation("body", "body", weight=Balanced(0.5, steps=2)),
        ],
        student="model",
    )
    sampler = DistributedSampler(dataset(48), num_replicas=devices, rank=RANK, shuffle=False)
    loader = DataLoader(dataset(48), batch_size=batch_size, sampler=sampler)
    first = First(distill)
    quiet: dict[str, Any] = {**PLAIN, "accelerator": "cpu", "use_distributed_sampler": False}
    trainer = Trainer(callbacks=[distill, first], devices=devices, strategy=strategy, max_steps=5, **quiet)
    trainer.fit(Classifier() if module is None else module, loader)
    return {"first": first.weights, "last": {term.name: term.weight for term in distill.terms}}


def pair(folder: Path) -> None:
    strategy = lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))  # noqa: E731
    torch.manual_seed(RANK)
    results = {
        "plain": fitted(devices=2, strategy=strategy(), batch_size=4),
        "manual": fitted(devices=2, strategy=strategy(), batch_size=4, module=Manual()),
    }
    (folder / f"pair{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"pair": pair})
