"""The script that two processes run for the tests of teachers that move: mutual learning, and an average, under DDP.

``python teachers_in_processes.py mutual FOLDER``, started twice with LOCAL_RANK set.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import PLAIN
from processes import run_as_process
from tiny import CLASSES, INPUTS, Classifier, Mlp, dataset
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, EMATeacher, MutualLearning

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def module() -> MutualLearning:
    return MutualLearning([Mlp(5), Mlp(7, seed=1)], optimizer=sgd)


def batches(rank: int) -> DataLoader:
    """This process's half of every batch of eight rows."""
    halves = [list(range(start + 4 * rank, start + 4 * rank + 4)) for start in (0, 8)]
    return DataLoader(dataset(16), batch_sampler=halves)


class Normalized(nn.Module):
    """A network with statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body, self.norm, self.head = nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def fit(fitted: LightningModule, *callbacks: Callback) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    settings = {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "use_distributed_sampler": False, **PLAIN}
    Trainer(strategy=strategy, callbacks=list(callbacks), **settings).fit(fitted, batches(RANK))


def average(folder: Path) -> None:
    distill = DistillCallback(EMATeacher(0.5), student="model")
    fit(Classifier(Normalized()), distill)
    values = {name: value.tolist() for name, value in distill.teacher.network.state_dict().items()}
    (folder / f"average{RANK}.json").write_text(json.dumps(values))


def mutual(folder: Path) -> None:
    fitted = module()
    fit(fitted)
    values = {name: value.tolist() for name, value in fitted.state_dict().items()}
    (folder / f"mutual{RANK}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    run_as_process({"mutual": mutual, "average": average})
