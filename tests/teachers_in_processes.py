"""The script that two processes run for the tests of teachers that move: mutual learning, and an average, under DDP.

``python teachers_in_processes.py mutual FOLDER``, started twice with LOCAL_RANK set.
"""

from __future__ import annotations

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import PLAIN
from processes import run_as_process
from tiny import CLASSES, INPUTS, Classifier, Mlp, dataset
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_distill import (
    DistillCallback,
    DistillModule,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    MutualLearning,
    assistant_chain,
)

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

    def __init__(self, seed: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body, self.norm, self.head = nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def trainer(*callbacks: Callback) -> Trainer:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 2,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        **PLAIN,
    }
    return Trainer(strategy=strategy, callbacks=list(callbacks), **settings)


def fit(fitted: LightningModule, *callbacks: Callback) -> None:
    trainer(*callbacks).fit(fitted, batches(RANK))


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


PLATEAUS = ("distill", "mutual")


class Rates(Callback):
    """Notes the losses in validation and the learning rates of every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        losses = [float(value) for name, value in sorted(trainer.callback_metrics.items()) if name.endswith("val_loss")]
        self.seen.append([*losses, *(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers)])


def plateau_module(kind: str) -> LightningModule:
    """A module whose learning rates follow its losses in validation."""
    plateau = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)  # noqa: E731
    steep = lambda parameters: torch.optim.SGD(parameters, lr=2.0)  # noqa: E731
    if kind == "mutual":
        return MutualLearning([Mlp(5), Mlp(7, seed=1)], optimizer=steep, lr_scheduler=plateau)
    return DistillModule(Mlp(5), Mlp(7, seed=1), optimizer=steep, lr_scheduler=plateau, log=False)


def validation(rank: int | None) -> DataLoader:
    """Rows to validate on: those of a process, of which the second has fewer, or all."""
    parts = (range(7), range(7, 10))
    return DataLoader(Subset(dataset(10, seed=3), range(10) if rank is None else parts[rank]), batch_size=3)


def plateaus(folder: Path) -> None:
    ended = {}
    for kind in PLATEAUS:
        rates = Rates()
        run = trainer(rates)
        run.fit_loop.max_epochs = 6
        run.fit(plateau_module(kind), batches(RANK), validation(RANK))
        ended[kind] = rates.seen
    (folder / f"plateaus{RANK}.json").write_text(json.dumps(ended))


class KeepsTheFirstEpoch(Callback):
    """Copies the folder of a chain as it is after the first epoch of the second stage."""

    fits = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        KeepsTheFirstEpoch.fits += trainer.current_epoch == 0
        stopped = self.folder.parent / "stopped"
        if KeepsTheFirstEpoch.fits == 2 and trainer.current_epoch == 1 and RANK == 0:
            shutil.copytree(self.folder, stopped)
        trainer.strategy.barrier()


def chained(folder: Path, *callbacks: Callback) -> dict[str, object]:
    """The three networks of a chain after their training."""

    def make_trainer() -> Trainer:
        torch.manual_seed(7 + RANK)  # the processes are seeded differently
        return trainer(*callbacks)

    networks = [Mlp(9, seed=3), Normalized(seed=2), Normalized(seed=1)]
    student = assistant_chain(
        networks,
        [LogitsDistillation(), FeatureDistillation("body", "body")],
        trainer=make_trainer,
        folder=folder,
        train_dataloaders=batches(RANK),
        optimizer=sgd,
        validate=False,
    )
    assert student is networks[2]
    return {f"{index}.{key}": value.tolist() for index in (1, 2) for key, value in networks[index].state_dict().items()}


def chain(folder: Path) -> None:
    written: list[str] = []
    save = TorchCheckpointIO.save_checkpoint

    def noted(self: TorchCheckpointIO, checkpoint: Any, path: Any, **settings: Any) -> None:
        written.append("/".join(Path(path).parts[-3:]))
        save(self, checkpoint, path, **settings)

    TorchCheckpointIO.save_checkpoint = noted
    whole = chained(folder / "whole", KeepsTheFirstEpoch(folder / "whole"))
    resumed = chained(folder / "stopped")
    values = {"whole": whole, "resumed": resumed, "written": written}
    (folder / f"chain{RANK}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    run_as_process({"mutual": mutual, "plateaus": plateaus, "average": average, "chain": chain})
