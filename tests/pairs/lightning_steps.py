"""Situations of the pairs: manners of a training step, and neighbours that wrap it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from device import DEVICE
from lightning.pytorch import Callback, Trainer
from pairs.by_hand import asked
from pairs.lightning_cell import Cell, Module, close
from pairs.lightning_table import BATCH, FEATURES, ROWS
from tiny import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback

# Manners of a step ---------------------------------------------------------------------------------------------------


class Manual(Module):
    """Manual optimization, distilled in every step."""

    def __init__(self, feature: str, distill: DistillCallback, model: nn.Module | None = None) -> None:
        super().__init__(feature, model)
        self.automatic_optimization = False
        self.distill = [distill]  # in a list: a module may hold the callback, but need not

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.task(batch)
        self.manual_backward(loss + self.distill[0].loss())
        optimizer.step()


def manual_optimization(cell: Cell) -> None:
    distill = cell.callback()
    module = Manual(cell.name, distill)
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps(), weighs_task=False), watch, distill, module)


class EveryOther(Manual):
    """Distils every second step only, from the second on."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            super().training_step(batch, batch_idx)
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.task(batch))
        optimizer.step()


def manual_steps_without_the_loss(cell: Cell) -> None:
    distill = cell.callback()
    module = EveryOther(cell.name, distill)
    _, watch = cell.fit(module, distill)
    hand = cell.hand(watch).train(cell.steps(), weighs_task=False, distils=lambda number: number % 2 == 1)
    cell.equal(hand, watch, distill, module)


class Adversarial(Manual):
    """A second network learns from the student's outputs, by an optimizer of its own, before each of its steps."""

    def __init__(self, feature: str, distill: DistillCallback) -> None:
        super().__init__(feature, distill)
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, optimizer = self.optimizers()
        self.toggle_optimizer(critic)
        self.critic(self.model(batch["x"])).mean().backward()
        critic.step()
        critic.zero_grad()
        self.untoggle_optimizer(critic)
        optimizer.zero_grad()
        loss = self.task(batch)
        count = len(FEATURES[self.feature].views)
        self.manual_backward(loss + self.distill[0].loss(slice(-count, None)))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.critic.parameters()), super().configure_optimizers()


def alternating_steps_of_two_networks(cell: Cell) -> None:
    distill = cell.callback()
    module = Adversarial(cell.name, distill)
    _, watch = cell.fit(module, distill)
    steps = cell.steps(optimizers=2)  # the Trainer counts the steps of both
    cell.equal(cell.hand(watch).train(steps, weighs_task=False), watch, distill, module)


def accumulation(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, accumulate_grad_batches=3)  # four batches: the last window has one
    hand = cell.hand(watch).train(cell.steps(accumulate=3), divide_by=3)
    cell.equal(hand, watch, distill, module)


def clipping(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, gradient_clip_val=0.05)
    cell.equal(cell.hand(watch).train(cell.steps(), clip=0.05), watch, distill, module)


class Checkpointed(Mlp):
    """Computes its features a second time in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def gradient_checkpointing(cell: Cell) -> None:
    module, distill = cell.module(Checkpointed(5)), cell.callback()
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)


def gradient_checkpointing_in_manual_optimization(cell: Cell) -> None:
    distill = cell.callback()
    module = Manual(cell.name, distill, Checkpointed(5))
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps(), weighs_task=False), watch, distill, module)


def compiled(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    module.model = torch.compile(module.model, backend="eager")
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)


def mixed_precision(cell: Cell, precision: Any = "bf16-mixed", dtype: torch.dtype = torch.bfloat16) -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, precision=precision, max_epochs=1)
    hand = cell.hand(watch).train(cell.steps((BATCH,)), autocast=dtype)
    cell.equal(hand, watch, distill, module, tolerance=2e-3)


def half_precision_of_the_other_kind(cell: Cell) -> None:
    mixed_precision(cell, "16-mixed", torch.bfloat16 if DEVICE == "cpu" else torch.float16)  # as Lightning chooses


# Neighbours ----------------------------------------------------------------------------------------------------------


def wrapped(step: Callable[..., Any], seen: list[float]) -> Callable[..., Any]:
    """A wrapper as profilers and loggers put it around a training step."""

    @functools.wraps(step)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        seen.append(loss.item())
        return loss

    return foreign


def foreign_wrapper_from_before(cell: Cell) -> None:
    module, distill, seen = cell.module(), cell.callback(), []
    module.training_step = foreign = wrapped(module.training_step, seen)
    _foreign_wrapper(cell, module, distill, seen, ())
    assert vars(module)["training_step"] is foreign


def foreign_wrapper_from_within(cell: Cell) -> None:
    module, distill, seen = cell.module(), cell.callback(), []

    class Wraps(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.training_step = wrapped(pl_module.training_step, seen)

    _foreign_wrapper(cell, module, distill, seen, [Wraps()])
    assert vars(module)["training_step"].__name__ == "training_step"


def _foreign_wrapper(cell: Cell, module: Any, distill: Any, seen: list[float], callbacks: Any) -> None:
    trainer, watch = cell.fit(module, distill, callbacks=callbacks)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    close(seen, hand.tasks)
    cell.clean(trainer, module)
    module.training_step(cell.feature.rows().batch(0, BATCH), 0)
    assert len(seen) == len(hand.tasks) + 1, "the user's wrapper works on"


def validation(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback(validate=None if cell.feature.cache is not None else True)
    rows = cell.feature.rows()
    module.val_dataloader = lambda: DataLoader(rows, 9)
    trainer, watch = cell.fit(module, distill)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    epoch = hand.losses[4:]
    close([metrics["distill/loss"]], [sum(epoch) / 4])
    close([metrics["distill/task_loss"]], [sum(hand.tasks[4:]) / 4])
    if cell.feature.cache is not None:
        assert not [key for key in metrics if key.startswith("distill/val_")]
        return
    if cell.feature.draws:
        return  # other random masks than in the loop
    total, (last,) = 0.0, cell.steps()[-1]
    hand.views = FEATURES["logits"].views  # validation calls the student once
    for start in (0, 9, 18):
        batch = rows.batch(start, 9)
        with torch.no_grad():
            total += len(batch["x"]) * hand.distillation(batch, last[1])[1].item()
    close([metrics["distill/val_distillation_loss"]], [total / ROWS])
    key = "distill/val_teacher_agreement"
    assert (key in metrics) == any(term.compares_class_scores for term in distill.terms)
    if cell.name == "logits":
        x = rows.batch(0, ROWS)["x"]
        tops = [asked(network, x)["logits"].argmax(-1) for network in (hand.student, cell.feature.teacher())]
        close([metrics[key]], [(tops[0] == tops[1]).float().mean().item()])
