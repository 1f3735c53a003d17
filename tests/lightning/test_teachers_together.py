"""Several teachers that are not all networks: averages, the student itself and a cache beside networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from plain_trainer import PLAIN
from tiny import Classifier, Mlp, dataset, loader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import (
    ContrastiveRepresentationLoss,
    DistillCallback,
    Distiller,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    SelfTeacher,
    TeacherCache,
)
from lightning_distill.guidance.runs import distill_callback
from lightning_distill.schedules import Linear
from lightning_distill.teachers.group import members

STEPS = 4


def soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    p, log_q = (teacher / 4).softmax(-1), (student / 4).log_softmax(-1)
    return 16 * (p * (p.log() - log_q)).sum(-1).mean()


def batches() -> list[tuple[Tensor, Tensor]]:
    inputs, labels = dataset(8 * STEPS).tensors
    return list(zip(inputs.split(8), labels.split(8), strict=True))


class Loop:
    """A plain loop with a Distiller.

    Args:
        teacher: Makes the teachers from the student.
        state: The state of an earlier loop.
    """

    def __init__(self, teacher: Any, state: Any = None, **settings: Any) -> None:
        self.student = Mlp(5)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        self.distiller = Distiller(self.student, teacher(self.student), **settings)
        if state is not None:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.distiller.load_state_dict(state["distiller"])
        self.distiller.follow(self.optimizer)

    def train(self, data: Any) -> Loop:
        for batch in data:
            x, y = batch.batch if hasattr(batch, "batch") else batch
            with self.distiller.record():
                task = F.cross_entropy(self.student(x), y)
            self.optimizer.zero_grad()
            self.distiller.total(task, batch).backward()
            self.optimizer.step()
        return self

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("student", "optimizer", "distiller")}
        return copy.deepcopy(parts)


def by_hand(decays: tuple[float, ...], shares: tuple[float, ...], itself: bool = False) -> dict[str, Tensor]:
    """Averages of the student and then a network as teachers, or the student with other inputs and a network."""
    student, network = Mlp(5), Mlp(7, seed=1)
    averages = [copy.deepcopy(student) for _ in decays]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        logits = student(x)
        with torch.no_grad():
            shown = -x if itself else x
            answers = [average(shown) for average in averages] + ([student(shown)] if itself else []) + [network(shown)]
        losses = [share * soft_targets(logits, answer) for share, answer in zip(shares, answers, strict=True)]
        optimizer.zero_grad()
        (F.cross_entropy(logits, y) + sum(losses)).backward()
        optimizer.step()
        for average, decay in zip(averages, decays, strict=True):
            for old, new in zip(average.parameters(), student.parameters(), strict=True):
                old.data = decay * old.data + (1 - decay) * new.data
    return student.state_dict()


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        message = lambda m, n=name: f"{n}: {m}"  # noqa: E731
        torch.testing.assert_close(got[name].cpu(), value.cpu(), rtol=1e-6, atol=1e-6, msg=message)


def averages_and_network(student: Mlp) -> list[Any]:
    return [EMATeacher(0.5), EMATeacher(0.9), Mlp(7, seed=1)]


def test_two_averages_and_a_network_are_the_loop_by_hand() -> None:
    loop = Loop(averages_and_network, teacher_weights=[1, 2, 1]).train(batches())
    close(loop.student.state_dict(), by_hand((0.5, 0.9), (0.25, 0.5, 0.25)))


def test_the_student_itself_and_a_network_are_the_loop_by_hand() -> None:
    loop = Loop(lambda student: [SelfTeacher(student), Mlp(7, seed=1)], teacher_inputs=lambda x: -x).train(batches())
    close(loop.student.state_dict(), by_hand((), (0.5, 0.5), itself=True))


def test_a_resumed_loop_with_two_averages_is_the_straight_one_to_the_bit() -> None:
    terms = lambda: [LogitsDistillation(), FeatureDistillation("body", "body", weight=0.5)]  # noqa: E731
    straight = Loop(averages_and_network, terms=terms()).train(batches())
    first = Loop(averages_and_network, terms=terms()).train(batches()[:2])
    second = Loop(averages_and_network, state=first.state(), terms=terms()).train(batches()[2:])
    assert straight.state()["distiller"]["teacher"].keys() == {"0", "1"}
    for name, value in straight.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name]), name
    for number in ("0", "1"):
        values = (each.state()["distiller"]["teacher"][number]["average"] for each in (straight, second))
        assert all(torch.equal(*pair) for pair in zip(*(value.values() for value in values), strict=True))


@pytest.mark.parametrize(
    ("saved", "resumed", "words"),
    [
        (averages_and_network, lambda _: [Mlp(7), EMATeacher(), EMATeacher()], r"\['1', '2'\].* but got \['0', '1'\]"),
        (averages_and_network, lambda _: EMATeacher(), r"of one EMATeacher, but got that of a list of teachers"),
        (lambda _: EMATeacher(), averages_and_network, r"but got \['average'\]\. Pass the teachers in the order"),
    ],
    ids=["another order", "one of a list", "a list after one"],
)
def test_the_averages_of_other_teachers_are_refused(saved: Any, resumed: Any, words: str) -> None:
    state = Loop(saved).train(batches()[:1]).state()
    with pytest.raises(ValueError, match=words):
        Loop(resumed, state=state)


@pytest.mark.parametrize("teacher", [lambda: EMATeacher(decay=1.0), lambda: [Mlp(7), EMATeacher(decay=1.0)]])
def test_an_average_that_is_set_between_two_fits_begins_at_the_student(teacher: Any) -> None:
    module = Classifier()
    callback = DistillCallback([EMATeacher(decay=0.5), Mlp(7)])
    Trainer(callbacks=[callback], max_epochs=1, **PLAIN).fit(module, loader())
    begin = copy.deepcopy(module.model.state_dict())
    callback.teacher = teacher()
    Trainer(callbacks=[callback], max_epochs=1, **PLAIN).fit(module, loader())
    average = next(each for each in members(callback.teacher) if isinstance(each, EMATeacher))
    close(average.network.state_dict(), begin)


@pytest.mark.parametrize("settings", [{"mix": "probabilities"}, {"mix": "logits"}, {"teacher_weights": "entropy"}])
def test_a_cache_of_a_part_of_the_classes_cannot_be_mixed(tmp_path: Path, settings: dict[str, Any]) -> None:
    data = dataset(8)
    cache = TeacherCache.build(Mlp(6, seed=2), data, tmp_path / "cache", progress=False, top_k=2)
    callback = DistillCallback([cache, Mlp(7)], **settings)
    with pytest.raises(ValueError, match=r"scores of all classes of each teacher with .*Build it without top_k"):
        Trainer(callbacks=[callback], max_epochs=1, **PLAIN).fit(Classifier(), DataLoader(data, batch_size=4))


def test_a_cache_and_a_network_are_two_networks(tmp_path: Path) -> None:
    data = dataset(8 * STEPS)
    cache = TeacherCache.build(
        Mlp(6, seed=2), data, tmp_path / "cache", dtype="float32", layers=["body"], progress=False
    )
    terms = lambda: [LogitsDistillation(), FeatureDistillation("body", "body", weight=0.5)]  # noqa: E731
    torch.manual_seed(0)
    live = Loop(lambda _: [Mlp(6, seed=2), Mlp(7, seed=1)], terms=terms()).train(DataLoader(data, 8))
    torch.manual_seed(0)
    cached = Loop(lambda _: [cache, Mlp(7, seed=1)], terms=terms()).train(DataLoader(cache.attach(data), 8))
    close(cached.student.state_dict(), live.student.state_dict())
    close(cached.distiller.terms[1].state_dict(), live.distiller.terms[1].state_dict())


def test_the_rows_that_a_cache_knows_serve_the_other_teachers_too(tmp_path: Path) -> None:
    data = dataset(16)
    cache = TeacherCache.build(Mlp(6, seed=2), data, tmp_path / "cache", layers=["body"], progress=False)
    term = FeatureDistillation("body", "body", ContrastiveRepresentationLoss(negatives=5, width=4))
    callback = DistillCallback([Mlp(7, seed=1), cache], term, student="model")
    Trainer(max_epochs=1, callbacks=[callback], **PLAIN).fit(Classifier(), DataLoader(data, 8))
    saved = callback.adapter_state()["adapters"]["body"]
    assert saved["learned.0.teacher_memory"].shape == saved["learned.1.teacher_memory"].shape == (16, 4)


def test_a_copy_of_a_callback_has_averages_of_its_own() -> None:
    callback = DistillCallback([EMATeacher(0.5), Mlp(7, seed=1)], student="model")
    other = copy.deepcopy(callback)
    assert other.teacher[0] is not callback.teacher[0]
    assert other.teacher[1] is callback.teacher[1]
    Trainer(max_steps=2, callbacks=[callback], **PLAIN).fit(Classifier(), loader())
    assert callback.teacher[0].network is not None
    assert other.teacher[0].network is None


def test_each_run_of_a_comparison_has_averages_of_its_own() -> None:
    average, network = EMATeacher(0.5), Mlp(7, seed=1)
    callback = distill_callback({"teacher": [average, network], "terms": [LogitsDistillation()]})
    assert callback.teacher[0] is not average
    assert callback.teacher[1] is network


def test_a_decay_in_a_list_has_the_number_of_its_teacher_in_the_logs() -> None:
    callback = DistillCallback([Mlp(7, seed=1), EMATeacher(Linear(0.1, 0.9))], student="model")
    trainer = Trainer(max_steps=2, callbacks=[callback], log_every_n_steps=1, **PLAIN)
    trainer.fit(Classifier(), loader())
    assert "distill/teacher_1_decay" in trainer.callback_metrics


def test_a_list_of_one_teacher_is_that_teacher() -> None:
    average = EMATeacher()
    assert DistillCallback([average]).teacher is average


class OwnForward(Distiller):
    def teacher_forward(self, call: Any) -> Any:
        return self.teacher(-call.args[0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda cache: [cache, cache], ValueError, "`teacher` to hold at most one cache"),
        (lambda cache: [EMATeacher(), 3], TypeError, "`teacher` to hold modules only, but got int"),
        (lambda cache: [[EMATeacher()], Mlp(7)], TypeError, "`teacher` to hold modules only, but got list"),
    ],
    ids=["two caches", "a number", "a list"],
)
def test_lists_that_cannot_teach_are_refused(tmp_path: Path, make: Any, error: type[Exception], words: str) -> None:
    cache = TeacherCache.build(Mlp(6, seed=2), dataset(4), tmp_path / "cache", progress=False)
    with pytest.raises(error, match=words):
        Distiller(Mlp(5), make(cache))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"route": 1}, "to be a list of networks with a route, but got TeacherGroup"),
        ({"teacher_weights": [1.0]}, "one weight for each of the 2 teachers, but got 1"),
        ({"teacher_dtype": "bfloat16"}, "`teacher_dtype` to be None with an EMATeacher"),
        ({"terms": LogitsDistillation(weight="balanced")}, "the student and its average are equal at first"),
    ],
    ids=["route", "weights", "dtype", "balanced"],
)
def test_settings_that_do_not_fit_such_a_list_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distiller(Mlp(5), [EMATeacher(), Mlp(7)], **settings)


def test_a_teacher_s_forward_of_the_user_s_own_is_refused() -> None:
    with pytest.raises(ValueError, match="`teacher_forward` not to be overridden where the teachers are not all"):
        OwnForward(Mlp(5), [EMATeacher(), Mlp(7)])
