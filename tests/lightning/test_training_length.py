"""How much of a training is done: the largest used-up share of any limit, whatever the Trainer does beside it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from tiny import CLASSES, INPUTS, Classifier, Mlp, dataset, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation
from lightning_distill.schedules import Linear

BATCHES = 10  # in an epoch of the loader below


class Fractions(DistillCallback):
    """A weight that is 1 plus the share that is done, noted before each backward pass."""

    def __init__(self) -> None:
        super().__init__(Mlp(7, seed=1), LogitsDistillation(weight=Linear(1.0, 2.0)), student="model")


class Notes(Callback):
    """Steps and shares; also of a finder's steps, since it hangs on the module's own hook."""

    def __init__(self, module: Any, distill: DistillCallback) -> None:
        self.steps: list[tuple[int, float]] = []
        module.on_before_backward = lambda loss: self.steps.append(
            (module.trainer.global_step, round(distill.terms[0].weight - 1, 6))
        )


def data(rows: int = 4 * BATCHES) -> DataLoader[Any]:
    return loader(rows=rows)


def shares(trainer: Any, *callbacks: Callback, module: Any = None, loaders: Any = None, **settings: Any) -> Any:
    """The optimizer steps and the shares of the training of each batch."""
    module = Classifier() if module is None else module
    distill, ckpt_path = Fractions(), settings.pop("ckpt_path", None)
    notes = Notes(module, distill)
    run = trainer(callbacks=[distill, *callbacks], **{"max_epochs": 2, **settings})
    if loaders is None and not hasattr(type(module), "own_data"):
        loaders = data()
    run.fit(module, loaders, ckpt_path=ckpt_path)
    return notes.steps


def even(count: int, start: int = 0, steps: int | None = None) -> list[tuple[int, float]]:
    return [(step, round(step / count, 6)) for step in range(start, steps or count)]


LIMITS: dict[str, tuple[dict[str, Any], int, int]] = {  # settings, length of the whole training, steps made
    "epochs": ({}, 20, 20),
    "steps alone": ({"max_steps": 15, "max_epochs": -1}, 15, 15),
    "steps before epochs": ({"max_steps": 15}, 15, 15),
    "epochs before steps": ({"max_steps": 150}, 20, 20),
    "limit_train_batches": ({"limit_train_batches": 3}, 6, 6),
    "overfit_batches": ({"overfit_batches": 3}, 6, 6),
    "mixed precision": ({"precision": "bf16-mixed"}, 20, 20),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_share_follows_the_limit_that_comes_first(trainer, limit: str) -> None:
    settings, length, made = LIMITS[limit]
    assert shares(trainer, **settings) == even(length, steps=made)


def test_the_share_is_constant_between_optimizer_steps(trainer) -> None:
    made = shares(trainer, accumulate_grad_batches=3)  # four optimizer steps in each of two epochs
    assert made == [(step, step / 8) for epoch in (0, 4) for step in [epoch + index // 3 for index in range(10)]]


class Growing(Classifier):
    """Loads twice as many batches from its second epoch on."""

    own_data = True

    def train_dataloader(self) -> Any:
        return data(40 if self.current_epoch == 0 else 80)


def test_a_reload_that_doubles_the_batches_does_not_move_the_past(trainer) -> None:
    made = shares(trainer, module=Growing(), reload_dataloaders_every_n_epochs=1)
    assert made == even(20, steps=10) + [(10 + index, round(0.5 + index / 40, 6)) for index in range(20)]


@pytest.mark.parametrize("distill_first", [True, False])
def test_the_share_stands_still_while_the_learning_rate_is_found(trainer, distill_first: bool) -> None:
    module, distill = Classifier(), Fractions()
    notes = Notes(module, distill)
    finder = LearningRateFinder(num_training_steps=5, min_lr=1e-4, update_attr=False)
    callbacks = [distill, finder] if distill_first else [finder, distill]
    trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True).fit(module, data())
    assert notes.steps == [(step, 0.0) for step in range(5)] + even(20)


class Sized(Classifier):
    """Has the attribute that the finder sets."""

    own_data = True

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(rows=40, batch_size=self.batch_size)


def test_the_share_stands_still_while_the_batch_size_is_found(trainer) -> None:
    finder, module = BatchSizeFinder(steps_per_trial=3, init_val=2, max_trials=1), Sized()
    made = shares(trainer, finder, module=module, enable_checkpointing=True)
    assert [done for _, done in made[:3]] == [0.0] * 3
    length = 2 * 40 // module.batch_size
    assert made[-length:] == even(length)


class MidFinder(LearningRateFinder):
    """Looks again before the second epoch."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def test_a_finder_in_mid_training_does_not_move_the_share(trainer) -> None:
    finder = MidFinder(num_training_steps=3, min_lr=1e-4, update_attr=False)
    made = shares(trainer, finder, enable_checkpointing=True)
    # what matters is that the real steps go on as if nothing had been
    assert made[:10] == even(20, steps=10)
    assert made[-10:] == even(20, start=10)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [5, 10, 15])
def test_a_resumed_run_goes_on_where_it_stood(trainer, tmp_path: Path, step: int) -> None:
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    assert shares(trainer, save, enable_checkpointing=True) == even(20)
    path = tmp_path / "saved" / f"step={step}.ckpt"
    assert shares(trainer, ckpt_path=path) == even(20, start=step)
    assert shares(trainer, ckpt_path=path, max_epochs=4) == even(40, start=step)


def test_the_share_of_a_time_limit_follows_the_clock(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: now[0])
    monkeypatch.setattr(Timer, "time_remaining", lambda self, stage=None: 20.0 - now[0])

    class Slow(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 1.0
            return super().training_step(batch, batch_idx)

    made = shares(trainer, module=Slow(), max_epochs=1000, max_time=timedelta(seconds=20), max_steps=20)
    assert [done for _, done in made] == [index / 20 for index in range(20)]
    now[0] = 0.0
    made = shares(trainer, module=Slow(), max_epochs=-1, max_time=timedelta(seconds=20), limit_train_batches=5)
    assert [done for _, done in made][:5] == [index / 20 for index in range(5)]


def test_the_share_of_epochs_counts_where_it_is_larger_than_that_of_time(trainer) -> None:
    assert shares(trainer, max_time=timedelta(days=1)) == even(20)


class Endless(IterableDataset[Any]):
    """Twenty rows, of which nobody knows the number."""

    def __iter__(self) -> Any:
        return iter([(torch.zeros(INPUTS), 0)] * 20)


def test_a_stream_without_a_length_moves_the_share_at_the_ends_of_epochs_or_by_steps(trainer) -> None:
    stream = DataLoader(Endless(), batch_size=4)
    assert shares(trainer, loaders=stream) == [(step, 0.0 if step < 5 else 0.5) for step in range(10)]
    expected = [(step, max(step / 8, step // 5 / 2)) for step in range(8)]
    assert shares(trainer, loaders=stream, max_steps=8) == expected


class TwoOptimizers(Classifier):
    """Manual optimization; Lightning counts the steps of both."""

    def __init__(self, distill: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.distill: list[Any] = []

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model.body, self.model.head)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx) + self.distill[0].loss()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize(("settings", "length"), [({}, 20), ({"max_steps": 20}, 10)])
def test_a_schedule_ends_with_the_training_of_several_optimizers(trainer, settings: Any, length: int) -> None:
    module, distill = TwoOptimizers(), Fractions()
    module.distill.append(distill)
    notes = Notes(module, distill)
    trainer(callbacks=distill, **{"max_epochs": 2, **settings}).fit(module, data())
    assert [done for _, done in notes.steps] == [done for _, done in even(length)]


class Normed(nn.Module):
    """With batch normalisation, for which SWA appends an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def test_the_epoch_that_swa_appends_for_batch_normalisation_does_not_count(trainer) -> None:
    average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    assert shares(trainer, average, module=Classifier(Normed())) == even(20)  # no backward pass in the last epoch


def test_a_finder_leaves_no_trace_on_the_adapters(trainer) -> None:
    ended = []
    for finders in ([], [LearningRateFinder(num_training_steps=5, min_lr=1e-4, update_attr=False)]):
        torch.manual_seed(3)
        distill = DistillCallback(Mlp(7, seed=1), FeatureDistillation("body", "body"), student="model")
        run = trainer(callbacks=[distill, *finders], max_epochs=1, enable_checkpointing=bool(finders))
        run.fit(Classifier(), data())
        ended.append(distill.adapter_state()["adapters"]["body"])
    assert all(torch.equal(value, ended[1][key]) for key, value in ended[0].items())


def test_without_a_schedule_the_training_needs_no_limit(trainer) -> None:
    class Ends(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    distill = DistillCallback(Mlp(7, seed=1))
    run = trainer(callbacks=[distill, Ends()], max_epochs=-1, limit_train_batches=2)
    run.fit(Classifier(), DataLoader(dataset(8), 4))
    assert run.global_step == 2
