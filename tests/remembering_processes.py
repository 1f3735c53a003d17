"""The script that two processes run for test_remembering_processes.py: each writes what it has after every case."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import SECONDS, run_as_process
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    ContrastiveRepresentationLoss,
    DistillationTerm,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    QueueSimilarityLoss,
)

ROWS, QUEUE, WIDTH = 16, 6, 4
RANK = int(os.environ.get("LOCAL_RANK", "0"))
# The rows of each step, of the first process and of the second: of unequal number, with a row that both have (5).
STEPS = ([[0, 5, 2], [5]], [[1, 3], []], [[7, 8], [9, 10]])


class Embedder(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def inputs(rows: list[int], rank: int) -> Tensor:
    """The inputs of rows; each process sees another augmentation of them."""
    every = torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(0))
    return every[rank][rows]


def terms(**settings: Any) -> list[DistillationTerm]:
    contrast = ContrastiveRepresentationLoss(size=ROWS, **{"width": WIDTH, "negatives": ROWS, **settings})
    return [
        FeatureDistillation("body", "body", QueueSimilarityLoss(size=QUEUE), name="queue", mask="counts"),
        FeatureDistillation("body", "body", contrast, name="contrast", index="row", mask="counts"),
    ]


def batch_of(rows: list[int], rank: int = RANK, counts: list[bool] | None = None) -> dict[str, Tensor]:
    return {
        "x": inputs(rows, rank),
        "row": torch.tensor(rows, dtype=torch.int64),
        "counts": torch.tensor([True] * len(rows) if counts is None else counts),
    }


def state_of(distiller: Any) -> dict[str, Any]:
    adapters = (distiller.state_dict() if isinstance(distiller, Distiller) else distiller.adapter_state())["adapters"]
    return {f"{term}.{name}": value.tolist() for term, values in adapters.items() for name, value in values.items()}


class Loop:
    """A plain loop with a Distiller; the student is wrapped in DDP."""

    def __init__(self, lr: float, state: Any = None, **settings: Any) -> None:
        torch.manual_seed(3)
        self.student, self.teacher = Embedder(3, seed=1), Embedder(5, seed=2)
        self.wrapped = DistributedDataParallel(self.student)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=lr, momentum=0.9)
        self.distiller = Distiller(self.student, self.teacher, terms(**settings), task_weight=0.5)
        if state is not None:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.distiller.load_state_dict(state["distiller"])
        self.distiller.follow(self.optimizer)

    def backward(self, batch: dict[str, Tensor]) -> float:
        for term, weight in zip(self.distiller.terms, (1.0, 1.0), strict=True):
            term.weight = weight if len(batch["x"]) else 0.0  # a process may leave the terms out
        x = batch["x"] if len(batch["x"]) else torch.ones(1, 4)
        with self.distiller.record():
            task = self.wrapped(x).square().mean()
        total = self.distiller.total(task, batch)
        total.backward()
        return total.item()

    def step(self, *batches: dict[str, Tensor]) -> list[float]:
        losses = [self.backward(batch) for batch in batches]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "distiller": self.distiller.state_dict(),
        }


def unequal() -> Any:
    """Nothing learns, so that the embeddings of every row are known."""
    loop, states = Loop(lr=0.0), []
    for rows in STEPS:
        loop.backward(batch_of(rows[RANK]))
        if not states:
            states.append(state_of(loop.distiller))
        loop.optimizer.step()
        states.append(state_of(loop.distiller))
    return states


def masked() -> Any:
    loop = Loop(lr=0.0)
    loop.backward(batch_of([3, 4], counts=[True, False] if RANK else [False, False]))
    before = state_of(loop.distiller)
    loop.optimizer.step()
    return [before, state_of(loop.distiller)]


def accumulated() -> Any:
    loop = Loop(lr=0.0)
    loop.backward(batch_of([1 + RANK]))
    loop.backward(batch_of([3 + RANK]))
    before = state_of(loop.distiller)
    loop.optimizer.step()
    return [before, state_of(loop.distiller)]


def resumed(folder: Path) -> Any:
    """Four steps, and two steps after a checkpoint of the first process."""
    every = torch.randperm(ROWS, generator=torch.Generator().manual_seed(4)).view(4, 2, 2).tolist()
    ended = []
    for restarts in (False, True):
        loop = Loop(lr=0.1, negatives=3)
        for number, rows in enumerate(every):
            if restarts and number == 2:
                if RANK == 0:
                    torch.save(loop.state(), folder / "loop.pt")
                torch.distributed.barrier()
                torch.manual_seed(99 + RANK)
                loop = Loop(lr=0.1, negatives=3, state=torch.load(folder / "loop.pt", weights_only=True))
            loss = loop.step(batch_of(rows[RANK]))
        ended.append({"loss": loss, "student": loop.student.body.weight.tolist(), **state_of(loop.distiller)})
    return ended


def without_optimizer() -> Any:
    loop = Loop(lr=0.1)
    loop.distiller.close()
    with loop.distiller.record():
        task = loop.student(torch.ones(2, 4)).sum()
    try:
        loop.distiller.total(task, batch_of([1, 2]))
    except ValueError as error:
        return str(error)
    return "no error"


def fabric() -> Any:
    torch.manual_seed(3)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricDDP(process_group_backend="gloo"))
    fabric.launch()
    student = Embedder(3, seed=1)
    student, optimizer = fabric.setup(student, torch.optim.SGD(student.parameters(), lr=0.0))
    distiller = Distiller(student, Embedder(5, seed=2), terms())
    distiller.follow(optimizer)
    states = []
    for rows in STEPS[0], [[7, 8], [9, 10]]:
        batch = batch_of(rows[RANK])
        with distiller.record():
            task = student(batch["x"]).square().mean()
        fabric.backward(distiller.total(task, batch))
        if not states:
            states.append(state_of(distiller))
        optimizer.step()
        optimizer.zero_grad()
        states.append(state_of(distiller))
    return states


def by_itself() -> Any:
    torch.manual_seed(3)
    loss = QueueSimilarityLoss(size=2)
    loss.build(torch.Size((1, 4)), torch.Size((1, 4)))
    loss(inputs([1], RANK).requires_grad_(), inputs([RANK], RANK))
    return loss.queue.tolist()


class OwnTerm(DistillationTerm):
    """A term of the user's own with a loss that is built in its constructor."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.loss = QueueSimilarityLoss(size=4)
        self.loss.build(torch.Size((1, 4)), torch.Size((1, 4)))

    def forward(self, student: Any, teacher: Any, labels: Any = None) -> Tensor:
        return self.loss(student.logits, teacher.logits)


def own_term() -> Any:
    torch.manual_seed(5 + RANK)
    student, teacher = Embedder(4, seed=1), Embedder(4, seed=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(student, teacher, OwnTerm())
    distiller.follow(optimizer)
    with distiller.record():
        task = student(inputs([RANK], RANK)).sum()
    distiller.total(task).backward()
    optimizer.step()
    return distiller.terms[0].loss.queue.tolist()


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Embedder(3, seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class RestsAtFirst(Callback):
    """Leaves the terms out of the first process's first step: their parts are made from the other's shapes."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill = distill

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for term in self.distill.terms:
            term.weight = 0.0 if RANK == 0 and trainer.global_step == 0 else 1.0


def trainer_resumed(folder: Path) -> Any:
    """Two epochs of a Trainer, and the second one from a checkpoint; the data do not fill their last batch."""
    ended = []
    for first, epochs in ((None, 2), (None, 1), ("first", 2)):
        torch.manual_seed(3 + RANK)  # the processes are seeded differently
        contrast = ContrastiveRepresentationLoss(size=ROWS - 1, width=WIDTH, negatives=3)
        own_terms = [
            FeatureDistillation("body", "body", QueueSimilarityLoss(size=QUEUE), name="queue"),
            FeatureDistillation("body", "body", contrast, name="contrast", index=1),
        ]
        distill, module = DistillCallback(Embedder(5, seed=2), own_terms, student="network"), Module()
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=SECONDS // 2)),
            callbacks=[distill, RestsAtFirst(distill)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TensorDataset(inputs([*range(ROWS - 1)], 0), torch.arange(ROWS - 1))
        path = None if first is None else folder / f"{first}.ckpt"
        trainer.fit(module, DataLoader(data, batch_size=2, shuffle=False), ckpt_path=path)
        if epochs == 1:
            trainer.save_checkpoint(folder / "first.ckpt")
        else:
            ended.append({"student": module.network.body.weight.tolist(), **state_of(distill)})
    return ended


def pair(folder: Path) -> None:
    results: dict[str, Any] = {"trainer": trainer_resumed(folder)}  # first: it starts the process group
    cases: list[Callable[[], Any]] = [unequal, masked, accumulated, fabric, without_optimizer, by_itself, own_term]
    for case in cases:
        print(case.__name__, flush=True)
        results[case.__name__] = case()
    results["resumed"] = resumed(folder)
    (folder / f"pair{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_as_process({"pair": pair})
