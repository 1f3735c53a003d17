"""Losses that take numbers from layers of the teacher: published values, what they read, and words of errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_index
from parts_nets import Network, built, one_step, tensors_of
from torch import nn

from distill_core.margins import margins_of, negative_mean
from lightning_distill import (
    FeatureDistillation,
    MarginReLULoss,
    SelfDistillation,
    SoftmaxRegressionLoss,
    functional,
)

pytestmark = pytest.mark.tensors


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
        torch.testing.assert_close(loss._numbers.cpu(), tensors[f"margin_{index}"].flatten().cpu())
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

    torch.testing.assert_close(loss._numbers.cpu(), torch.full((3,), -0.7978845608, dtype=torch.float64).cpu())


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
        ValueError, match=r"to take no numbers from a teacher's layers in a SelfDistillation, but got Margin"
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


# Softmax regression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("srrl"), ids=lambda entry: entry["case"])
def test_softmax_regression_is_the_published_loss(entry: dict[str, Any]) -> None:
    tensors = tensors_of(entry)
    student = tensors["student_feat"].requires_grad_()
    weights, biases = tensors["teacher_fc_weight"], tensors["teacher_fc_bias"]
    head = nn.Linear(*weights.shape[::-1]).double()
    head.load_state_dict({"weight": weights, "bias": biases})
    loss = SoftmaxRegressionLoss(regression_weight=entry["hyperparameters"]["weight"])
    loss.read_teacher(lambda name: head)
    loss = built(loss, student.shape, tensors["teacher_feat"].shape)
    published = {"scale": "bn.weight", "shift": "bn.bias", "connector.weight": "conv.weight"}
    loss.load_state_dict({name: tensors[f"param_connector_{other}"].squeeze() for name, other in published.items()})

    value = loss(student, tensors["teacher_feat"])
    value.backward()

    tolerance = entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    torch.testing.assert_close(student.grad, tensors["grad_student_feat"], **tolerance)
    for name, parameter in loss.named_parameters():
        expected = tensors[f"gradp_connector_{published[name]}"].squeeze()
        torch.testing.assert_close(parameter.grad, expected, **tolerance)


def test_positions_that_do_not_count_are_left_out_of_the_statistics_and_the_averages() -> None:
    loss = SoftmaxRegressionLoss()
    loss.read_teacher(lambda name: nn.Linear(2, 4))
    loss = built(loss, (4, 5, 3), (4, 5, 2))
    student, teacher = (torch.randn(4, 5, width, dtype=torch.float64) for width in (3, 2))
    mask = torch.tensor([True, True, False, True, False]).expand(4, 5)
    expected = loss(student[:, mask[0]], teacher[:, mask[0]])
    student[:, ~mask[0]] = torch.nan

    torch.testing.assert_close(loss(student, teacher, mask=mask), expected)


def test_the_term_finds_the_teachers_classifier() -> None:
    teacher = Network(4)

    (term,) = one_step(teacher, FeatureDistillation("body", "body", SoftmaxRegressionLoss()))
    (named,) = one_step(teacher, FeatureDistillation("pool", "body", SoftmaxRegressionLoss(classifier="head")))

    assert torch.equal(term.learned[0]._weight, teacher.head.weight)
    assert torch.equal(named.learned[0]._weight, teacher.head.weight)
    assert set(term.state_dict()) == {f"learned.0.{name}" for name in ("scale", "shift", "connector.weight")}
    assert teacher.head.weight.grad is None


class TwoHeads(Network):
    """A second linear layer that fits."""

    def __init__(self) -> None:
        super().__init__(4)
        self.other = nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: one_step(TwoHeads(), FeatureDistillation("body", "body", SoftmaxRegressionLoss())),
            r"to have one linear layer of 8 inputs, .* but got 2: head, other\. Pass classifier=",
        ),
        (
            lambda: one_step(Network(4), FeatureDistillation("norm", "norm", SoftmaxRegressionLoss())),
            r"to have one linear layer of 4 inputs, .* but got 0: none\.",
        ),
        (
            lambda: one_step(Network(4), FeatureDistillation("norm", "norm", SoftmaxRegressionLoss(classifier="head"))),
            r"to be a linear layer of 4 inputs, .* but got classifier='head', Linear\(in_features=8",
        ),
        (
            lambda: one_step(Network(4), FeatureDistillation("body", "body", SoftmaxRegressionLoss(classifier="haed"))),
            r"the teacher to have a layer 'haed', but got Network\. .*'head'",
        ),
        (
            lambda: one_step(None, SelfDistillation("norm", "norm", SoftmaxRegressionLoss())),
            r"to take no numbers from a teacher's layers in a SelfDistillation, but got Softmax",
        ),
        (
            lambda: built(SoftmaxRegressionLoss(), (2, 3), (2, 4))(torch.ones(2, 3), torch.ones(2, 4)),
            r"the teacher's classifier to be known, but got none\. Call loss\.read_teacher",
        ),
        (lambda: built(SoftmaxRegressionLoss(), (2,), (2, 4)), r"to have examples and channels, but got \(2,\) and"),
        (
            lambda: functional.softmax_regression(torch.ones(2, 3), torch.ones(2, 3), classifier=torch.ones(3, 5)),
            r"`classifier` to have the shape \(classes, 3\), but got shape \(3, 5\)",
        ),
        (
            lambda: functional.softmax_regression(torch.ones(2, 3), torch.ones(2, 4), classifier=torch.ones(5, 4)),
            r"`averaged student` and `averaged teacher` to have equal shapes, but got \(2, 3\) and \(2, 4\)\. Map",
        ),
        (
            lambda: functional.softmax_regression(torch.ones(2), torch.ones(2), classifier=torch.ones(5, 4)),
            r"to have examples and channels, but got \(2,\) and \(2,\)",
        ),
        (lambda: SoftmaxRegressionLoss(feature_weight=-1.0), r"`feature_weight` to be at least 0, but got"),
    ],
)
def test_a_classifier_that_does_not_fit_raises(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_classifier_that_is_not_named_raises() -> None:
    with pytest.raises(TypeError, match=r"Expected `classifier` to be the name of a layer, but got classifier=Linear"):
        SoftmaxRegressionLoss(classifier=nn.Linear(2, 2))
