"""The situations of the pairs: each runs a feature's cell under a Trainer and compares it with the loop by hand."""

from __future__ import annotations

import copy
import functools
import io
import pickle
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
from pairs.by_hand import asked, mean_of, moving_average, outputs
from pairs.lightning_cell import QUIET, Cell, Module, Watch, close, hooks, same
from pairs.lightning_table import BATCH, FEATURES, ROWS, student
from tiny import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback

Situation = Callable[[Cell], None]


def plain(cell: Cell) -> None:
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
    hand = cell.hand(watch, fresh=False, model=first.student).train(cell.steps())
    cell.equal(hand, watch, distill, module, tolerance=5e-6)
    cell.clean(trainer, module)


def another_module_with_the_same_callback(cell: Cell) -> None:
    distill = cell.callback()
    cell.fit(cell.module(), distill, max_epochs=1)
    module = cell.module()
    _, watch = cell.fit(module, distill)
    cell.equal(cell.hand(watch).train(cell.steps()), watch, distill, module)


# Copies --------------------------------------------------------------------------------------------------------------


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


class CopiesItself(Module):
    """Copies itself in the third step, after the student was called, and runs the copy with gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.current_epoch == 0 and batch_idx == 2:
            kept = {name: make(self) for name, make in COPIES.items()}
            for twin in kept.values():
                twin.task(batch)
            self.__dict__["kept"] = kept
        return loss


class CopiesAfter(Callback):
    """Copies the module after its third step."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 2:
            self.kept = {name: make(pl_module) for name, make in COPIES.items()}
            for twin in self.kept.values():
                assert hooks(twin) == 0


def copied_between_steps(cell: Cell) -> None:
    module, distill, copies = cell.module(), cell.callback(), CopiesAfter()
    _, watch = cell.fit(module, distill, callbacks=[copies])
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    _copies_are_plain(cell, copies.kept, hand.after[2])


def copied_inside_a_step(cell: Cell) -> None:
    module, distill = CopiesItself(cell.name), cell.callback()
    _, watch = cell.fit(module, distill)
    hand = cell.hand(watch).train(cell.steps())
    cell.equal(hand, watch, distill, module)
    _copies_are_plain(cell, module.__dict__["kept"], hand.after[1])


def _copies_are_plain(cell: Cell, copies: dict[str, Any], values: dict[str, Tensor]) -> None:
    """The copies validate and train themselves, and nothing is distilled."""
    assert copies.keys() == COPIES.keys()
    for name, twin in copies.items():
        assert not [key for key in vars(twin) if key.endswith("_step")]
        same({key: value.detach() for key, value in twin.model.named_parameters()}, values)
        if name != "torch.save":  # the three are alike up to here
            continue
        model = student()
        model.load_state_dict(values)
        trainer = Trainer(max_epochs=1, **QUIET)
        (measured,) = trainer.validate(twin, DataLoader(cell.feature.rows(), BATCH), verbose=False)
        whole = cell.feature.rows().batch(0, ROWS)
        with torch.no_grad():
            logits = outputs(model, whole["x"])["logits"]
            wanted = torch.nn.functional.cross_entropy(logits.flatten(0, -2), whole["labels"].flatten())
        close([measured["val_loss"]], [wanted.item()])
        trainer.fit(twin)
        hand = cell.hand(Watch(cell.callback()), fresh=False, model=model)
        hand.train(cell.steps((BATCH,)), distils=lambda number: False, weighs_task=False)
        same({key: value.detach() for key, value in twin.model.named_parameters()}, hand.after[-1])


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


def mixed_precision(cell: Cell, precision: Any = "bf16-mixed") -> None:
    module, distill = cell.module(), cell.callback()
    _, watch = cell.fit(module, distill, precision=precision, max_epochs=1)
    hand = cell.hand(watch).train(cell.steps((BATCH,)), autocast=True)
    cell.equal(hand, watch, distill, module, tolerance=2e-3)


def half_precision_of_the_other_kind(cell: Cell) -> None:
    mixed_precision(cell, "16-mixed")  # on the CPU Lightning takes bfloat16


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
    module, distill = cell.module(), cell.callback(validate=None if cell.feature.cache else True)
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


SITUATIONS: dict[str, Situation] = {
    function.__name__: function
    for function in (
        plain,
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
        copied_between_steps,
        copied_inside_a_step,
        manual_optimization,
        manual_steps_without_the_loss,
        alternating_steps_of_two_networks,
        accumulation,
        clipping,
        gradient_checkpointing,
        gradient_checkpointing_in_manual_optimization,
        compiled,
        mixed_precision,
        half_precision_of_the_other_kind,
        foreign_wrapper_from_before,
        foreign_wrapper_from_within,
        validation,
    )
}
# Slow situations meet these features only.
FEW: dict[str, tuple[str, ...]] = {
    "compiled": ("logits", "adapter", "cache", "variational information", "self-distillation"),
    "half_precision_of_the_other_kind": ("logits", "adapter"),
}
# Pairs that cannot work, with the words of the error: (feature, situation) -> words.
REFUSED: dict[tuple[str, str], str] = {}
