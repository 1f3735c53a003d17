"""Losses with parts of their own beyond one map: published values, what trains which part, and words of errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_case import golden_arrays, golden_index
from torch import Tensor

from lightning_distill import FactorTransferLoss, functional, losses

pytestmark = pytest.mark.tensors


def built(loss: losses.DistillationLoss, *shapes: tuple[int, ...]) -> Any:
    loss.build(*(torch.Size(shape) for shape in (shapes if len(shapes) == 2 else shapes * 2)))
    return loss.double()


def tensors_of(entry: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}


# Factor transfer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("factor_transfer"), ids=lambda entry: entry["case"])
def test_factor_transfer_is_the_published_one_of_maps_with_one_channel(entry: dict[str, Any]) -> None:
    """The reference first takes the mean power over the channels; the paper compares whole factors, and so do we."""
    tensors, powers = tensors_of(entry), entry["hyperparameters"]
    student = tensors["student_feat"].requires_grad_()
    smaller = torch.nn.functional.adaptive_avg_pool2d(student, tensors["teacher_feat"].shape[2:])
    collapsed = [feature.pow(powers["p1"]).mean(1, keepdim=True) for feature in (smaller, tensors["teacher_feat"])]

    value = functional.factor_transfer(*collapsed, power=powers["p2"], reduction="mean")
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_feat"], **tolerance)


def gradients(loss: FactorTransferLoss, **weights: float) -> dict[str, bool]:
    """Whether each network of the loss, and the student, learn at these weights."""
    for name, weight in weights.items():
        setattr(loss, name, weight)
    loss.zero_grad()
    student = torch.ones(2, 3, 4, 4, dtype=torch.float64).cumsum(2).requires_grad_()
    teacher = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss(student, teacher).backward()
    learns = {
        name: any((parameter.grad != 0).any() for parameter in network.parameters() if parameter.grad is not None)
        for name, network in loss.named_children()
    }
    return {**learns, "student": bool((student.grad != 0).any())}


def test_the_paraphraser_learns_from_the_restored_feature_and_the_translator_from_the_factor() -> None:
    loss = built(FactorTransferLoss(), (2, 3, 4, 4), (2, 6, 4, 4))

    first = gradients(loss, factor_weight=0.0, reconstruction_weight=1.0)
    second = gradients(loss, factor_weight=1.0, reconstruction_weight=0.0)

    assert first == {"translator": False, "paraphraser": True, "restorer": True, "student": False}
    assert second == {"translator": True, "paraphraser": False, "restorer": False, "student": True}


def test_the_paraphraser_learns_to_restore_the_teachers_feature() -> None:
    torch.manual_seed(0)
    loss = built(FactorTransferLoss(factor_weight=0.0), (16, 3), (16, 6))
    teacher = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    student = torch.randn(16, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        values.append(value.item())

    assert values[-1] < 0.1 * values[0]


def test_the_length_of_a_factor_changes_nothing() -> None:
    student, teacher = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)

    values = [functional.factor_transfer(scale * student, teacher / scale) for scale in (1.0, 1e3)]

    torch.testing.assert_close(*values)


def test_a_factor_of_zeros_stays_zero() -> None:
    student = torch.zeros(1, 4, requires_grad=True)
    value = functional.factor_transfer(student, torch.tensor([[3.0, 0.0, 4.0, 0.0]]), power=2.0)
    value.sum().backward()

    assert value.item() == pytest.approx(1 / 4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rate": 0.0}, ValueError, r"Expected `rate` to be greater than 0, but got rate=0\.0\."),
        ({"power": 0.5}, ValueError, r"Expected `power` to be at least 1, but got power=0\.5\."),
        ({"factor_weight": -1.0}, ValueError, r"Expected `factor_weight` to be at least 0, but got factor_weight=-1"),
        ({"reconstruction_weight": "1"}, TypeError, r"Expected `reconstruction_weight` to be an int or a float"),
    ],
)
def test_bad_settings_of_factor_transfer_raise(settings: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FactorTransferLoss(**settings)


def test_factors_without_an_inner_dimension_raise() -> None:
    with pytest.raises(ValueError, match=r"Expected factors to have an inner dimension, but got shape \(3,\)\."):
        functional.factor_transfer(torch.ones(3), torch.ones(3))
