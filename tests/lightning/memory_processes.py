"""The script that two processes run for test_contrast_processes.py: each writes what it has after a training."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import SECONDS, run_as_process
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import ContrastiveRepresentationLoss, DistillCallback, FeatureDistillation

ROWS = 16
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Embedder(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.rows = Embedder(3, seed=1), set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx:  # a process rests in its first step
            self.rows |= set(batch[1].tolist())
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RestsAtFirst(Callback):
    """Leaves the term out of the first process's first step: its parts are made from the other's shapes."""

    def __init__(self, term: Any) -> None:
        self.term, self.before = term, {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.term.weight = 0.0 if RANK == 0 and batch_idx == 0 else 1.0
        if batch_idx == 1:
            self.before = {name: value.tolist() for name, value in self.term.state_dict().items()}


def pair(folder: Path) -> None:
    torch.manual_seed(3 + RANK)  # the processes are seeded differently
    loss = ContrastiveRepresentationLoss(size=ROWS, width=4, negatives=5)
    distill = DistillCallback(
        Embedder(5, seed=2), FeatureDistillation("body", "body", loss, index=1), student="network"
    )
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    rests = RestsAtFirst(distill.terms[0])
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2)),
        callbacks=[distill, rests],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(ROWS)), batch_size=2))
    learned = distill.adapter_state()["adapters"]["body"]
    results = {
        "student": module.network.body.weight.tolist(),
        "before": rests.before,
        "learned": {name: value.tolist() for name, value in learned.items()},
        "rows": sorted(module.rows),
    }
    (folder / f"pair{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"pair": pair})
