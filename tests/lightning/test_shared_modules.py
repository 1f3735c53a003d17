"""A teacher and a student that share frozen modules, and teachers that others have placed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from plain_trainer import PLAIN
from tiny import INPUTS, Classifier, dataset
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, Distiller, MutualLearning

X = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(2))
QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu"}


def make_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))


def pair(shares: str = "modules") -> tuple[nn.Sequential, nn.Sequential]:
    """A student and a teacher with one frozen encoder, which drops and keeps statistics, or with its parameters."""
    encoder = make_encoder()
    encoder.requires_grad_(False)
    own = encoder
    if shares == "parameters":
        own = make_encoder()
        for index in (0, 1):
            own[index].weight, own[index].bias = encoder[index].weight, encoder[index].bias
    return nn.Sequential(own, nn.Linear(6, 3)), nn.Sequential(encoder, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


SHARES = pytest.mark.parametrize("shares", ["modules", "parameters"])


@pytest.mark.parametrize("trains", [True, False])
def test_a_shared_encoder_keeps_the_mode_that_the_student_has(trains: bool) -> None:
    student, teacher = pair()
    student.train(trains)
    modes = []
    student[0][2].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    with Distiller(student, teacher) as distiller:
        for _ in range(2):
            with distiller.record():
                task = student(X).mean()
            distiller.total(task).backward()
        assert all(module.training == trains for module in student.modules())
        assert not teacher[1].training
        assert not teacher[1].weight.requires_grad
    assert modes == [trains, False] * 2  # the student's call, then the teacher's
    assert all(module.training == trains for module in student.modules())
    assert teacher[1].weight.requires_grad


@pytest.mark.filterwarnings("ignore:Found 4 module")  # the user has put them in eval mode
def test_a_fit_with_a_shared_encoder_equals_one_with_a_copy() -> None:
    states = []
    for shares in (True, False):
        torch.manual_seed(3)
        student, teacher = pair()
        student[0].eval()
        if not shares:
            copied = nn.Sequential(make_encoder(), *teacher[1:])
            copied.load_state_dict(teacher.state_dict())
            teacher = copied
        module = Classifier(student)
        module.configure_optimizers = lambda student=student: torch.optim.SGD(student[1].parameters(), lr=0.1)
        distill = DistillCallback(teacher, student="model")
        Trainer(max_epochs=2, callbacks=[distill], **QUIET).fit(module, DataLoader(dataset(), batch_size=8))
        states.append(student.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@SHARES
def test_a_precision_of_the_teacher_alone_is_refused_where_it_shares_parameters(shares: str) -> None:
    student, teacher = pair(shares)
    with Distiller(student, teacher, teacher_dtype="bfloat16") as distiller:
        with distiller.record():
            task = student(X).mean()
        with pytest.raises(ValueError, match=r"`teacher_dtype` to be None for a teacher that shares param.*deepcopy"):
            distiller.total(task)
    assert student[0][0].weight.dtype == torch.float32


@SHARES
def test_a_shared_encoder_that_is_unfrozen_in_mid_training_is_refused(shares: str) -> None:
    student, teacher = pair(shares)
    with Distiller(student, teacher) as distiller:
        for unfreezes in (False, True):
            student[0].requires_grad_(unfreezes)
            with distiller.record():
                task = student(X).mean()
            if unfreezes:
                with pytest.raises(ValueError, match="teacher and student share to stay frozen, but they are trained"):
                    distiller.total(task)
            else:
                distiller.total(task)


def by_new_parameter(student: nn.Linear, teacher: nn.Linear) -> None:
    student.weight = nn.Parameter(teacher.weight.detach())


def by_data(student: nn.Linear, teacher: nn.Linear) -> None:
    student.weight.data = teacher.weight.data


def by_assigned_state(student: nn.Linear, teacher: nn.Linear) -> None:
    student.load_state_dict(teacher.state_dict(), assign=True)


@pytest.mark.parametrize("share", [by_new_parameter, by_data, by_assigned_state])
def test_trained_parameters_in_the_memory_of_the_teacher_are_refused(share: Any) -> None:
    student, teacher = nn.Linear(INPUTS, 3), nn.Linear(INPUTS, 3)
    share(student, teacher)
    words = r"`teacher` to share no parameter with the student, but both train 'weight'.*copy.deepcopy"
    with pytest.raises(ValueError, match=words):
        Distiller(student, teacher)
    with pytest.raises(ValueError, match=words):
        Trainer(callbacks=[DistillCallback(teacher)], max_steps=1, **QUIET).fit(
            Classifier(student), DataLoader(dataset(), batch_size=8)
        )
    with pytest.raises(ValueError, match=r"`students` to share no parameters, but students 0 and 1 both have 'weight'"):
        MutualLearning([student, teacher])
    student.requires_grad_(False)
    Distiller(student, teacher).close()


def test_a_teacher_that_another_library_has_placed_is_not_moved() -> None:
    student, teacher = nn.Linear(INPUTS, 3), nn.Linear(INPUTS, 3)
    teacher.hf_device_map = {"": "cpu"}
    moved = []
    teacher.to = lambda *args, **kwargs: moved.append(args)
    with Distiller(student, teacher) as distiller:
        with distiller.record():
            task = student(X).mean()
        distiller.total(task)
    assert moved == []
    with Distiller(student, teacher, teacher_dtype="bfloat16") as distiller:
        with distiller.record():
            task = student(X).mean()
        with pytest.raises(ValueError, match="the teacher to be on one device with `teacher_dtype`"):
            distiller.total(task)


def test_a_teacher_in_half_precision_computes_in_it_beside_a_student_in_single() -> None:
    student, teacher = nn.Linear(INPUTS, 3), nn.Linear(INPUTS, 3).to(torch.float16)
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with Distiller(student, teacher) as distiller:
        with distiller.record():
            task = student(X).mean()
        total = distiller.total(task)
    assert seen == [torch.float16]
    assert total.dtype == torch.float32
