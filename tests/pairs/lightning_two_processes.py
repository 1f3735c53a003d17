"""The script that two processes run for test_pairs_distributed.py: many cases in one pair, each written out as JSON.

``python lightning_two_processes.py pair FOLDER``, started twice with LOCAL_RANK set.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from pairs.lightning_cell import QUIET, Module, Watch, average, learned
from pairs.lightning_steps import Manual
from pairs.lightning_table import BATCH, FEATURES, MEASURED, ROWS
from pairs.lightning_teachers import OTHER_TEACHERS
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback

RANK = int(os.environ.get("LOCAL_RANK", "0"))
HALF = BATCH // 2


def rests(rank: int, batch: int) -> bool:
    """The first process rests in the second step, the second in the first and the fourth."""
    return batch in ((1,) if rank == 0 else (0, 3))


class Shared:
    """Each process has its half of every batch."""

    def train_dataloader(self: Any) -> DataLoader[Any]:
        batches = [range(start, start + HALF) for start in range(RANK * HALF, ROWS, BATCH)]
        return DataLoader(FEATURES[self.feature].rows(), batch_sampler=[list(batch) for batch in batches])


class Pair(Shared, Module):
    """The module of the table."""


class PairManual(Shared, Manual):
    """With manual optimization; one process or the other leaves `loss()` out."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.task(batch)
        if not rests(RANK, batch_idx):
            loss = loss + self.distill[0].loss()
        self.manual_backward(loss)
        optimizer.step()


class Sharded(Pair):
    """Shards its student when the strategy asks for it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.model.body, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Skips(Pair):
    """Returns no loss in the second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class Rests(Callback):
    """Sets the weights to 0 on one process or the other, before the step."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill, self.weights = distill, [term.weight for term in distill.terms]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for term, weight in zip(self.distill.terms, self.weights, strict=True):
            term.weight = 0.0 if rests(RANK, batch_idx) else weight


class SavesAndStops(Callback):
    """Stops in the middle of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def ddp(unused: bool = False) -> DDPStrategy:
    return DDPStrategy(find_unused_parameters=unused, process_group_backend="gloo", timeout=timedelta(seconds=60))


def fsdp() -> ModelParallelStrategy:
    timeout = timedelta(seconds=60)
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=timeout
    )


def full(parameter: Any) -> Any:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().tolist()


class Runs:
    """The runs of one feature.

    Args:
        name: The feature's name.
        folder: For checkpoints and caches; the processes share it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def callback(self) -> DistillCallback:
        feature = FEATURES[self.name]
        torch.manual_seed(7 + RANK)  # the processes are seeded differently
        return DistillCallback(feature.make_teacher(self.folder), feature.terms(), student="model", **feature.settings)

    def fit(
        self, module: Any, distill: DistillCallback, strategy: Any, *callbacks: Callback, **settings: Any
    ) -> dict[str, Any]:
        watch = Watch(distill)
        ckpt_path = settings.pop("ckpt_path", None)
        trainer_settings = {
            "max_epochs": 2,
            "use_distributed_sampler": False,
            **QUIET,
            "accelerator": "cpu",
            "devices": 2,
            **settings,
        }
        trainer = Trainer(callbacks=[distill, *callbacks, watch], strategy=strategy, **trainer_settings)
        trainer.fit(module, ckpt_path=ckpt_path)
        return {
            "losses": watch.losses,
            "start": None if watch.start is None else {key: value.tolist() for key, value in watch.start.items()},
            "student": {name: full(value) for name, value in module.model.named_parameters()},
            "learned": {key: value.tolist() for key, value in learned(distill).items()},
            "average": {key: value.tolist() for key, value in average(distill).items()},
            "batches": [batch["x"].tolist() for batch in watch.batches],
        }

    def plain(self) -> dict[str, Any]:
        return self.fit(Pair(self.name), self.callback(), ddp())

    def unused(self) -> dict[str, Any]:
        return self.fit(Pair(self.name), self.callback(), ddp(unused=True))

    def accumulation(self) -> dict[str, Any]:
        return self.fit(Pair(self.name), self.callback(), ddp(), accumulate_grad_batches=3)

    def resting(self) -> dict[str, Any]:
        distill = self.callback()
        return self.fit(Pair(self.name), distill, ddp(), Rests(distill), max_epochs=1)

    def resting_and_accumulating(self) -> dict[str, Any]:
        distill = self.callback()
        return self.fit(Pair(self.name), distill, ddp(), Rests(distill), max_epochs=1, accumulate_grad_batches=2)

    def manual(self) -> dict[str, Any]:
        distill = self.callback()
        return self.fit(PairManual(self.name, distill), distill, ddp(), max_epochs=1)

    def resumed(self) -> dict[str, Any]:
        path = self.folder / f"{list(FEATURES).index(self.name)}.ckpt"
        first = self.fit(Pair(self.name), self.callback(), ddp(), SavesAndStops(path))
        return {**self.fit(Pair(self.name), self.callback(), ddp(), ckpt_path=path), "start": first["start"]}

    def sharded(self) -> dict[str, Any]:
        return self.fit(Sharded(self.name), self.callback(), fsdp())

    def sharded_and_resting(self) -> dict[str, Any]:
        distill = self.callback()
        return self.fit(Sharded(self.name), distill, fsdp(), Rests(distill), max_epochs=1)

    def sharded_average(self) -> dict[str, Any]:
        try:
            self.fit(Sharded(self.name), self.callback(), fsdp())
        except ValueError as error:
            return {"error": str(error)}
        return {"error": None}

    def skipping(self) -> dict[str, Any]:
        try:
            self.fit(Skips(self.name), self.callback(), ddp())
        except RuntimeError as error:
            return {"error": str(error)}
        return {"error": None}


CONSTANT = ("logits", "adapter", "several teachers", "variational information", "self-distillation", "cache", "labels")
CASES: dict[str, tuple[str, ...]] = {
    "plain": tuple(name for name in FEATURES if name not in MEASURED),
    "unused": ("adapter", "self-distillation"),
    "accumulation": ("adapter", "cache", "temperature over the fraction", "variational information"),
    "resting": (*CONSTANT, "moving average", "average and network", "queue", "memories"),
    "resting_and_accumulating": ("adapter", "several teachers", "self-distillation"),
    "manual": (*CONSTANT, "moving average", "queue", "memories"),
    "resumed": (
        "adapter",
        "adapter with a weight over the fraction",
        "cache",
        "variational information",
        "factors",
        "moving average",
        "average and network",
        "cache and network",
        "cache and curriculum temperature",
        "queue",
        "memories",
        "memories of two teachers",
        "weighted teachers",
        "mixture of probabilities",
        "route",
        "function",
        *OTHER_TEACHERS,
    ),
    "sharded": ("logits", "adapter", "several teachers", "variational information", "self-distillation", "cache"),
    "sharded_and_resting": ("adapter", "self-distillation", "queue", "memories"),
    "sharded_average": ("moving average",),
    "skipping": ("adapter",),  # last: Lightning ends the run of both processes
}


def pair(folder: Path) -> None:
    results: dict[str, Any] = {}
    if RANK == 0:  # before the other process opens them
        for feature in FEATURES.values():
            if feature.cache is not None:
                feature.make_teacher(folder)
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        time.sleep(0.05)
    for case, features in CASES.items():
        for name in features:
            faulthandler.dump_traceback_later(40, exit=True)  # a hang ends with the stack of every thread
            print(case, name, flush=True)
            results[f"{case}/{name}"] = getattr(Runs(name, folder), case)()
    (folder / f"pair{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pair(Path(sys.argv[2]))
