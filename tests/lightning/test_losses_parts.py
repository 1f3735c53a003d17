"""Losses with parts of their own beyond one map: published values, what trains which part, and words of errors."""

from __future__ import annotations

from typing import Any

import oracle_features
import oracle_learned
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_index
from parts_nets import Network, built, one_step, tensors_of
from torch import Tensor, nn

from lightning_distill import (
    Call,
    Distiller,
    FactorTransferLoss,
    FeatureDistance,
    HierarchicalContextLoss,
    ReusedClassifierDistillation,
    ReviewDistillation,
    Tap,
    functional,
)

pytestmark = pytest.mark.tensors


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


# Review -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("reviewkd_hcl"), ids=lambda entry: entry["case"])
def test_hierarchical_context_added_over_layers_is_the_published_loss(entry: dict[str, Any]) -> None:
    tensors = tensors_of(entry)
    names = [name.removeprefix("student_") for name in entry["student_inputs"]]
    students = [tensors[f"student_{name}"].requires_grad_() for name in names]

    loss = HierarchicalContextLoss()
    value = sum(loss(student, tensors[f"teacher_{name}"]) for name, student in zip(names, students, strict=True))
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    for name, student in zip(names, students, strict=True):
        torch.testing.assert_close(student.grad, tensors[f"grad_student_{name}"], **tolerance)


def test_a_side_that_is_smaller_than_a_level_stays_as_it_is() -> None:
    """A map of one row is a row of tokens."""
    student, teacher = torch.randn(2, 3, 7, 4, dtype=torch.float64)

    row = functional.hierarchical_context(*(feature.mT[:, :, None] for feature in (student, teacher)))

    torch.testing.assert_close(row, functional.hierarchical_context(student, teacher))


def test_a_masked_cell_is_the_average_of_its_positions_that_count() -> None:
    """Here every cell has positions that count, all of one value: hiding others changes nothing."""
    cells = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    student, teacher = cells.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.zeros(2, 3, 4, 4).double()
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, ::2, 1::2] = True

    values = [functional.hierarchical_context(student, teacher, levels=(2, 1), mask=each) for each in (None, mask)]

    torch.testing.assert_close(*values)


def maps(channels: tuple[int, ...], seed: int) -> dict[Any, Tensor]:
    """A pyramid of maps: 5 x 6, 3 x 3, 2 x 1."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(5, 6), (3, 3), (2, 1)]
    pairs = zip(channels, sizes, strict=True)
    return {
        (f"layer{index}", "output"): torch.randn(4, wide, *size, dtype=torch.float64, generator=generator)
        for index, (wide, size) in enumerate(pairs)
    }


def review_of(student: Call, teacher: Call, **settings: Any) -> ReviewDistillation:
    layers = ["layer0", "layer1", "layer2"]
    term = ReviewDistillation(layers, layers, **settings)
    torch.manual_seed(3)
    term.build(student, [teacher])
    for parameter in term.parameters():
        nn.init.normal_(parameter, std=0.5)
    return term


def test_review_equals_the_oracle() -> None:
    students, teachers = maps((2, 3, 4), 0), maps((3, 5, 2), 1)
    calls = [Call.from_outputs(features=features) for features in (students, teachers)]
    term = review_of(*calls, channels=3)
    parameters = {name: value.detach().numpy() for name, value in term.adapters[0].state_dict().items()}

    fused = oracle_learned.review([feature.numpy() for feature in students.values()], parameters)
    pairs = zip(fused, teachers.values(), strict=True)
    expected = sum(oracle_features.hierarchical_context(feature, target.numpy()) for feature, target in pairs)

    assert term(*calls).item() == pytest.approx(expected, rel=1e-9)


def test_every_part_and_every_layer_learns_from_a_review() -> None:
    students, teachers = maps((2, 3, 4), 0), maps((3, 5, 2), 1)
    for feature in students.values():
        feature.requires_grad_()
    calls = [Call.from_outputs(features=features) for features in (students, teachers)]
    term = review_of(*calls)

    term(*calls).backward()

    assert all((feature.grad != 0).any() for feature in students.values())
    assert all((parameter.grad != 0).any() for parameter in term.parameters())
    assert term.adapters[0].squeeze[0][0].out_channels == 4


def test_review_resizes_the_teachers_maps_and_takes_other_losses() -> None:
    students = maps((2, 3, 4), 0)
    teachers = {key: F.interpolate(feature, scale_factor=2) for key, feature in maps((3, 5, 2), 1).items()}
    calls = [Call.from_outputs(features=features) for features in (students, teachers)]
    small = [calls[0], Call.from_outputs(features=maps((3, 5, 2), 1))]
    term = review_of(*calls, loss=FeatureDistance("mse"))

    torch.testing.assert_close(term(*calls), term(*small))


def test_a_review_of_several_teachers_has_parts_for_each() -> None:
    term = ReviewDistillation(["norm", "body"], ["norm", "body"])

    (owned,) = one_step([Network(4), Network(5, seed=2)], term)

    assert len(owned.adapters) == 2
    assert owned.adapters[1].spread[0][0].out_channels == 5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReviewDistillation(["a", "b"], ["a"]), ValueError, r"name the same number of layers, at least one"),
        (lambda: ReviewDistillation(["a"], ["a"], channels=0), ValueError, r"`channels` to be at least 1, but got"),
        (lambda: ReviewDistillation(["a"], ["a"], channels=1.5), TypeError, r"`channels` to be an int"),
        (
            lambda: ReviewDistillation(["a"], ["a"], FactorTransferLoss()),
            TypeError,
            r"`loss` to be a loss on two maps without parameters of its own, but got FactorTransferLoss.* Use it in a",
        ),
        (lambda: HierarchicalContextLoss(levels=(4, 0)), ValueError, r"Expected `levels` to be at least 1, but got"),
        (lambda: HierarchicalContextLoss(levels=(0.5,)), TypeError, r"Expected `levels` to be an int"),
    ],
)
def test_bad_settings_of_a_review_raise(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_features_that_are_not_maps_raise_before_the_first_backward() -> None:
    with pytest.raises(
        ValueError, match=r"layers 'head' and 'head' to return maps \(N, C, H, W\), but got \(5, 3\) and"
    ):
        one_step(Network(4), ReviewDistillation(["norm", "head"], ["norm", "head"]))
    with pytest.raises(
        ValueError, match=r"`student` to have positions, and 3 to 5 dimensions, but got shape \(2, 3\)\."
    ):
        HierarchicalContextLoss()(torch.ones(2, 3), torch.ones(2, 3))


HEAD = Tap("head", where="input")


@pytest.mark.parametrize(
    "term", [ReviewDistillation(["conv", "body"], ["conv", "body"]), ReusedClassifierDistillation(HEAD, HEAD)]
)
def test_a_batch_of_one_number_for_each_channel_raises_with_a_remedy(term: Any) -> None:
    student = Network(4, seed=1).eval()
    with Distiller(student, Network(4), term, task_weight=0) as distiller:
        with distiller.record():
            output = student(torch.randn(1, 2, 1, 1))
        with pytest.raises(ValueError, match=rf"for term '{term.name}'.*one example: DataLoader\(..., drop_last=True"):
            distiller.total(output.mean())
