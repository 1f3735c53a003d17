"""The script that two processes run for test_on_policy_runs.py: texts of other lengths on each, DDP and FSDP2."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from language_models import language_model
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from on_policy_by_hand import Answers, Module
from processes import SECONDS, run_as_process
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_distill import DistillCallback, OnPolicyDistillation

ENDS = list(range(2, 60))  # so many that texts end early, in other steps on each process


class Rank(Module):
    """Notes which batches are text of the student."""

    own: list[bool]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.own = [*getattr(self, "own", []), self.trainer.callbacks[0].own_text]  # type: ignore[attr-defined]
        return super().training_step(batch, batch_idx)


class Sharded(Rank):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def fit(module: Rank, strategy: Any, rank: int, accumulate: int = 1, **settings: Any) -> dict[str, Any]:
    on_policy = OnPolicyDistillation(0.5, max_new_tokens=7, temperature=2.0, eos_token_id=ENDS, seed=7, **settings)
    callback = DistillCallback(language_model("llama", 24, 1), on_policy=on_policy)
    trainer = Trainer(
        callbacks=callback,
        strategy=strategy,
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    rows = [row for row in range(12) if row // 2 % 2 == rank] + [row for row in range(12) if row // 2 % 2 == 1 - rank]
    trainer.fit(module, DataLoader(Subset(Answers(), rows), batch_size=2))
    state = {}
    for name, parameter in module.model.named_parameters():
        state[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().tolist()
    batches = [{name: value.tolist() for name, value in batch.items()} for batch in module.seen]
    return {"own": module.own, "batches": batches, "state": state}


def ddp() -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2))


def fsdp() -> ModelParallelStrategy:
    timeout = timedelta(seconds=SECONDS // 2)
    return ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=timeout)


def refused(rank: int) -> str:
    """The error of a function of the user under FSDP2."""
    try:
        fit(Sharded(language_model("llama")), fsdp(), rank, generate=lambda student, input_ids, **rest: input_ids)
    except ValueError as error:
        return str(error)
    return ""


def pair(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    results: dict[str, Any] = {
        "ddp": fit(Rank(language_model("llama")), ddp(), rank),
        "ddp_accumulating": fit(Rank(language_model("llama")), ddp(), rank, 2),
    }
    if hasattr(torch.cpu.Stream, "record_event"):  # FSDP2 of torch 2.6 does not run on the CPU
        results["fsdp"] = fit(Sharded(language_model("llama")), fsdp(), rank)
        results["fsdp_accumulating"] = fit(Sharded(language_model("llama")), fsdp(), rank, 2)
        results["refused"] = refused(rank)
    (folder / f"pair{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"pair": pair})
