"""The script that two processes run for test_token_windows.py: unequal numbers of tokens on each, DDP and FSDP2."""

from __future__ import annotations

import copy
import json
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from cross_tokenizer_models import Module, rows, term
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from processes import SECONDS, run_as_process
from token_nets import LENGTHS, QUIET, CausalModel, LanguageModule, Sequences
from torch.utils.data import DataLoader, Subset

from lightning_distill import (
    DistillCallback,
    Distiller,
    FusedLinearDistillation,
    SequenceDistillation,
    SoftTargetLoss,
)


class Sharded(LanguageModule):
    """Shards the head, then everything else."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.model.lm_head, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Relabelled(LanguageModule):
    """Names the labels after they were loaded, on the second process only, so that they cannot be counted there."""

    def on_before_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        return {**batch, "answers": batch["labels"]}


class Answers(Sequences):
    """Sequences whose labels have another name."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {**row, "answers": row["labels"]}


def full(module: torch.nn.Module) -> dict[str, Any]:
    values = {}
    for name, parameter in module.named_parameters():
        values[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().tolist()
    return values


def rows_of(rank: int, micro_batch: int, data: Sequences | None = None) -> Subset[Any]:
    """The rows of a process: of every pair of micro-batches the first or the second."""
    rows = list(range(len(LENGTHS)))
    own = [row for row in rows if row // micro_batch % 2 == rank]
    return Subset(data or Sequences(), own)


def fit(
    module: LanguageModule, strategy: Any, rank: int, accumulate: int, term: Any = None, data: Any = None
) -> dict[str, Any]:
    size = 8 // (2 * accumulate)
    callback = DistillCallback(CausalModel(7, seed=1), term or SequenceDistillation(weight=2.0))
    trainer = Trainer(
        callbacks=callback,
        strategy=strategy,
        devices=2,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        **{**QUIET, "accelerator": "cpu"},
    )
    trainer.fit(module, DataLoader(rows_of(rank, size, data), batch_size=size))
    return full(module.model)


class Skipping(LanguageModule):
    """Makes no loss of its own."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.model(batch["input_ids"], batch["attention_mask"])


class SkippingSharded(Sharded):
    """The same, sharded."""

    training_step = Skipping.training_step


def fused() -> FusedLinearDistillation:
    return FusedLinearDistillation(weight=2.0)


def own_loop_without_logits(rank: int, find_unused: bool) -> dict[str, Any]:
    """A loop of the user's own with DDP around the student, whose head is skipped."""
    student = CausalModel()
    wrapped = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    term = FusedLinearDistillation("module.lm_head", weight=2.0)
    with Distiller(wrapped, CausalModel(7, seed=1), term) as distiller:
        for batch in DataLoader(rows_of(rank, 4), batch_size=4):
            optimizer.zero_grad()
            with distiller.window([batch]):
                with distiller.record(batch=batch):
                    wrapped(batch["input_ids"], batch["attention_mask"])
                distiller.loss(batch).backward()
            optimizer.step()
    return full(student)


def sharded_capped(rank: int) -> float:
    """The largest difference from dense gradients of a sharded Gemma 2, whose logits are capped, and its teacher."""
    from language_models import dense_loss, language_batch, language_model
    from torch.distributed.fsdp import fully_shard

    student, teacher = language_model("gemma2"), language_model("gemma2", 24, 1, cap=0.9, tied=False).eval()
    reference = copy.deepcopy(student)
    for number in range(2):
        (dense_loss(reference, teacher, *language_batch(number=number)) / 2).backward()
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)
    loss = SoftTargetLoss(temperature=2.0)
    term = FusedLinearDistillation(loss=loss, weight=0.7, task_weight=0.3)
    distiller = Distiller(student, teacher, term)
    inputs, labels = language_batch(number=rank)
    for _ in range(2):
        student.zero_grad()
        with distiller.record(batch={"labels": labels}):
            student(**inputs)
        distiller.loss({"labels": labels}).backward()
    pairs = zip(student.parameters(), reference.parameters(), strict=True)
    return max(float((parameter.grad.full_tensor() - other.grad).abs().max()) for parameter, other in pairs)


def two_tokenizers() -> dict[str, Any]:
    """One optimizer step of two micro-batches on each process, which takes every other row."""
    made, module = term("uld"), Module(CausalModel(vocabulary=300))
    callback = DistillCallback(CausalModel(7, seed=1, vocabulary=420), made, task_weight=0.0)
    settings = {"strategy": ddp(), "devices": 2, "max_epochs": 1, "accumulate_grad_batches": 2}
    Trainer(callbacks=callback, **settings, **QUIET).fit(module, DataLoader(rows(), 2, collate_fn=made.collate()))
    return full(module.model)


def ddp() -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2))


def fsdp() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        timeout=timedelta(seconds=SECONDS // 2),
    )


def own_loop(rank: int) -> dict[str, Any]:
    """A loop of the user's own with DDP: three optimizer steps of two micro-batches on each process."""
    student = CausalModel()
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    batches = list(DataLoader(rows_of(rank, 2), batch_size=2))
    with Distiller(wrapped, CausalModel(7, seed=1), SequenceDistillation(weight=2.0)) as distiller:
        for start in range(0, len(batches), 2):
            window = batches[start : start + 2]
            optimizer.zero_grad()
            with distiller.window(window):
                for batch in window:
                    with distiller.record():
                        logits = wrapped(batch["input_ids"], batch["attention_mask"])["logits"]
                    task_loss = logits[:, 0].square().mean()
                    (distiller.total(task_loss, batch) / len(window)).backward()
            optimizer.step()
    return full(student)


def pair(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    results: dict[str, Any] = {
        "ddp": fit(LanguageModule(), ddp(), rank, 1),
        "ddp_accumulating": fit(LanguageModule(), ddp(), rank, 4),
        "ddp_sequences": fit(LanguageModule(), ddp(), rank, 2, SequenceDistillation(weight=2.0, normalize="sequences")),
        "own_loop": own_loop(rank),
        "two_tokenizers": two_tokenizers(),
    }
    results |= {
        "skipping": fit(Skipping(), ddp(), rank, 1, fused()),
        "skipping_accumulating": fit(Skipping(), ddp(), rank, 2, fused()),
        "own_loop_skipping": own_loop_without_logits(rank, False),
        "own_loop_skipping_unused": own_loop_without_logits(rank, True),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        relabelled = SequenceDistillation(weight=2.0, labels="answers")
        results["relabelled"] = fit(Relabelled(), ddp(), rank, 2, relabelled, None if rank else Answers())
    results["warnings"] = [str(warning.message) for warning in caught if "micro-batch" in str(warning.message)]
    if hasattr(torch.cpu.Stream, "record_event"):  # FSDP2 of torch 2.6 does not run on the CPU
        results["fsdp"] = fit(Sharded(), fsdp(), rank, 2)
        results["skipping_fsdp"] = fit(SkippingSharded(), fsdp(), rank, 2, fused())
        results["sharded_capped"] = sharded_capped(rank)
    (folder / f"pair{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"pair": pair})
