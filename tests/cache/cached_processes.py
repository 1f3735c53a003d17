"""The two processes of test_cached_distributed.py; run as a script, it writes the result of each run as JSON.

``python cached_processes.py cached FOLDER``, started twice with LOCAL_RANK set, trains with a live teacher and from its
cache, each time with the shuffled sampler that Lightning puts into the data loader.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from cache_nets import Augmented, Module, Views, network, table, trained
from lightning.pytorch.strategies import DDPStrategy
from processes import SECONDS, run_as_process
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill import LogitsDistillation, TeacherCache

EPOCHS = 3


class Numbered(Dataset[Any]):
    """Data whose labels are their places, so that a run tells which items it has seen."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index][0], index


class Labelled(Module):
    """The labels of the samples, from the places."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sampler = type(self.trainer.train_dataloader.sampler).__name__
        x, places = batch
        self.places = [*getattr(self, "places", []), places.tolist()]
        return super().training_step([x, places % 10], batch_idx)


def run(data: Any, teacher: Any, **loading: Any) -> dict[str, Any]:
    module = Labelled(data, batch_size=4, **loading)
    if isinstance(data, Views):
        data.module = module
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2))
    trained(module, teacher, [LogitsDistillation()], epochs=EPOCHS, strategy=strategy, devices=2)
    return {
        "weights": [parameter.tolist() for parameter in module.model.parameters()],
        "places": module.places,
        "sampler": module.sampler,
    }


def cached(folder: Path) -> None:
    rank, teacher = int(os.environ["LOCAL_RANK"]), network(32)
    plain, augmented = Numbered(table()), Numbered(Augmented())
    # each process has its own folder; other tests cover building together
    whole = TeacherCache.build(teacher, plain, folder / f"whole{rank}", dtype="float32", progress=False)
    seeds = {"views": 2, "transform_seed": 7}
    views = TeacherCache.build(teacher, augmented, folder / f"views{rank}", dtype="float32", progress=False, **seeds)
    results = {
        "live": run(plain, teacher),
        "cached": run(plain, whole),
        "views_live": run(Views(views.attach(augmented), 2), teacher, num_workers=2),
        "views_cached": run(augmented, views, num_workers=2),
    }
    (folder / f"cached{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"cached": cached})
