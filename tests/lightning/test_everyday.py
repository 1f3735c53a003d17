"""First attempts of users: a loss in the place of terms, students in parts, batches of every form, own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_distill import (
    CacheError,
    DecoupledKDLoss,
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    LogitsDistillation,
    SelfDistillation,
    SoftTargetLoss,
    TeacherCache,
    schedules,
)

MakeTrainer = Callable[..., Trainer]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The divergence by hand."""
    target = (teacher.double() / temperature).softmax(-1)
    logs = target.log() - (student.double() / temperature).log_softmax(-1)
    return ((target * logs).sum(-1).mean() * temperature**2).detach()


class InParts(LightningModule):
    """Calls its networks one after the other, without a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
        self.head = nn.Linear(6, nets.CLASSES)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.backbone(batch[0]))
        self.seen.append(logits.detach().cpu())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_networks_that_are_called_one_after_the_other_are_the_student_together(trainer: MakeTrainer) -> None:
    module, teacher = InParts(), nets.teacher()
    terms = [LogitsDistillation(), FeatureDistillation("backbone.1", "layer1", adapter="linear")]
    callback = DistillCallback(teacher, terms, student=["backbone", "head"])
    run = trainer(max_steps=1, callbacks=[callback], log_every_n_steps=1)
    run.fit(module, nets.loader())
    x, _ = nets.batches()[0]
    expected = soft_targets(module.seen[0], teacher(x)).item()
    assert run.callback_metrics["distill/logits_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert run.callback_metrics["distill/backbone.1_loss"].item() > 0


def test_networks_in_parts_are_not_guessed(trainer: MakeTrainer) -> None:
    callback = DistillCallback(nets.teacher())
    with pytest.raises(ValueError, match=r"several modules were: 'backbone', 'head'.*student=\['backbone', 'head'\]"):
        trainer(max_steps=1, callbacks=[callback]).fit(InParts(), nets.loader())


def test_parts_that_are_not_called_in_turn_are_refused(trainer: MakeTrainer) -> None:
    class Twice(InParts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first, second = self.backbone(batch[0]), self.backbone(batch[0].flip(-1))
            return F.cross_entropy(self.head(first + second), batch[1])

    callback = DistillCallback(nets.teacher(), student=["backbone", "head"])
    with pytest.raises(ValueError, match=r"Linear to be called after each call of Sequential"):
        trainer(max_steps=1, callbacks=[callback]).fit(Twice(), nets.loader())


def test_two_networks_learn_from_each_other(trainer: MakeTrainer) -> None:
    """Mutual learning: each is the other's target."""

    class Pair(InParts):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nets.student(1), nets.student(2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.first(batch[0]), self.second(batch[0])
            self.seen += [each.detach() for each in logits]
            return sum(F.cross_entropy(each, batch[1]) for each in logits)  # type: ignore[return-value]

    module = Pair()
    terms = [
        SelfDistillation("first", "second", SoftTargetLoss(1.0), name="forth"),
        SelfDistillation("second", "first", SoftTargetLoss(1.0), name="back"),
    ]
    callback = DistillCallback(None, terms, student=["first", "second"])
    run = trainer(max_steps=1, callbacks=[callback], log_every_n_steps=1)
    run.fit(module, nets.loader())
    first, second = module.seen
    for name, pair in (("forth", (first, second)), ("back", (second, first))):
        expected = soft_targets(*pair, temperature=1.0).item()
        assert run.callback_metrics[f"distill/{name}_loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("terms", [SoftTargetLoss(2.0), [SoftTargetLoss(2.0)]], ids=["alone", "in a list"])
def test_a_loss_on_logits_stands_for_a_term(terms: Any) -> None:
    student, teacher, (x, _) = nets.student(), nets.teacher(), nets.batches()[0]
    with Distiller(student, teacher, terms) as distiller:
        with distiller.record():
            student(x)
        distiller.loss()
        expected = soft_targets(student(x), teacher(x), 2.0).item()
        assert distiller.parts["logits_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert callable(DistillCallback(teacher, SoftTargetLoss()).terms[0].loss)


def test_evaluation_through_the_loops_own_function_is_the_task_loss() -> None:
    student = nets.student()
    with Distiller(student, nets.teacher(), task_weight=0.5) as distiller, torch.no_grad():
        with distiller.record():
            task = student(nets.batches()[0][0]).mean()
        assert distiller.total(task).item() == pytest.approx(0.5 * task.item())
        assert list(distiller.parts) == ["task_loss"]


def test_a_loop_may_record_in_several_blocks() -> None:
    student, teacher, batches = nets.student(), nets.teacher(), nets.batches()
    with Distiller(student, teacher) as distiller:
        for x, _ in batches[:2]:
            with distiller.record():
                student(x)
        distiller.loss()
        expected = sum(soft_targets(student(x), teacher(x)) for x, _ in batches[:2]) / 2
        assert distiller.parts["logits_loss"].item() == pytest.approx(float(expected), rel=1e-4)
        for x, _ in batches[:2]:
            with distiller.record():
                student(x)
        distiller.loss(calls=-1)
        expected = soft_targets(student(batches[1][0]), teacher(batches[1][0]))
        assert distiller.parts["logits_loss"].item() == pytest.approx(float(expected), rel=1e-4)


# DistillModule -------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """A network with two inputs and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.layer(x), "hidden": x}


ROW = {"x": torch.ones(4), "mask": torch.ones(4), "labels": torch.tensor(1)}
BATCHES: dict[str, list[Any]] = {
    "a dict": [ROW] * 8,
    "a dict without a mask": [{"x": ROW["x"], "labels": ROW["labels"]}] * 8,
    "a pair": [(ROW["x"], ROW["labels"])] * 8,
    "several inputs and labels": [((ROW["x"], ROW["mask"]), ROW["labels"])] * 8,
    "a dict of inputs and labels": [({"x": ROW["x"], "mask": ROW["mask"]}, ROW["labels"])] * 8,
}


@pytest.mark.parametrize("form", BATCHES)
def test_the_module_takes_batches_of_every_form(trainer: MakeTrainer, form: str) -> None:
    module = DistillModule(Scores(), Scores(), DecoupledKDLoss())
    run, data = trainer(max_epochs=1), DataLoader(BATCHES[form], 4)
    run.fit(module, data, data)
    assert {
        "train_loss",
        "val_loss",
        "distill/val_loss",
        "distill/val_teacher_agreement",
    } <= run.callback_metrics.keys()
    predicted = run.predict(module, data)
    assert predicted is not None
    assert predicted[0]["logits"].shape == (4, 3)


def test_the_module_takes_every_argument_of_the_callback() -> None:
    arguments: dict[str, Any] = {
        "task_weight": 0.5,
        "labels": "y",
        "teacher_dtype": "bfloat16",
        "adapter_optimizer": torch.optim.Adam,
        "validate": False,
        "log": False,
        "name": "kd",
    }
    distill = DistillModule(nets.student(), nets.teacher(), **arguments).distill
    callback = DistillCallback(nets.teacher(), student="student", **arguments)
    for name in ("task_weight", "labels", "teacher_dtype", "adapter_optimizer", "validate", "logs", "name", "student"):
        assert getattr(distill, name) == getattr(callback, name)


def test_a_subclass_with_callbacks_of_its_own_still_distils(trainer: MakeTrainer) -> None:
    class WithCallbacks(DistillModule):
        def configure_callbacks(self) -> Any:
            return EarlyStopping("val_loss")  # without super, as in Lightning's own pages

    module = WithCallbacks(nets.student(), nets.teacher())
    run = trainer(max_epochs=1, log_every_n_steps=1)
    run.fit(module, nets.loader(), nets.loader(8))
    assert run.callback_metrics["distill/logits_loss"] > 0
    assert sum(callback is module.distill for callback in run.callbacks) == 1
    assert any(isinstance(callback, EarlyStopping) for callback in run.callbacks)


@pytest.mark.parametrize("key", ["distill/loss", "distill/logits_loss", "distill/val_loss", "distill/val_logits_loss"])
def test_every_key_can_be_monitored(trainer: MakeTrainer, key: str, tmp_path: Any) -> None:
    """Fewer batches than log steps: the means over an epoch are there all the same."""
    callbacks = [EarlyStopping(key), ModelCheckpoint(tmp_path, monitor=key)]
    module = DistillModule(nets.student(), nets.teacher())
    run = trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    run.fit(module, nets.loader(), nets.loader(8))
    assert callbacks[1].best_model_score is not None  # type: ignore[attr-defined]
    assert run.callback_metrics[key] > 0


def test_a_manual_training_that_never_distils_is_refused_after_an_epoch(trainer: MakeTrainer) -> None:
    class Manual(nets.InnerModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
            optimizer.step()

    callback = DistillCallback(nets.teacher())
    with pytest.raises(MisconfigurationException, match=r"Expected `callback.loss\(\)` to be added"):
        trainer(max_epochs=1, callbacks=[callback]).fit(Manual(nets.student()), nets.loader())


def test_a_step_may_take_the_labels_out_of_its_batch(trainer: MakeTrainer) -> None:
    class Pops(nets.InnerModule):
        def loss_of(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch["x"]), batch.pop("labels"))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss_of(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss_of(batch)

    train, val = (nets.as_loader([{"x": x, "labels": y} for x, y in nets.batches()]) for _ in range(2))
    run = trainer(max_epochs=1, callbacks=[DistillCallback(nets.teacher(), DecoupledKDLoss())])
    run.fit(Pops(nets.student()), train, val)
    assert {"distill/logits_loss", "distill/val_logits_loss"} <= run.callback_metrics.keys()


def test_a_schedule_and_a_number_take_each_others_place_at_any_time() -> None:
    loss = SoftTargetLoss(schedules.Linear(8.0, 2.0))
    term = LogitsDistillation(loss, weight=schedules.Linear(1.0, 0.0))
    student, x = nets.student(), nets.batches()[0][0]
    with Distiller(student, nets.teacher(), term) as distiller:

        def numbers(fraction: float) -> tuple[float, float]:
            distiller.advance(0, 0, fraction)
            with distiller.record():
                student(x)
            distiller.loss()
            return distiller.terms[0].weight, loss.temperature

        assert numbers(0.5) == (0.5, 5.0)
        term.weight, loss.temperature = 0.25, 3.0
        assert numbers(0.5) == (0.25, 3.0)
        term.weight, loss.temperature = schedules.Linear(0.0, 4.0), schedules.Linear(2.0, 1.0)
        assert numbers(0.75) == (3.0, 1.25)
    with pytest.raises(ValueError, match="Expected `weight` to be at least 0"):
        term.weight = -1


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_probabilities_in_the_place_of_logits_are_refused_in_the_first_step(trainer: MakeTrainer, side: str) -> None:
    networks = {"student": nets.student(), "teacher": nets.teacher()}
    networks[side] = nn.Sequential(networks[side], nn.Softmax(-1))  # type: ignore[assignment]
    module = nets.StepModule(networks["student"], lambda module, batch, index: module.model(batch[0]).square().sum())
    with pytest.raises(ValueError, match=rf"the {side}'s output to be logits, but got probabilities.*last softmax"):
        trainer(max_steps=1, callbacks=[DistillCallback(networks["teacher"])]).fit(module, nets.loader())

    class Logarithms(DistillCallback):
        def logits(self, output: Tensor) -> Tensor:
            return output.clamp(min=1e-8).log() if output.min() >= 0 else output

    trainer(max_steps=2, callbacks=[Logarithms(networks["teacher"])]).fit(module, nets.loader())


def test_a_stream_of_data_without_keys_is_refused_with_a_clear_error(tmp_path: Any) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from nets.digits()[0]

    with pytest.raises(CacheError, match=r"Expected `key` to be given for a stream.*got None with a Stream"):
        TeacherCache.build(nets.teacher(), Stream(), tmp_path, progress=False)
