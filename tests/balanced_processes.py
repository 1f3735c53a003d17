"""The script that two processes run for test_balanced.py, and the run that they are compared with."""

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
from tiny import Classifier, Mlp, dataset
from torch.utils.data import DataLoader, DistributedSampler

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation
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
