"""The script that two processes run for test_distributed.py; it writes the results of each scenario as JSON.

``python two_processes.py pair FOLDER``, started twice with LOCAL_RANK set, runs DDP and FSDP2.
``python two_processes.py spawn FOLDER``, started once, lets Lightning spawn the two processes.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from plain_trainer import PLAIN
from processes import SECONDS, run_as_process
from tiny import Classifier, Mlp, ValidatedClassifier, dataset
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation

ROWS, GLOBAL_BATCH, SHARES = 48, 8, (range(7), range(7, 13))  # SHARES: which validation rows each process sees
QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu", "devices": 2, "log_every_n_steps": 1}


class Spare(Mlp):
    """A student with a layer that no forward uses."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__(width, seed)
        self.spare = nn.Linear(2, 2)


class Sharded(Classifier):
    """A module that shards its student when the strategy asks it to."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.model.body, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class EveryOther(Classifier):
    """A user's module that distils the feature on even steps only, and nothing on every fourth."""

    def on_train_batch_start(self, batch, batch_idx):
        logits, feature = self.callback.terms
        feature.weight = 0.0 if batch_idx % 2 else 2.0
        logits.weight = 0.0 if batch_idx % 4 == 3 else 0.5


class Start(Callback):
    """Notes the adapters before the first step, and what DDP looks after."""

    def __init__(self, distill: DistillCallback, folder: Path | None) -> None:
        self.distill, self.folder, self.adapters, self.parameters = distill, folder, None, []

    def on_before_backward(self, trainer, pl_module, loss):
        if self.adapters is None:
            self.adapters = adapters(self.distill)
            if self.folder is not None and trainer.is_global_zero:  # a spawned process returns nothing to its parent
                (self.folder / "start.json").write_text(json.dumps(self.adapters))
            self.parameters = [name for name, _ in trainer.strategy.model.named_parameters()]


def adapters(callback: DistillCallback) -> dict[str, Any]:
    saved = callback.adapter_state().get("adapters", {})
    return {f"{term}.{key}": value.tolist() for term, state in saved.items() for key, value in state.items()}


def full(parameter: torch.Tensor) -> Any:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().tolist()


def terms() -> list[Any]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


class InOrder(LightningDataModule):
    """Training rows in order, every second one on each process; Lightning by itself would shuffle them."""

    def train_dataloader(self) -> DataLoader:
        sampler = DistributedSampler(dataset(ROWS), num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset(ROWS), batch_size=GLOBAL_BATCH // 2, sampler=sampler)


def fit(
    module: Classifier, strategy: Any, steps: int = 4, folder: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """One run, and what it ended with on this process."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(100 + rank)  # adapters drawn on each process by itself would differ
    callback = DistillCallback(Mlp(7, seed=1), terms(), student="model")
    module.callback = callback
    start = Start(callback, folder)
    trainer = Trainer(callbacks=[callback, start], strategy=strategy, max_steps=steps, **QUIET, **settings)
    trainer.fit(module, datamodule=InOrder())
    return {
        "student": {name: full(parameter) for name, parameter in module.named_parameters()},
        "start": start.adapters,
        "adapters": adapters(callback),
        "seen_by_the_strategy": start.parameters,
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def bytes_sent(distilled: bool) -> dict[str, int]:
    """Bytes through the process group in a run of two steps, by kind of collective."""
    callback = DistillCallback(Mlp(4096, seed=1), terms(), student="model", log=False)
    trainer = Trainer(callbacks=callback if distilled else None, strategy=ddp(False), max_steps=2, **QUIET)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        trainer.fit(Classifier(), datamodule=InOrder())
    sent: Counter[str] = Counter()
    for event in profile.events():
        if event.name.startswith("gloo:"):
            sent[event.name] += sum(4 * torch.Size(shape).numel() for shape in event.input_shapes)
    return dict(sent)


def agreement(rank: int) -> dict[str, Any]:
    """The logged agreement, where the two processes see 7 and 6 validation rows in batches of 4."""
    callback = DistillCallback(Mlp(7, seed=1), terms(), student="model")
    trainer = Trainer(
        callbacks=callback,
        strategy=ddp(False),
        max_epochs=1,
        limit_train_batches=4,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **QUIET,
    )
    module = ValidatedClassifier()
    validation = DataLoader(Subset(dataset(13, seed=9), SHARES[rank]), batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")  # the module's own val_loss
        trainer.fit(module, DataLoader(dataset(ROWS), batch_size=4), validation)
    student = {name: full(parameter) for name, parameter in module.model.named_parameters()}
    return {"logged": float(trainer.callback_metrics["distill/val_teacher_agreement"]), "student": student}


def different_shapes(rank: int) -> str:
    """The error where the students of the two processes differ in width, in a loop written by hand."""
    student = Mlp(5 + rank)
    distiller = Distiller(student, Mlp(7), FeatureDistillation("body", "body"))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.follow(optimizer)
    with distiller:
        with distiller.record():
            task_loss = student(dataset(4).tensors[0]).mean()
        distiller.total(task_loss).backward()
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return "no error"


class Plateau(Classifier):
    """A module whose learning rate follows the loss of the steps, or of the epochs."""

    interval = "step"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.02)
        watched = {"scheduler": scheduler, "monitor": "distill/loss", "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": watched}


def plateau(interval: str) -> Any:
    """The learning rate at the end on this process, or the error."""
    module = Plateau()
    module.interval = interval
    callback = DistillCallback(Mlp(7, seed=1), student="model")
    trainer = Trainer(callbacks=callback, strategy=ddp(False), max_epochs=3, **QUIET)
    try:
        trainer.fit(module, datamodule=InOrder())
    except MisconfigurationException as error:
        return str(error)
    return trainer.optimizers[0].param_groups[0]["lr"]


def ddp(find_unused: bool) -> DDPStrategy:
    return DDPStrategy(
        find_unused_parameters=find_unused, process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2)
    )


def pair(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    results: dict[str, Any] = {
        "ddp": fit(Classifier(), ddp(False)),
        "ddp_accumulating": fit(Classifier(), ddp(False), accumulate_grad_batches=2, steps=3),
        "ddp_find_unused": fit(Classifier(Spare(5)), ddp(True)),
        "ddp_some_steps": fit(EveryOther(), ddp(False), steps=6),
        "ddp_some_steps_accumulating": fit(EveryOther(), ddp(False), steps=3, accumulate_grad_batches=2),
        "ddp_clipped": fit(Classifier(), ddp(False), gradient_clip_val=0.1),
        "plain_bytes": bytes_sent(False),
        "bytes": bytes_sent(True),
        "agreement": agreement(rank),
        "different_shapes": different_shapes(rank),
        "plateau": {interval: plateau(interval) for interval in ("step", "epoch")},
    }
    sharding = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        timeout=timedelta(seconds=SECONDS // 2),
    )
    if hasattr(torch.cpu.Stream, "record_event"):  # FSDP2 of torch 2.6 does not run on the CPU
        results["fsdp"] = fit(Sharded(), sharding)
    (folder / f"pair{rank}.json").write_text(json.dumps(results))


def spawn(folder: Path) -> None:
    temporary = Path(tempfile.gettempdir())
    before = set(temporary.glob("lightning_distill-*"))
    ended = fit(Classifier(), "ddp_spawn", folder=folder)
    ended["start_from_children"] = json.loads((folder / "start.json").read_text())
    ended["left_over"] = [str(path) for path in set(temporary.glob("lightning_distill-*")) - before]
    (folder / "spawn.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    run_as_process({"pair": pair, "spawn": spawn})
