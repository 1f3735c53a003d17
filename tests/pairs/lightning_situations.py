"""The situations of the pairs: each runs a feature's cell under a Trainer and compares it with the loop by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from pairs import lightning_copies, lightning_steps
from pairs.by_hand import mean_of, moving_average
from pairs.lightning_cell import Cell, Module, hooks, same
from pairs.lightning_table import BATCH, FEATURES, MEASURED
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import EMATeacher

Situation = Callable[[Cell], None]


def plain(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    trainer, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)
    cell.clean(trainer, module)


def teacher_in_inference_mode(cell: Cell) -> None:
    """As with a decorated ``forward``: autograd refuses to save its outputs and features."""

    def teacher() -> Any:
        made = make()
        for module in made if isinstance(made, list) else [made]:
            if isinstance(module, nn.Module) and not isinstance(module, EMATeacher):  # the student's own forward
                module.forward = torch.inference_mode()(module.forward)
        return made

    make = cell.feature.teacher
    cell.feature = dataclasses.replace(cell.feature, teacher=teacher)
    module, distill = cell.module(), cell.callback()
    trainer, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)
    cell.clean(trainer, module)


# Finders and the tuner -----------------------------------------------------------------------------------------------


def tuner_finds_the_learning_rate(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    find = lambda trainer: Tuner(trainer).lr_find(module, num_training=3, update_attr=False)  # noqa: E731
    trainer, watch = cell.fit(module, distill, before=find)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)
    cell.clean(trainer, module)


class Loads(Module):
    """Has data to validate on, which the finder of the batch size asks for."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(FEATURES[self.feature].rows(), BATCH)


def tuner_finds_the_batch_size(cell: Cell) -> None:
    module, distill = Loads(cell.name), cell.callback()
    find = lambda trainer: Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=1, init_val=3)  # noqa: E731
    trainer, watch = cell.fit(module, distill, before=find)
    size = module.batch_size
    cell.equal(cell.hand(watch).train(cell.steps((size, size))), watch, distill, module)
    cell.clean(trainer, module)


def callback_finds_the_learning_rate(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    _, watch = cell.fit(module, distill, callbacks=[finder], first=cell.even, enable_checkpointing=True)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)


def callback_finds_the_batch_size(cell: Cell) -> None:
    module, distill = Loads(cell.name), cell.callback()
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=1, init_val=3)
    _, watch = cell.fit(module, distill, callbacks=[finder], first=cell.even, enable_checkpointing=True)
    size = module.batch_size
    cell.equal(cell.hand(watch).train(cell.steps((size, size))), watch, distill, module)


# Loaders and averages ------------------------------------------------------------------------------------------------


class Shrinking(Module):
    """Loads other batches in each epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        self.batch_size = BATCH // (1 + self.trainer.current_epoch)
        return super().train_dataloader()


def loaders_are_made_again(cell: Cell) -> None:
    module, distill = Shrinking(cell.name), cell.callback()
    trainer, watch = cell.fit(module, distill, reload_dataloaders_every_n_epochs=1)
    cell.equal(cell.hand(watch).train(cell.steps((BATCH, BATCH // 2))), watch, distill, module)
    cell.clean(trainer, module)


def exponential_average(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, callbacks=[EMAWeightAveraging(decay=0.8)], first=cell.even)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module, final=moving_average(hand.after, 0.8))


def average_of_all_steps(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, callbacks=[WeightAveraging()], first=cell.even)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module, final=mean_of(hand.after))


def stochastic_average(cell: Cell) -> None:
    module, distill = cell.module(), cell.callback()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    _, watch = cell.fit(module, distill, callbacks=[average], first=cell.even, max_epochs=3)
    hand = cell.hand(watch).train(cell.steps((BATCH,) * 3), rates=watch.rates)
    cell.equal(hand, watch, distill, module, final=mean_of([hand.after[3], hand.after[7]]))


# Interruptions -------------------------------------------------------------------------------------------------------


class Stops(Callback):
    """Saves a checkpoint after a batch and stops the run by an exception."""

    def __init__(self, after: int, path: Any = None) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.after:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("stop")


def resumed_from_the_middle_of_an_epoch(cell: Cell) -> None:
    path = cell.folder / "middle.ckpt"
    try:
        cell.fit(cell.module(), cell.callback(), callbacks=[Stops(1, path)])
    except RuntimeError as error:
        assert str(error) == "stop"  # noqa: PT017
    first = learned_start(cell)
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, ckpt_path=path)
    steps = cell.steps()
    # Lightning starts the data over, but goes on counting
    later = [[(batch, place)] for batch, [(_, place)] in zip(watch.batches, steps[2:], strict=True)]
    watch.start = first
    hand = cell.hand(watch).train(steps[:2] + later)
    hand.losses = hand.losses[2:]
    cell.equal(hand, watch, distill, module)


def learned_start(cell: Cell) -> dict[str, Tensor]:
    """The first values of the learned parts of a run that has just stopped."""
    assert cell.watch is not None
    return cell.watch.start or {}


class Fails(Module):
    """Raises an exception in its third step, after the student was called."""

    failed = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("in the step")
        return loss


def exception_in_a_step_and_a_second_fit(cell: Cell) -> None:
    module, distill = Fails(cell.name), cell.callback()
    try:
        cell.fit(module, distill)
    except RuntimeError as error:
        assert str(error) == "in the step"  # noqa: PT017
    assert cell.watch is not None
    first = cell.hand(cell.watch).train(cell.steps()[:2])
    cell.equal(first, cell.watch, distill, module)
    assert hooks(module) == 0
    trainer, watch = cell.fit(module, distill)
    if first.learned:
        same(watch.start or {}, first.values())
    average = None if first.decay is None else first.teacher.state_dict()
    hand = cell.hand(watch, fresh=False, model=first.student, average=average)
    hand.formula = first.formula
    hand.train(cell.steps())
    cell.equal(hand, watch, distill, module, tolerance=5e-6)
    cell.clean(trainer, module)


def another_module_with_the_same_callback(cell: Cell) -> None:
    distill = cell.callback()
    cell.fit(cell.module(), distill, max_epochs=1)
    module = cell.module()
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)


SITUATIONS: dict[str, Situation] = {
    function.__name__: function
    for function in (
        plain,
        teacher_in_inference_mode,
        tuner_finds_the_learning_rate,
        tuner_finds_the_batch_size,
        callback_finds_the_learning_rate,
        callback_finds_the_batch_size,
        loaders_are_made_again,
        exponential_average,
        average_of_all_steps,
        stochastic_average,
        resumed_from_the_middle_of_an_epoch,
        exception_in_a_step_and_a_second_fit,
        another_module_with_the_same_callback,
        lightning_copies.copied_between_steps,
        lightning_copies.copied_inside_a_step,
        lightning_steps.manual_optimization,
        lightning_steps.manual_steps_without_the_loss,
        lightning_steps.alternating_steps_of_two_networks,
        lightning_steps.accumulation,
        lightning_steps.clipping,
        lightning_steps.gradient_checkpointing,
        lightning_steps.gradient_checkpointing_in_manual_optimization,
        lightning_steps.compiled,
        lightning_steps.mixed_precision,
        lightning_steps.half_precision_of_the_other_kind,
        lightning_steps.foreign_wrapper_from_before,
        lightning_steps.foreign_wrapper_from_within,
        lightning_steps.validation,
    )
}
# Slow situations meet these features only.
FEW: dict[str, tuple[str, ...]] = {
    "compiled": ("logits", "adapter", "cache", "variational information", "self-distillation"),
    "half_precision_of_the_other_kind": ("logits", "adapter"),
}
# Pairs that cannot work, with the words of the error: (feature, situation) -> words.
MANUAL = (
    "manual_optimization",
    "manual_steps_without_the_loss",
    "alternating_steps_of_two_networks",
    "gradient_checkpointing_in_manual_optimization",
)
REFUSED: dict[tuple[str, str], str] = {
    (feature, situation): r"Pass loss\(task_loss=...\), or a number as the weight"
    for feature in MEASURED
    for situation in MANUAL
}
