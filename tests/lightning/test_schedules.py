"""Schedules of weights and temperatures: their numbers, their effect on a training, their log and their resumption."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    BinarySoftTargetLoss,
    ChannelWiseLoss,
    DecoupledKDLoss,
    DistillCallback,
    Distiller,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    NormalizedKDLoss,
    RelationalLoss,
    SoftTargetLoss,
)
from lightning_distill.schedules import Cosine, Linear, Progress, Schedule, Step, WarmUp

ALL = [
    Schedule(math.sqrt, over="steps"),
    Linear(2.0, 0.5, duration=10, over="steps"),
    Cosine(2.0, 0.5, duration=4, over="epochs"),
    WarmUp(3.0, duration=0.5),
    Step([1.0, 2.0, 5.0], boundaries=[0.2, 0.6], over="fraction"),
]


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 3)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Keeps the scheduled values at the end of each batch."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill, self.seen = distill, []

    def on_train_batch_end(self, *args: Any) -> None:
        (term,) = self.distill.terms
        self.seen.append((term.weight, term.loss.temperature, self.distill.task_weight))


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def scheduled(weight: Any, temperature: Any = 2.0, task_weight: Any = 1.0) -> DistillCallback:
    torch.manual_seed(7)
    return DistillCallback(
        nn.Linear(4, 3), LogitsDistillation(SoftTargetLoss(temperature), weight=weight), task_weight=task_weight
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0, 3.0])
def test_a_line_and_a_wave_follow_their_formulas(share: float) -> None:
    progress, reached = Progress(step=int(share * 100)), min(share, 1.0)
    assert Linear(2.0, 6.0, duration=100, over="steps").at(progress) == pytest.approx(2 + 4 * reached)
    expected = 2 + 4 * (1 - math.cos(math.pi * reached)) / 2
    assert Cosine(2.0, 6.0, duration=100, over="steps").at(progress) == pytest.approx(expected)
    assert WarmUp(6.0, duration=100, over="steps").at(progress) == pytest.approx(6 * reached)


@given(st.floats(0, 1))
def test_a_step_holds_until_its_boundary(fraction: float) -> None:
    expected = 1.0 if fraction < 0.2 else 2.0 if fraction < 0.6 else 5.0
    assert ALL[4].at(Progress(fraction=fraction)) == expected


@pytest.mark.parametrize("schedule", ALL[1:], ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_travels_to_another_process(schedule: Schedule) -> None:
    progress = Progress(5, 2, 0.5)
    assert pickle.loads(pickle.dumps(schedule)).at(progress) == schedule.at(progress)


def test_weights_and_temperatures_follow_steps_epochs_and_the_fraction(trainer: Callable[..., Trainer]) -> None:
    distill = scheduled(Linear(1.0, 0.0, duration=8, over="steps"), Step([4.0, 1.0], boundaries=[1]), Linear(0.0, 1.0))
    watch = Watch(distill)
    trainer(callbacks=[distill, watch], max_epochs=2).fit(Student(), data())
    assert watch.seen == [(1 - step / 8, 4.0 if step < 4 else 1.0, step / 8) for step in range(8)]


def test_a_schedule_counts_optimizer_steps_and_not_batches(trainer: Callable[..., Trainer]) -> None:
    distill = scheduled(Linear(0.0, 4.0, duration=4, over="steps"), task_weight=Linear(0.0, 1.0))
    watch = Watch(distill)
    trainer(callbacks=[distill, watch], max_epochs=1, accumulate_grad_batches=2).fit(Student(), data())
    assert [weight for weight, *_ in watch.seen] == [0.0, 0.0, 1.0, 1.0]
    assert [task for *_, task in watch.seen] == [0.0, 0.0, 0.5, 0.5]


def test_a_scheduled_training_equals_one_whose_weight_is_set_by_hand(trainer: Callable[..., Trainer]) -> None:
    class ByHand(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            by_hand.terms[0].weight = 1 - trainer.global_step / 4

    by_hand, of_itself = scheduled(1.0), scheduled(Linear(1.0, 0.0, duration=4, over="steps"))
    weights = []
    for callbacks in ([by_hand, ByHand()], [of_itself]):
        torch.manual_seed(3)
        module = Student()
        trainer(callbacks=callbacks, max_epochs=1).fit(module, data())
        weights.append(module.model.weight.detach())
    assert torch.equal(*weights)


def test_a_weight_of_zero_asks_the_teacher_nothing(trainer: Callable[..., Trainer]) -> None:
    distill = scheduled(Step([0.0, 1.0], boundaries=[3], over="steps"))
    calls = []
    distill.teacher.register_forward_hook(lambda *args: calls.append(1))
    trainer(callbacks=[distill], max_epochs=1).fit(Student(), data())
    assert len(calls) == 1


def test_scheduled_values_are_logged(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    distill = scheduled(Linear(1.0, 0.0, duration=4, over="steps"), Linear(4.0, 2.0, duration=4, over="steps"))
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[distill], max_epochs=1, logger=logger, log_every_n_steps=2).fit(Student(), data())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    columns = [column for column in columns if column["distill/logits_weight"]]  # the last row holds epoch means
    assert [float(column["distill/logits_weight"]) for column in columns] == [0.75, 0.25]
    assert [float(column["distill/logits_temperature"]) for column in columns] == [3.5, 2.5]
    assert "distill/task_weight" not in rows[0]


def test_a_resumed_training_goes_on_where_the_schedule_was(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    def run(max_epochs: int, checkpoint: Path | None = None) -> tuple[list[Any], torch.Tensor, Trainer]:
        distill = scheduled(Cosine(1.0, 0.0, duration=8, over="steps"), Linear(4.0, 1.0, duration=2, over="epochs"))
        watch = Watch(distill)
        torch.manual_seed(3)
        module = Student()
        run = trainer(callbacks=[distill, watch], max_epochs=max_epochs)
        run.fit(module, data(), ckpt_path=checkpoint)
        return watch.seen, module.model.weight.detach(), run

    whole, weights, _ = run(2)
    first, _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed, _ = run(2, tmp_path / "half.ckpt")
    assert first + second == whole
    assert torch.equal(resumed, weights)


def test_a_plain_loop_counts_its_steps_and_saves_the_count() -> None:
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    images, labels = next(iter(data()))

    def distiller() -> Distiller:
        return Distiller(student, teacher, LogitsDistillation(weight=Linear(1.0, 0.0, duration=4, over="steps")))

    def steps(distiller: Distiller, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            with distiller.record():
                loss = nn.functional.cross_entropy(student(images), labels)
            distiller.total(loss)
            seen.append(distiller.terms[0].weight)
        return seen

    with distiller() as first:
        assert steps(first, 3) == [1.0, 0.75, 0.5]
        state = first.state_dict()
    with distiller() as second:
        second.load_state_dict(state)
        assert steps(second, 1) == [0.25]


class Blend(nn.Module):
    """A loss of the user's, around a loss that can be replaced while training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.inner(student, teacher)


def test_a_schedule_deep_inside_a_loss_counts_if_it_is_assigned_while_training() -> None:
    student, (images, labels) = nn.Linear(4, 3), next(iter(data()))
    blend = Blend(SoftTargetLoss(2.0))
    with Distiller(student, nn.Linear(4, 3), LogitsDistillation(blend)) as distiller:
        for step in range(4):
            if step == 1:
                distiller.terms[0].loss.inner = SoftTargetLoss(Linear(8.0, 4.0, duration=4, over="steps"))
            with distiller.record():
                loss = nn.functional.cross_entropy(student(images), labels)
            distiller.total(loss)
        assert distiller.terms[0].loss.inner.temperature == 5.0


def test_a_plain_loop_passes_the_epoch_if_a_schedule_needs_it() -> None:
    student, (images, labels) = nn.Linear(4, 3), next(iter(data()))
    term = LogitsDistillation(weight=Step([1.0, 0.5], boundaries=[1]))
    with Distiller(student, nn.Linear(4, 3), term, task_weight=Linear(1.0, 0.0)) as distiller:
        with distiller.record():
            loss = nn.functional.cross_entropy(student(images), labels)
        with pytest.raises(ValueError, match=r"Expected the position over 'fraction' to be known, but got none\."):
            distiller.total(loss)
        distiller.advance(10, epoch=1, fraction=0.75)
        assert (term.weight, distiller.task_weight) == (0.5, 0.25)


LOSSES = {
    "dist": (DISTLoss, {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0}),
    "dkd": (DecoupledKDLoss, {"target_weight": 1.0, "nontarget_weight": 8.0, "temperature": 4.0}),
    "nkd": (NormalizedKDLoss, {"nontarget_weight": 1.5, "temperature": 1.0}),
    "relational": (RelationalLoss, {"distance_weight": 25.0, "angle_weight": 50.0}),
    "binary": (BinarySoftTargetLoss, {"temperature": 1.0}),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_weight_and_temperature_within_a_loss_may_be_a_schedule(kind: str) -> None:
    """At each step the value is that of the loss with the step's numbers in its constructor."""
    loss, settings = LOSSES[kind]
    schedules = {name: Step([value, 3.0, 0.5], boundaries=[1, 2], over="steps") for name, value in settings.items()}
    student, teacher, (images, labels) = nn.Linear(4, 3), nn.Linear(4, 3), next(iter(data()))
    extra = (labels,) if loss.needs_labels else ()
    with Distiller(student, teacher, LogitsDistillation(loss(**schedules))) as distiller:
        for numbers in (settings, dict.fromkeys(settings, 3.0), dict.fromkeys(settings, 0.5)):
            with distiller.record():
                task = nn.functional.cross_entropy(student(images), labels)
            distiller.total(task, (images, labels))
            expected = loss(**numbers)(student(images), teacher(images), *extra)
            torch.testing.assert_close(distiller.parts["logits_loss"], expected.detach())
            assert distiller.scheduler.values == {f"logits_{name}": value for name, value in numbers.items()}


def test_a_feature_term_has_the_temperature_of_its_loss() -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten()) for _ in range(2))
    term = FeatureDistillation("0", "0", ChannelWiseLoss(Step([4.0, 2.0], boundaries=[1], over="steps")), name="maps")
    images = torch.randn(4, 1, 2, 3)
    with Distiller(student, teacher, term) as distiller:
        for temperature in (4.0, 2.0):
            with distiller.record():
                student(images)
            distiller.total(torch.zeros(()))
            expected = ChannelWiseLoss(temperature)(student[0](images), teacher[0](images))
            torch.testing.assert_close(distiller.parts["maps_loss"], expected.detach())


def test_a_schedule_over_the_fraction_needs_an_end(trainer: Callable[..., Trainer]) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    endless = trainer(callbacks=[scheduled(Linear(1.0, 0.0)), Stop()], max_epochs=-1)
    with pytest.raises(ValueError, match=r"Expected the position over 'fraction' to be known"):
        endless.fit(Student(), data())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear(1.0, 0.0, over="steps"), r"Expected `duration` to be given in steps, but got duration=None\."),
        (lambda: Linear(1.0, 0.0, duration=0), r"Expected `duration` to be greater than 0, but got duration=0\."),
        (
            lambda: Linear(1.0, 0.0, over="hours"),
            r"Expected `over` to be one of 'steps', 'epochs', 'fraction', but got",
        ),
        (
            lambda: Step([1.0], boundaries=[1, 2]),
            r"Expected `values` to have one entry more than the increasing `bound",
        ),
        (lambda: Step([1.0, 2.0, 3.0], boundaries=[2, 1]), r"Expected `values` to have one entry more than the"),
        (
            lambda: LogitsDistillation(weight=Linear(-1.0, 1.0)),
            r"Expected `weight` to be at least 0, but got weight=-1\.0",
        ),
        (
            lambda: SoftTargetLoss(WarmUp(4.0)),
            r"Expected `temperature` to be greater than 0, but got temperature=0\.0\.",
        ),
    ],
)
def test_a_wrong_schedule_raises_when_it_is_made(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_that_leaves_the_allowed_numbers_raises(trainer: Callable[..., Trainer]) -> None:
    distill = scheduled(Schedule(lambda step: 1.0 - step))
    with pytest.raises(ValueError, match=r"Expected `logits_weight` to be at least 0, but got logits_weight=-1\.0\."):
        trainer(callbacks=[distill], max_epochs=1).fit(Student(), data())
    with pytest.raises(TypeError, match=r"Expected `weight` to be an int or a float, but got weight=<function"):
        LogitsDistillation(weight=lambda step: 1.0)


def test_a_number_that_replaces_a_schedule_ends_its_values() -> None:
    student, (images, labels) = nn.Linear(4, 3), next(iter(data()))
    term = LogitsDistillation(weight=Linear(1.0, 0.0, duration=4, over="steps"))
    with Distiller(student, nn.Linear(4, 3), term) as distiller:
        seen = []
        for _ in range(2):
            with distiller.record():
                loss = nn.functional.cross_entropy(student(images), labels)
            distiller.total(loss)
            seen.append(distiller.scheduler.values)
            distiller.terms[0].weight = 0.5
    assert seen == [{"logits_weight": 1.0}, {}]
