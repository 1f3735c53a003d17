"""Every public loss with a softmax where a score is minus infinity: a probability of 0."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES
from loss_case import LossCase, labels_of
from torch import Tensor

from lightning_distill import losses

pytestmark = pytest.mark.tensors

SOFTMAX = [
    case
    for case in CASES
    if (case.on_logits and case.loss is not losses.LogitMSELoss)
    or case.name in ("kl", "kl_over_positions", "attention_kl")
]
# Where an impossible class still is one of those that the loss averages over or correlates.
COUNTS_CLASSES = ("DISTLoss", "MultiLevelLogitLoss", "BinarySoftTargetLoss", "QualityFocalLoss")
every_case = pytest.mark.parametrize("case", SOFTMAX, ids=str)
every_temperature = pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])


def softened(case: LossCase, temperature: float) -> torch.nn.Module:
    settings = dict(case.settings)
    if case.loss is losses.MultiLevelLogitLoss:
        settings["temperatures"] = (temperature,)
    elif hasattr(case.loss(**settings), "temperature"):
        settings["temperature"] = temperature
    return case.make(**settings)


def inputs(case: LossCase, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, int]:
    """Both models' scores with one class more than the row's, and the dimension of the classes."""
    dim = case.settings.get("class_dim", case.settings.get("channel_dim"))
    rank = len(case.student_shape)
    last = rank < 4 or case.loss is losses.AttentionMapLoss
    dim = (dim if dim is not None else -1 if last else 1) % rank
    shape = list(case.student_shape)
    shape[dim] += 1
    student, teacher = (
        torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    return student, teacher, dim


def value_and_gradient(loss: torch.nn.Module, student: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest)
    value.backward()
    return value.detach(), student.grad


@every_temperature
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@every_case
def test_value_and_gradient_are_finite(case: LossCase, who: str, dtype: torch.dtype, temperature: float) -> None:
    student, teacher, dim = inputs(case, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if who != "teacher":
        student.select(dim, -1).fill_(-math.inf)
    if who != "student":
        teacher.select(dim, -1).fill_(-math.inf)

    value, gradient = value_and_gradient(softened(case, temperature), student.float(), teacher)

    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if who == "both":
        assert (gradient.select(dim, -1) == 0).all()


@every_temperature
@pytest.mark.parametrize("case", [c for c in SOFTMAX if c.loss.__name__ not in COUNTS_CLASSES], ids=str)
def test_a_class_impossible_to_both_does_not_count(case: LossCase, temperature: float) -> None:
    student, teacher, dim = inputs(case)
    rest = [tensor.narrow(dim, 0, tensor.shape[dim] - 1) for tensor in (student, teacher)]
    labels = [labels_of(rest[1], dim)] if case.loss.needs_labels else []
    loss = softened(case, temperature)
    expected, expected_gradient = value_and_gradient(loss, *rest, *labels)
    for tensor in (student, teacher):
        tensor.select(dim, -1).fill_(-math.inf)

    value, gradient = value_and_gradient(loss, student, teacher, *labels)

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient.narrow(dim, 0, gradient.shape[dim] - 1), expected_gradient)


def test_a_class_impossible_to_the_student_alone_costs_much() -> None:
    student, teacher = torch.tensor([[1.0, -math.inf, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])

    assert losses.SoftTargetLoss()(student, teacher) > 1e20
    assert losses.TotalVariationLoss()(student, teacher) <= 1


# The relations between rows and classes need probabilities, which a row without a possible class does not have.
@pytest.mark.parametrize("case", [c for c in SOFTMAX if c.loss.__name__ not in COUNTS_CLASSES[:2]], ids=str)
def test_rows_of_impossible_classes_alone_are_finite(case: LossCase) -> None:
    student, teacher, _dim = inputs(case)
    student[0], teacher[0] = -math.inf, -math.inf

    value, gradient = value_and_gradient(case.build(), student, teacher)

    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
