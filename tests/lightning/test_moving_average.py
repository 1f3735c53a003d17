"""A teacher that is the student's moving average."""

from __future__ import annotations

import copy
import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from plain_trainer import PLAIN
from processes import run_processes
from tiny import INPUTS, Classifier, Mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    CacheError,
    DistillCallback,
    Distiller,
    EMATeacher,
    FeatureDistillation,
    FusedLinearDistillation,
    TeacherCache,
    compat,
)
from lightning_distill.schedules import Linear

QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu", "num_sanity_val_steps": 0}


class Normalized(nn.Module):
    """A network with statistics, a counter and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.body, self.norm, self.head = nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mark", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.mark = ~self.mark
        return self.head(self.norm(self.body(x)).relu())


def batches(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, INPUTS, generator=generator) for _ in range(number)]


def trained(distiller: Distiller, student: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for x in data:
        with distiller.record():
            task = student(x).square().mean()
        optimizer.zero_grad()
        distiller.total(task).backward()
        optimizer.step()


def test_parameters_and_statistics_are_averaged_and_counters_copied() -> None:
    student = Normalized()
    expected = {name: value.clone() for name, value in [*student.named_parameters(), *student.named_buffers()]}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with Distiller(student, EMATeacher(0.75)) as distiller:
        distiller.follow(optimizer)
        for x in batches():
            trained(distiller, student, optimizer, [x])
            for name, value in [*student.named_parameters(), *student.named_buffers()]:
                old = expected[name].double() if value.is_floating_point() else value
                new = value.detach().double() if value.is_floating_point() else value
                expected[name] = 0.75 * old + 0.25 * new if value.is_floating_point() else value.clone()
        network = distiller.teacher.network
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-6, atol=1e-7)
        assert network.seen.item() == student.seen.item() == 24
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert student.training


def compiled_forward(network: Mlp) -> None:
    network.forward = torch.compile(network.forward, backend="eager")


def compiled_layer_forward(network: Mlp) -> None:
    network.body.forward = torch.compile(network.body.forward, backend="eager")


def bound_forward(network: Mlp) -> None:
    network.forward = types.MethodType(lambda module, x: module.head(module.act(module.body(x))), network)


def partial_forward(network: Mlp) -> None:
    network.forward = functools.partial(Mlp.forward, network)


def function_without_the_network(network: Mlp) -> None:
    scale = 1.0
    network.act.forward = lambda x: scale * x.relu()


CHANGES = (compiled_forward, compiled_layer_forward, bound_forward, partial_forward, function_without_the_network)


@pytest.mark.parametrize("change", CHANGES)
def test_the_average_of_a_student_with_another_forward_has_its_own_weights(change: Any) -> None:
    networks = []
    for changes in (False, True):
        student = Mlp(5)
        if changes:
            change(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        with Distiller(student, EMATeacher(0.75)) as distiller:
            distiller.follow(optimizer)
            trained(distiller, student, optimizer, batches())
        networks += [student, distiller.teacher.network]
    for network, other in zip(networks[:2], networks[2:], strict=True):
        torch.testing.assert_close(list(network.parameters()), list(other.parameters()))
        torch.testing.assert_close(network(batches()[0]), other(batches()[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_the_average_of_a_program_of_torchscript_has_its_own_weights() -> None:
    parameters = []
    for student in (Mlp(5), torch.jit.script(Mlp(5))):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        with Distiller(student, EMATeacher(0.75)) as distiller:
            distiller.follow(optimizer)
            trained(distiller, student, optimizer, batches())
        parameters.append([*student.parameters(), *distiller.teacher.network.parameters()])
    torch.testing.assert_close(parameters[1], parameters[0])


def enclosing_forward(network: Mlp) -> str:
    forward = network.forward
    network.forward = lambda x: 2 * forward(x)
    return "forward"


def default_argument(network: Mlp) -> str:
    network.body.scaled = lambda x, layer=network.body: 2 * layer(x)
    return "body.scaled"


@pytest.mark.parametrize("change", [enclosing_forward, default_argument])
def test_a_student_whose_copy_would_call_the_student_is_refused(change: Any) -> None:
    student = Mlp(5)
    name = change(student)
    words = rf"can copy, but its attribute '{name}' is a function that would call the student.*as a method"
    distiller = Distiller(student, EMATeacher(0.75))
    with pytest.raises(ValueError, match=words), distiller.record():
        student(batches()[0])


def test_accumulated_micro_batches_are_one_update() -> None:
    student = Mlp(5)
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with Distiller(student, EMATeacher(0.5)) as distiller:
        distiller.follow(optimizer)
        for x in batches(3):
            with distiller.record():
                task = student(x).square().mean()
            distiller.total(task).backward()
        optimizer.step()
        for name, value in distiller.teacher.network.state_dict().items():
            torch.testing.assert_close(value, 0.5 * before[name] + 0.5 * student.state_dict()[name])


def test_layers_of_the_average_can_be_read() -> None:
    student = Mlp(5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with Distiller(student, EMATeacher(0.9), FeatureDistillation("body", "body"), task_weight=0) as distiller:
        distiller.follow(optimizer)
        first, second = batches(2)
        with distiller.record():
            task = student(first).square().mean()
        assert distiller.total(task).item() == 0  # they are alike at first
        task.backward()
        optimizer.step()
        with distiller.record():
            task = student(second).square().mean()
        expected = (student.body(second) - distiller.teacher.network.body(second)).square().mean()
        torch.testing.assert_close(distiller.total(task), expected)
        assert expected > 0


def run_twice(stop: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train for four batches, all at once or saved and loaded after ``stop``."""
    student, data = Normalized(), batches()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    distiller = Distiller(student, EMATeacher(Linear(0.5, 0.9, duration=4, over="steps")))
    distiller.follow(optimizer)
    trained(distiller, student, optimizer, data[:stop])
    if stop is not None:
        saved = copy.deepcopy([student, optimizer.state_dict(), distiller.state_dict()])
        distiller.close()
        student = saved[0]
        optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
        optimizer.load_state_dict(saved[1])
        distiller = Distiller(student, EMATeacher(Linear(0.5, 0.9, duration=4, over="steps")))
        distiller.load_state_dict(saved[2])
        distiller.follow(optimizer)
        trained(distiller, student, optimizer, data[stop:])
    average = distiller.state_dict()["teacher"]["average"]
    return student.state_dict(), average, [value.item() for value in distiller.parts.values()]


def test_a_resumed_average_is_equal_to_the_bit() -> None:
    whole, resumed = run_twice(None), run_twice(2)
    for whole_run, later in zip(whole[:2], resumed[:2], strict=True):
        assert whole_run.keys() == later.keys()
        assert all(torch.equal(whole_run[name], later[name]) for name in whole_run)
    assert whole[2] == resumed[2]


def fit(path: object = None, epochs: int = 2) -> tuple[Trainer, DistillCallback, Classifier]:
    distill, module = DistillCallback(EMATeacher(0.5), student="model"), Classifier(Normalized())
    trainer = Trainer(max_epochs=epochs, callbacks=[distill], **QUIET)
    trainer.fit(module, loader(), ckpt_path=path)
    return trainer, distill, module


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.cat(batches()), torch.arange(24) % 3), batch_size=6)


def test_a_resumed_fit_has_the_average_of_the_checkpoint_to_the_bit(tmp_path) -> None:
    _, whole, whole_run = fit()
    trainer, _, _ = fit(epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, later = fit(tmp_path / "last.ckpt")
    pairs = ((whole_run, later), (whole.teacher.network, resumed.teacher.network))
    for first, second in pairs:
        values = second.state_dict()
        assert all(torch.equal(value, values[name]) for name, value in first.state_dict().items())
    assert whole_run.state_dict().keys() == Classifier(Normalized()).state_dict().keys()


@pytest.mark.distributed
def test_the_average_is_the_same_in_all_processes_with_its_statistics(tmp_path) -> None:
    ended = run_processes(Path(__file__).parents[1] / "teachers_in_processes.py", "average", 2, tmp_path)
    assert ended[0] == ended[1]
    assert ended[0]["norm.num_batches_tracked"] == 4
    assert ended[0]["norm.running_mean"] != [0.0] * 5


def test_an_average_that_was_first_asked_in_inference_mode_can_be_updated() -> None:
    student = Normalized()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with Distiller(student, EMATeacher(0.5)) as distiller:
        distiller.follow(optimizer)
        with torch.inference_mode(), distiller.record(needs_grad=False):
            student(batches()[0])
        with torch.inference_mode():
            assert len(distiller.agree()) == 1
        trained(distiller, student, optimizer, batches(2))
        assert not torch.equal(distiller.teacher.network.body.weight, student.body.weight)


def test_strategies_that_shard_the_student_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_strategy", lambda trainer, name: name == "DeepSpeedStrategy")
    with pytest.raises(MisconfigurationException, match="DDP or one device with an EMATeacher, but got DeepSpeed"):
        fit()


def test_the_average_predicts_after_the_fit() -> None:
    _, distill, module = fit(epochs=1)
    network = distill.teacher.network
    assert network(torch.ones(2, INPUTS)).shape == (2, 3)
    assert not torch.equal(network.body.weight, module.model.body.weight)


def test_the_decay_is_logged_as_a_schedule() -> None:
    distill = DistillCallback(EMATeacher(Linear(0.0, 1.0)), student="student")
    with Distiller(Mlp(5), distill.teacher) as distiller:
        distiller.advance(0, 0, 0.25)
        assert distiller.scheduler.values == {"teacher_decay": 0.25}


def test_an_average_without_an_optimizer_to_follow_is_refused() -> None:
    student = Mlp(5)
    with Distiller(student, EMATeacher()) as distiller:
        with distiller.record():
            task = student(batches()[0]).mean()
        with pytest.raises(
            ValueError, match=r"an optimizer for the EMATeacher to follow.*distiller.follow\(optimizer\)"
        ):
            distiller.total(task)


def test_an_average_belongs_to_one_training() -> None:
    teacher, students = EMATeacher(), [Mlp(5), Mlp(6)]
    with Distiller(students[0], teacher) as distiller:
        optimizer = torch.optim.SGD(students[0].parameters(), lr=0.1)
        distiller.follow(optimizer)
        trained(distiller, students[0], optimizer, batches(1))
        with pytest.raises(ValueError, match="each EMATeacher to belong to one training"):
            Distiller(students[1], teacher)


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (Mlp(5).bfloat16(), "'body.weight' is in bfloat16, where small updates are lost"),
        (nn.LazyLinear(3), "has no values yet"),
    ],
)
def test_students_that_cannot_be_averaged_are_refused(student: nn.Module, words: str) -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    with Distiller(student, EMATeacher()) as distiller:
        distiller.follow(torch.optim.SGD(parameters, lr=0.1))
        distiller._step.source.meet(distiller._step.student)
        with pytest.raises(ValueError, match=words):
            distiller._step.source.before_step()


def test_a_student_that_changes_its_parameters_is_refused() -> None:
    student = Mlp(5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with Distiller(student, EMATeacher()) as distiller:
        distiller.follow(optimizer)
        trained(distiller, student, optimizer, batches(1))
        student.head = nn.Sequential(student.head)
        with pytest.raises(ValueError, match=r"to keep its parameters and buffers.*head"):
            trained(distiller, student, optimizer, batches(1))


def test_a_saved_average_of_another_student_is_refused() -> None:
    student = Mlp(5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with Distiller(student, EMATeacher()) as distiller:
        distiller.load_state_dict({"teacher": {"average": {"weight": torch.zeros(1)}}})
        distiller.follow(optimizer)
        with pytest.raises(ValueError, match="saved average of the EMATeacher to fit the student"):
            trained(distiller, student, optimizer, batches(1))


def test_settings_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="`decay` to be"):
        EMATeacher(1.5)
    with pytest.raises(ValueError, match="it has no weights yet"):
        EMATeacher()(torch.ones(1))
    with pytest.raises(ValueError, match="`teacher_dtype` to be None with an EMATeacher"):
        Distiller(Mlp(5), EMATeacher(), teacher_dtype="bfloat16")
    with pytest.raises(ValueError, match="`teacher` to be a network for term"):
        Distiller(Mlp(5), EMATeacher(), FusedLinearDistillation("head", "head"))
    with pytest.raises(CacheError, match="to be a module, whose outputs stay the same, but got EMATeacher"):
        TeacherCache.build(EMATeacher(), [torch.ones(INPUTS)], tmp_path / "cache")


def test_the_student_of_an_average_is_one_network() -> None:
    distill = DistillCallback(EMATeacher(), student=["model.body", "model.head"])
    with pytest.raises(ValueError, match="student of an EMATeacher to be one network"):
        Trainer(max_epochs=1, callbacks=[distill], **QUIET).fit(Classifier(), loader())
