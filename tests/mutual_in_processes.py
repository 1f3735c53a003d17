"""The script that two processes run for test_mutual_learning.py: students that teach each other under DDP.

``python mutual_in_processes.py mutual FOLDER``, started twice with LOCAL_RANK set.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import run_as_process
from tiny import Mlp, dataset
from torch.utils.data import DataLoader

from lightning_distill import MutualLearning

RANK = int(os.environ.get("LOCAL_RANK", "0"))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def module() -> MutualLearning:
    return MutualLearning([Mlp(5), Mlp(7, seed=1)], optimizer=sgd)


def batches(rank: int) -> DataLoader:
    """This process's half of every batch of eight rows."""
    halves = [list(range(start + 4 * rank, start + 4 * rank + 4)) for start in (0, 8)]
    return DataLoader(dataset(16), batch_sampler=halves)


def mutual(folder: Path) -> None:
    fitted = module()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    settings = {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "use_distributed_sampler": False, **QUIET}
    Trainer(strategy=strategy, **settings).fit(fitted, batches(RANK))
    values = {name: value.tolist() for name, value in fitted.state_dict().items()}
    (folder / f"mutual{RANK}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    run_as_process({"mutual": mutual})
