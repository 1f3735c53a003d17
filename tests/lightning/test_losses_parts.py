"""Losses with parts of their own beyond one map: published values, what trains which part, and words of errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import oracle_features
import oracle_learned
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_arrays, golden_index
from parts_nets import Network
from torch import Tensor, nn

from distill_core.margins import margins_of, negative_mean
from lightning_distill import (
    Call,
    Distiller,
    FactorTransferLoss,
    FeatureDistance,
    FeatureDistillation,
    HierarchicalContextLoss,
    MarginReLULoss,
    ReviewDistillation,
    SelfDistillation,
    functional,
    losses,
)

pytestmark = pytest.mark.tensors


def built(loss: losses.DistillationLoss, *shapes: tuple[int, ...]) -> Any:
    loss.build(*(torch.Size(shape) for shape in (shapes if len(shapes) == 2 else shapes * 2)))
    return loss.double()


def one_step(teacher: Any, *terms: Any, student: nn.Module | None = None) -> list[Any]:
    """The terms of a distiller after one step, in which the student learns."""
    student = Network(4, seed=1) if student is None else student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with Distiller(student, teacher, list(terms)) as distiller:
        distiller.follow(optimizer)
        with distiller.record():
            output = student(torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
        distiller.total(output.square().mean(), None).backward()
        optimizer.step()
        return distiller.terms


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


# Margin ReLU ------------------------------------------------------------------------------------------------------


def test_margin_relu_is_the_published_distance_over_its_sum() -> None:
    """The reference adds over all numbers and divides by 1000 and by the examples."""
    entry = golden_index("ofd")[0]
    tensors = tensors_of(entry)
    student = tensors["student_feat"].requires_grad_()

    distance = MarginReLULoss(margins=tensors["margin"].flatten().tolist())(student, tensors["teacher_feat"])
    value = distance * student[0].numel() / 1000
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_feat"], **tolerance)


def test_margin_relu_over_two_layers_is_the_published_distance_behind_its_connectors() -> None:
    """The reference halves a layer's part for each layer after it. Its connectors are adapters here."""
    entry = golden_index("ofd")[1]
    tensors, value = tensors_of(entry), torch.zeros((), dtype=torch.float64)
    students = [tensors[f"student_{index}"].requires_grad_() for index in (0, 1)]
    for index, student in enumerate(students):
        mapped = F.conv2d(student, tensors[f"param_conv{index}_weight"])
        scale, shift = (tensors[f"param_bn{index}_{name}"] for name in ("weight", "bias"))
        mapped = F.batch_norm(mapped, None, None, scale, shift, training=True)
        norm = nn.BatchNorm2d(mapped.shape[1]).double()
        norm.load_state_dict(
            {"weight": tensors[f"bn_weight_{index}"], "bias": tensors[f"bn_bias_{index}"]}, strict=False
        )
        loss = MarginReLULoss()
        loss.read_teacher(lambda name, norm=norm: norm)
        torch.testing.assert_close(loss._numbers, tensors[f"margin_{index}"].flatten())
        value = value + loss(mapped, tensors[f"teacher_{index}"]) * mapped[0].numel() / 1000 / 2 ** (1 - index)
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    for index, student in enumerate(students):
        torch.testing.assert_close(student.grad, tensors[f"grad_student_{index}"], **tolerance)


@pytest.mark.parametrize("entry", golden_index("ofd_margin"), ids=lambda entry: entry["case"])
def test_margins_equal_the_published_ones_of_channels_that_are_negative_at_times(entry: dict[str, Any]) -> None:
    """Where fewer than one response in 1000 is negative, the reference takes -3 deviations; the paper has the mean."""
    tensors = tensors_of(entry)
    scales, shifts = tensors["bn_weight"], tensors["bn_bias"]
    often = torch.special.ndtr(-shifts / scales.abs()) > 0.001

    margins = torch.tensor(margins_of(scales.tolist(), shifts.tolist()), dtype=torch.float64)

    torch.testing.assert_close(margins[often], tensors["margin_expected"][often], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(-3 * scales[~often].abs(), tensors["margin_expected"][~often], rtol=1e-9, atol=1e-12)
    assert often.any()


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 1.0), (-2.0, 0.5), (6.0, 1.5), (40.0, 1.0), (0.02, 1e-3)])
def test_the_mean_of_negative_responses_equals_an_integral(mean: float, deviation: float) -> None:
    """Of the density below zero, in units that neither overflow nor vanish."""
    positions = np.linspace(-40 * deviation, 0, 400_001)
    if mean / deviation > 5:  # all of the tail lies next to zero
        positions = positions * deviation / mean
    logs = -(((positions - mean) / deviation) ** 2) / 2
    density = np.exp(logs - logs.max())

    expected = (positions * density).sum() / density.sum()

    assert negative_mean(mean, deviation) == pytest.approx(expected, rel=1e-3)


def test_the_mean_of_negative_responses_is_smooth_where_the_series_begins() -> None:
    assert negative_mean(30.0 - 1e-9, 1.0) == pytest.approx(negative_mean(30.0 + 1e-9, 1.0), rel=1e-4)
    assert negative_mean(-1.0, 0.0) == -1.0
    assert negative_mean(1.0, 0.0) == 0.0


def test_the_term_takes_the_margins_from_the_teachers_batch_normalisation() -> None:
    teacher, other = Network(4), Network(4, seed=5)

    (term,) = one_step([teacher, other], FeatureDistillation("norm", "norm", MarginReLULoss()))

    for learned, network in zip(term.learned, (teacher, other), strict=True):
        expected = margins_of(network.norm.weight.tolist(), network.norm.bias.tolist())
        torch.testing.assert_close(learned._numbers, torch.tensor(expected))
    assert not term.state_dict()
    assert not [*term.parameters()]


def test_a_layer_without_scale_and_shift_has_the_margins_of_a_standard_normal() -> None:
    loss = MarginReLULoss()
    loss.read_teacher(lambda name: nn.BatchNorm1d(3, affine=False))

    torch.testing.assert_close(loss._numbers, torch.full((3,), -0.7978845608, dtype=torch.float64))


def test_margins_that_cannot_be_read_raise() -> None:
    with pytest.raises(
        ValueError,
        match=r"teacher's layer to be a batch normalisation, but got Conv2d\. Name the batch norm.* margins=",
    ):
        one_step(Network(4), FeatureDistillation("conv", "conv", MarginReLULoss()))
    with pytest.raises(
        ValueError, match=r"`margins` to be given where no term reads them .* but got margins=None\. Pas"
    ):
        MarginReLULoss()(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(
        ValueError, match=r"`teacher` to be a network for term 'norm', whose loss MarginReLULoss\(margi"
    ):
        one_step(None, SelfDistillation("norm", "conv", MarginReLULoss()))


def test_given_margins_need_no_network() -> None:
    (term,) = one_step(None, SelfDistillation("norm", "conv", MarginReLULoss(margins=(-1.0,) * 4)))

    assert len(term.learned) == 1


@pytest.mark.parametrize("margins", [[0.5, -1.0], []])
def test_margins_above_zero_raise(margins: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Expected `margins` to be numbers that are at most 0, but got margins="):
        MarginReLULoss(margins=margins)


def test_margins_that_do_not_fit_the_channels_raise() -> None:
    with pytest.raises(
        ValueError, match=r"`margins` to have one number for each of the 3 channels, but got shape \(2,"
    ):
        MarginReLULoss(margins=(-1.0, -1.0))(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Expected features to have channels, but got shape \(3,\)\."):
        functional.margin_relu_distance(torch.ones(3), torch.ones(3), margins=torch.zeros(3))


def test_a_connected_term_copies_and_pickles_without_the_teacher() -> None:
    (term,) = one_step(Network(4), FeatureDistillation("norm", "norm", MarginReLULoss()))

    assert copy.deepcopy(term)._layers is None
    assert pickle.loads(pickle.dumps(term))._layers is None


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
