"""CurriculumTemperature: published numbers, gradients against float64, trainings, states, what refuses it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from loss_case import golden_arrays, golden_index
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    CurriculumTemperature,
    DecoupledKDLoss,
    DistillCallback,
    Distiller,
    DISTLoss,
    FeatureDistillation,
    FusedLinearDistillation,
    LogitsDistillation,
    NormalizedKDLoss,
    ReverseKLLoss,
    SelfDistillation,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
    TeacherCache,
    WeightedSoftLabelLoss,
    losses,
)
from lightning_distill.schedules import Linear, Progress

GOLDEN = golden_index("ctkd")
LEARNING = [SoftTargetLoss, SoftCrossEntropyLoss, DecoupledKDLoss, NormalizedKDLoss, WeightedSoftLabelLoss, DISTLoss]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def drawn(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["case"])
def test_value_temperature_and_reversed_gradient_are_the_published_ones(entry: dict[str, Any]) -> None:
    arrays, reference = golden_arrays(entry), entry["hyperparameters"]
    low, span = reference["t_start"], reference["t_end"]
    temperature = CurriculumTemperature(low, low + span, reversal_weight=-reference["lambda_"])
    loss = SoftTargetLoss(temperature).double()
    loss.temperature.theta.data.copy_(torch.tensor(arrays["param_global_T"])[0])
    student = torch.tensor(arrays["student_logits"], requires_grad=True)
    value = loss(student, torch.tensor(arrays["teacher_logits"]))
    value.backward()
    assert loss.temperature.value.item() == pytest.approx(float(arrays["temperature"][0]), rel=1e-12)
    assert value.item() == pytest.approx(float(arrays["loss"]), rel=1e-9)
    np.testing.assert_allclose(student.grad.numpy(), arrays["grad_student_logits"], rtol=1e-9, atol=1e-12)
    assert loss.temperature.theta.grad.item() == pytest.approx(float(arrays["gradp_global_T"][0]), rel=1e-9)


def called(loss: Any, student: Tensor, teacher: Tensor, labels: Tensor, **mask: Any) -> Tensor:
    return loss(student, teacher, *([labels] if loss.needs_labels else []), **mask)


@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_each_loss_has_the_gradient_by_its_temperature(kind: Any, masked: bool) -> None:
    """Against central differences of the loss with numbers as temperatures; impossible classes and rows included."""
    student, teacher, labels = drawn(0, 4, 6), drawn(1, 4, 6), torch.tensor([1, 0, 2, 5])
    student[0, 4] = teacher[0, 4] = teacher[1, 4] = -torch.inf
    mask: dict[str, Any] = {"mask": torch.tensor([True, True, False, True])} if masked else {}
    if masked:
        student[2] = teacher[2] = torch.nan
    loss = kind(CurriculumTemperature(0.5, 6.0, reversal_weight=0.7)).double()
    value = called(loss, student.clone().requires_grad_(), teacher, labels, **mask)
    value.backward()
    theta = loss.temperature.theta.detach()

    def at(moved: float) -> float:
        number = 0.5 + 5.5 / (1 + math.exp(-moved))
        return called(kind(number), student, teacher, labels, **mask).item()

    step, start = 1e-4, float(theta)
    differences = (8 * (at(start + step) - at(start - step)) - at(start + 2 * step) + at(start - 2 * step)) / 12 / step
    assert value.item() == pytest.approx(at(start), rel=1e-9)
    assert loss.temperature.theta.grad.item() == pytest.approx(-0.7 * differences, rel=1e-6)
    assert abs(differences) > 1e-6


@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.__name__)
def test_the_student_has_the_gradient_of_a_number_as_the_temperature(kind: Any) -> None:
    student, teacher, labels = drawn(0, 4, 6), drawn(1, 4, 6), torch.tensor([1, 0, 2, 5])
    learned = kind(CurriculumTemperature(reversal_weight=1.0)).double()
    gradients = []
    for loss in (learned, kind(learned.temperature.value.item())):
        logits = student.clone().requires_grad_()
        called(loss, logits, teacher, labels).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_large_logits_do_not_take_a_faster_way_without_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_distill.functional.kernels import dispatch

    monkeypatch.setattr(dispatch, "_LARGE", 1)
    loss = SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0))
    loss(drawn(0, 4, 6).float().requires_grad_(), drawn(1, 4, 6).float()).backward()
    assert loss.temperature.theta.grad.abs() > 0


def test_the_reversal_grows_along_a_cosine_over_ten_epochs() -> None:
    schedule = CurriculumTemperature().schedules["reversal_weight"]
    expected = [0.5 * (1 + math.cos((1 + min(epoch, 10) / 10) * math.pi)) for epoch in range(13)]
    assert [schedule.at(Progress(epoch=epoch)) for epoch in range(13)] == pytest.approx(expected)


def test_without_reversal_weight_nothing_is_learned() -> None:
    loss = SoftTargetLoss(CurriculumTemperature())
    loss(drawn(0, 4, 6).requires_grad_(), drawn(1, 4, 6)).backward()
    assert loss.temperature.theta.grad == 0


def test_two_losses_learn_numbers_of_their_own() -> None:
    temperature = CurriculumTemperature()
    first, second = SoftTargetLoss(temperature), DecoupledKDLoss(temperature)
    assert first.temperature is not second.temperature


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 3))


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(drawn(3, 16, 4).float(), torch.arange(16) % 3), batch_size=8)


def distilled(loss: Any = None) -> DistillCallback:
    weight = Linear(0.2, 1.0, duration=3, over="epochs")
    loss = SoftTargetLoss(CurriculumTemperature(reversal_weight=weight)) if loss is None else loss
    return DistillCallback(teacher(), LogitsDistillation(loss, weight=0.5), student="network")


class Logged(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fitted(epochs: int, path: Path | None = None) -> tuple[Trainer, Student, DistillCallback, Logged]:
    module, callback, logged = Student(), distilled(), Logged()
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, logged], log_every_n_steps=1, **QUIET)
    trainer.fit(module, data(), ckpt_path=path)
    return trainer, module, callback, logged


def test_a_training_is_the_loop_by_hand() -> None:
    _, module, callback, logged = fitted(2)
    network, theta = Student().network, torch.ones((), requires_grad=True)
    optimizer, held = torch.optim.SGD(network.parameters(), lr=0.5), teacher()
    seen = []
    for epoch in range(2):
        reversal = 0.2 + 0.8 * epoch / 3
        for x, y in data():
            temperature = 1 + 20 * torch.sigmoid(theta)
            logits = network(x)
            logs = [(z / temperature).log_softmax(1) for z in (logits, held(x).detach())]
            kl = nn.functional.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2
            optimizer.zero_grad()
            theta.grad = None
            (nn.functional.cross_entropy(logits, y) + 0.5 * kl).backward()
            seen.append(temperature.item())
            optimizer.step()
            theta.data += 0.5 * reversal * theta.grad  # up: against the student
    for expected, value in zip(network.parameters(), module.network.parameters(), strict=True):
        torch.testing.assert_close(value, expected)
    state = callback.adapter_state()["adapters"]["logits"]
    torch.testing.assert_close(state["loss.temperature.theta"].cpu(), theta.detach())
    assert [entry["distill/logits_temperature"] for entry in logged.seen] == pytest.approx(seen, rel=1e-5)
    assert logged.seen[-1]["distill/logits_reversal_weight"] == pytest.approx(0.2 + 0.8 / 3)
    assert set(module.state_dict()) == {"network.weight", "network.bias"}


def test_a_resumed_training_is_the_straight_one(tmp_path: Path) -> None:
    _, straight, whole, _ = fitted(3)
    trainer, _, half, _ = fitted(1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, again, _ = fitted(3, tmp_path / "last.ckpt")
    for expected, value in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, value)
    thetas = [each.adapter_state()["adapters"]["logits"]["loss.temperature.theta"] for each in (whole, again, half)]
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


def test_a_second_fit_goes_on_with_the_number_of_the_first() -> None:
    _, module, callback, _ = fitted(1)
    learned = callback.adapter_state()["adapters"]["logits"]["loss.temperature.theta"].clone()
    assert learned != 1.0
    logged = Logged()
    Trainer(max_epochs=1, callbacks=[callback, logged], log_every_n_steps=1, **QUIET).fit(module, data())
    assert logged.seen[0]["distill/logits_temperature"] == pytest.approx(1 + 20 * float(learned.sigmoid()), rel=1e-6)


def test_two_owners_of_one_term_learn_numbers_of_their_own() -> None:
    term = LogitsDistillation(SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0)))
    values = []
    for seed in (1, 2):
        student, x = nn.Linear(4, 3), drawn(seed, 8, 4).float()
        with Distiller(student, teacher(), term, task_weight=0) as distiller:
            optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
            distiller.follow(optimizer)
            with distiller.record():
                student(x)
            distiller.loss().backward()
            optimizer.step()
            values.append(distiller.state_dict()["adapters"]["logits"]["loss.temperature.theta"].item())
    assert values[0] != values[1]
    assert term.loss.temperature.theta == 1


def test_the_parameter_is_handed_over_only_once_it_is_on_its_device() -> None:
    student, term = nn.Linear(4, 3), distilled(SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0))).terms[0]
    with Distiller(student, teacher(), term) as distiller:
        with pytest.raises(ValueError, match="`total` to be called before `parameters`"):
            distiller.parameters()
        with distiller.record():
            student(drawn(0, 8, 4).float())
        distiller.total(torch.zeros(()))
        assert [tuple(parameter.shape) for parameter in distiller.parameters()] == [()]


def test_losses_without_a_gradient_by_the_temperature_refuse_it() -> None:
    refusing = []
    for name in losses.__all__:
        kind = getattr(losses, name)
        settings = kind.__init__.__annotations__
        if "temperature" in settings and kind not in LEARNING:
            with pytest.raises(TypeError, match=f"`temperature` of {name} to be a number or a schedule"):
                kind(temperature=CurriculumTemperature())
            refusing.append(name)
    assert {"ReverseKLLoss", "ChannelWiseLoss", "MinifinetuningLoss", "BinarySoftTargetLoss"} <= set(refusing)


def cached(tmp_path: Path) -> DistillCallback:
    cache = TeacherCache.build(teacher(), data().dataset, tmp_path, top_k=2, progress=False)
    return DistillCallback(cache, distilled().terms[0], student="network")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: CurriculumTemperature(0.0), ValueError, "`minimum` to be greater than 0"),
        (lambda: CurriculumTemperature(4.0, 4.0), ValueError, "`maximum` to be greater than `minimum`"),
        (lambda: CurriculumTemperature("1"), TypeError, "`minimum` to be an int or a float"),
        (lambda: CurriculumTemperature(reversal_weight=-1.0), ValueError, "`reversal_weight` to be at least 0"),
        (
            lambda: FeatureDistillation("a", "b", SoftTargetLoss(CurriculumTemperature())),
            ValueError,
            "the temperature of SoftTargetLoss to be a number or a schedule in a term on layers.* LogitsDistillation",
        ),
        (
            lambda: SelfDistillation("a", "b", SoftTargetLoss(CurriculumTemperature())),
            ValueError,
            "the temperature of SoftTargetLoss to be a number or a schedule in a term on layers",
        ),
        (
            lambda: FusedLinearDistillation("a", "b", loss=SoftTargetLoss(CurriculumTemperature())),
            TypeError,
            "a number or a schedule in a FusedLinearDistillation.* Use SequenceDistillation",
        ),
        (
            lambda: Distiller(nn.Linear(4, 3), [teacher(), teacher()], distilled().terms[0], mix="probabilities"),
            ValueError,
            "as the temperature with mix='probabilities', but term 'logits' learns it",
        ),
        (lambda: losses.QueueSimilarityLoss(student_temperature=CurriculumTemperature()), TypeError, "no gradient"),
        (lambda: ReverseKLLoss(CurriculumTemperature()), TypeError, "Use a loss such as SoftTargetLoss"),
    ],
)
def test_bad_settings_and_places_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_cache_of_the_likeliest_classes_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, callbacks=cached(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="a cache of full outputs for term 'logits', whose temperature is learned"):
        trainer.fit(Student(), data())
