"""Several teachers: weights, mixtures and routes equal a loop in float64 by hand, and what does not fit is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CLASSES, INPUTS, Mlp
from torch import Tensor, nn

from lightning_distill import (
    DecoupledKDLoss,
    DistillCallback,
    Distiller,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SequenceDistillation,
    SoftTargetLoss,
)
from lightning_distill.functional.mixtures import confidence_weights, mixture_logits
from lightning_distill.schedules import Linear

X = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SOURCE = torch.tensor([1, 0, 1, 1, 0, 1])


def networks() -> tuple[Mlp, Mlp, Mlp]:
    return Mlp(5).double(), Mlp(7, seed=1).double(), Mlp(6, seed=2).double()


def loss_of(batch: object = None, *, terms: object = None, **settings: object) -> Tensor:
    student, first, second = networks()
    with Distiller(student, [first, second], terms, task_weight=0, **settings) as distiller:
        with distiller.record():
            task = student(X).mean()
        return distiller.total(task, batch).detach()


def logits() -> list[list[list[float]]]:
    """The logits of the student and both teachers."""
    with torch.no_grad():
        return [network(X).tolist() for network in networks()]


def softmax(scores: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(score / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def kl(target: list[float], student: list[float], temperature: float) -> float:
    own = softmax(student, temperature)
    return temperature**2 * sum(p * math.log(p / q) for p, q in zip(target, own, strict=True))


def entropy(scores: list[float]) -> float:
    return -sum(p * math.log(p) for p in softmax(scores))


def test_weights_are_shares_of_the_losses() -> None:
    student, first, second = logits()
    each = [
        sum(kl(softmax(row, 4.0), own, 4.0) for row, own in zip(teacher, student, strict=True)) / len(student)
        for teacher in (first, second)
    ]
    assert loss_of(teacher_weights=[0.7, 0.3]).item() == pytest.approx(0.7 * each[0] + 0.3 * each[1], rel=1e-9)
    assert loss_of(teacher_weights=[7, 3]).item() == pytest.approx(loss_of(teacher_weights=[0.7, 0.3]).item())
    assert loss_of(teacher_weights=[1, 1]).item() == pytest.approx(loss_of().item())


def test_the_divergence_to_the_mean_is_not_the_mean_of_the_divergences() -> None:
    student, first, second = logits()
    values = []
    for own, a, b in zip(student, first, second, strict=True):
        target = [0.7 * p + 0.3 * q for p, q in zip(softmax(a, 4.0), softmax(b, 4.0), strict=True)]
        values.append(kl(target, own, 4.0))
    mixed = loss_of(teacher_weights=[0.7, 0.3], mix="probabilities").item()
    assert mixed == pytest.approx(sum(values) / len(values), rel=1e-9)
    assert mixed < loss_of(teacher_weights=[0.7, 0.3]).item() - 1e-4  # the divergence is convex


def test_a_mixture_of_logits_is_one_loss_to_their_mean() -> None:
    student, first, second = logits()
    values = []
    for own, a, b in zip(student, first, second, strict=True):
        mean = [0.25 * p + 0.75 * q for p, q in zip(a, b, strict=True)]
        values.append(kl(softmax(mean, 4.0), own, 4.0))
    mixed = loss_of(teacher_weights=[1, 3], mix="logits").item()
    assert mixed == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_weights_by_confidence_are_inverse_perplexities_of_each_example() -> None:
    student, first, second = logits()
    values = []
    for own, a, b in zip(student, first, second, strict=True):
        shares = [1 / math.exp(entropy(a)), 1 / math.exp(entropy(b))]
        pair = [kl(softmax(a, 4.0), own, 4.0), kl(softmax(b, 4.0), own, 4.0)]
        values.append(sum(share * value for share, value in zip(shares, pair, strict=True)) / sum(shares))
    assert loss_of(teacher_weights="entropy").item() == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_weights_by_confidence_leave_out_masked_examples() -> None:
    keeps = torch.tensor([True, False, True, True, False, True])
    term = lambda mask: LogitsDistillation(mask=mask)  # noqa: E731
    masked = loss_of({"mask": keeps}, terms=term("mask"), teacher_weights="entropy")
    student, first, second = networks()
    with Distiller(student, [first, second], task_weight=0, teacher_weights="entropy") as distiller:
        with distiller.record():
            task = student(X[keeps]).mean()
        alone = distiller.total(task)
    torch.testing.assert_close(masked, alone.detach())


def test_confidence_is_defined_for_teachers_that_are_sure_and_for_classes_that_are_forbidden() -> None:
    sure = torch.tensor([[0.0, -math.inf, -math.inf]])
    unsure = torch.zeros(1, 3)
    weights = confidence_weights([sure, unsure])
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.75, 0.25]))
    mixed = mixture_logits([sure, unsure], weights).softmax(-1)
    torch.testing.assert_close(mixed, torch.tensor([[0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3]]))


def test_classes_in_another_dimension_are_mixed_there() -> None:
    maps = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    mixed = mixture_logits(maps, confidence_weights(maps, 1), temperature=2.0, class_dim=1)
    moved = [scores.movedim(1, -1) for scores in maps]
    last = mixture_logits(moved, confidence_weights(moved), temperature=2.0)
    torch.testing.assert_close(mixed.movedim(1, -1), last)


def test_each_example_of_a_route_is_distilled_from_its_own_teacher() -> None:
    student, *teachers = logits()
    values = [kl(softmax(teachers[source][row], 4.0), student[row], 4.0) for row, source in enumerate(SOURCE.tolist())]
    expected = pytest.approx(sum(values) / len(values), rel=1e-9)
    for batch, route in (({"source": SOURCE}, "source"), ((X, SOURCE), 1), ((X, SOURCE), lambda batch: batch[1])):
        assert loss_of(batch, route=route).item() == expected


class Counts(Mlp):
    """Notes the number of examples of each of its calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("sizes", []).append(len(x))
        return super().forward(x)


def test_a_teacher_of_a_route_runs_on_its_own_examples_alone() -> None:
    student, first, second = Mlp(5).double(), Counts(7).double(), Counts(6).double()
    with Distiller(student, [first, second], route="source") as distiller:
        for source in (SOURCE, torch.ones(6, dtype=torch.int64)):
            with distiller.record():
                task = student(X).mean()
            distiller.total(task, {"source": source})
    assert (first.sizes, second.sizes) == ([2], [4, 6])


def test_a_teacher_without_examples_is_shown_one_where_adapters_need_its_shape() -> None:
    student, first, second = Mlp(5).double(), Counts(7).double(), Counts(6).double()
    with Distiller(student, [first, second], FeatureDistillation("body", "body"), route="source") as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
        with distiller.record():
            task = student(X).mean()
        distiller.total(task, {"source": torch.zeros(6, dtype=torch.int64)}).backward()
        adapters = distiller.terms[0].adapters
        assert [adapter.out_features for adapter in adapters] == [7, 6]
        assert adapters[0].weight.grad is not None
        assert adapters[1].weight.grad is None
    assert (first.sizes, second.sizes) == ([6], [1])


def test_labels_and_masks_of_a_route_stay_with_their_examples() -> None:
    labels, keeps = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([True, False, True, True, True, True])
    batch = {"labels": labels, "mask": keeps, "source": SOURCE}
    term = LogitsDistillation(DecoupledKDLoss(2.0), mask="mask")
    whole = loss_of(batch, terms=term, route="source")
    student, *teachers = networks()
    with torch.no_grad():
        rows = torch.stack([teachers[source](X)[row] for row, source in enumerate(SOURCE.tolist())])
        torch.testing.assert_close(whole, DecoupledKDLoss(2.0)(student(X), rows, labels, mask=keeps))


def test_validation_compares_the_student_with_the_mixture() -> None:
    student, first, second = networks()
    batch = {"source": SOURCE}
    expected = {"route": torch.stack([(first, second)[source](X)[row] for row, source in enumerate(SOURCE)])}
    expected["mix"] = 0.25 * first(X) + 0.75 * second(X)
    settings = {"route": {"route": "source"}, "mix": {"mix": "logits", "teacher_weights": [1, 3]}}
    for name, setting in settings.items():
        with Distiller(student, [first, second], **setting) as distiller:
            with distiller.record():
                student(X)
            ((_, teacher),) = distiller.agree(batch)
        torch.testing.assert_close(teacher, expected[name].detach())


def test_scheduled_weights_are_logged_and_move() -> None:
    student, first, second = networks()
    with Distiller(student, [first, second], teacher_weights=[1, Linear(1.0, 0.0)]) as distiller:
        distiller.advance(5, 1, 0.75)
        assert distiller.scheduler.values == {"teacher_1_weight": 0.25}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"teacher_weights": [1.0]}, ValueError, "one weight for each of the 2 teachers, but got 1"),
        ({"teacher_weights": [1.0, -1.0]}, ValueError, r"`teacher_weights\[1\]` to be at least 0, but got"),
        ({"teacher_weights": [0, 0.0]}, ValueError, "a weight greater than 0, but got"),
        ({"teacher_weights": "confidence"}, ValueError, "`teacher_weights` to be one of 'entropy'"),
        ({"teacher_weights": 0.5}, TypeError, "`teacher_weights` to be a list of numbers"),
        ({"mix": "logit"}, ValueError, "`mix` to be one of.*Closest: 'logits'"),
        ({"mix": "logits", "route": "source"}, ValueError, "neither `teacher_weights` nor `mix` where a route"),
        ({"route": 1.5}, TypeError, "`route` to be a key, an index or a function"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, error: type[Exception], words: str) -> None:
    _, first, second = networks()
    with pytest.raises(error, match=words):
        DistillCallback([first, second], **settings)


@pytest.mark.parametrize(
    ("settings", "term", "words"),
    [
        ({"mix": "logits"}, FeatureDistillation("body", "body"), "terms on logits with mix='logits'"),
        ({"teacher_weights": "entropy"}, FeatureDistillation("body", "body"), "with teacher_weights='entropy'"),
        ({"mix": "probabilities"}, LogitsDistillation(LogitMSELoss()), "divergence of probabilities"),
        ({"mix": "probabilities"}, SoftTargetLoss(standardize=True), "divergence of probabilities"),
        ({"teacher_weights": "entropy"}, SequenceDistillation(), "a value for each example"),
        (
            {"route": "source"},
            FeatureDistillation("body", "body", mask="mask"),
            "no mask, no ignore_index, no boxes and no index",
        ),
    ],
)
def test_terms_that_do_not_fit_are_refused_before_the_first_step(settings: dict, term: object, words: str) -> None:
    student, first, second = networks()
    with pytest.raises(ValueError, match=words):
        Distiller(student, [first, second], term, **settings)


def test_one_teacher_needs_no_weights() -> None:
    with pytest.raises(ValueError, match=r"a list of two or more teachers.*but got Mlp"):
        Distiller(Mlp(5), Mlp(7), teacher_weights=[1.0])


def test_teachers_with_other_classes_cannot_be_mixed() -> None:
    student, first, _ = networks()
    wide = nn.Linear(INPUTS, CLASSES + 1).double()
    for settings in ({"mix": "probabilities"}, {"mix": "logits"}, {"teacher_weights": "entropy"}):
        with Distiller(student, [first, wide], **settings) as distiller:
            with distiller.record():
                task = student(X).mean()
            with pytest.raises(ValueError, match=r"all teachers to score the same classes.*\(6, 3\), \(6, 4\)"):
                distiller.total(task)


def test_an_error_says_which_teacher_it_is_about() -> None:
    student, first, _ = networks()
    wide = nn.Linear(INPUTS, CLASSES + 1).double()
    for weights, number in ((None, 1), ([0.5, 0.5], 1), ([1.0, 0.0], None)):
        with Distiller(student, [first, wide], teacher_weights=weights) as distiller:
            with distiller.record():
                task = student(X).mean()
            if number is None:  # its loss is not computed
                distiller.total(task)
                continue
            words = rf"score the same classes\. This is about teacher {number} of 2, counted from 0\.$"
            with pytest.raises(ValueError, match=words):
                distiller.total(task)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.tensor([0, 1, 2, 0, 0, 0]), "one of the 2 teachers, 0 to 1, for every example, but got 2"),
        (torch.tensor([0, 1, -1, 0, 0, 0]), "but got -1"),
        (torch.tensor([0, 1]), r"each of the 6 examples.*\(2,\)"),
        (torch.zeros(6), "an integer tensor"),
        (["a"] * 6, "`route` to say where a batch keeps the teacher of each example"),
    ],
)
def test_a_route_that_names_no_teacher_is_refused(source: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss_of({"source": source}, route="source")


def test_a_route_needs_the_batch() -> None:
    with pytest.raises(ValueError, match="Expected a batch for route='source'"):
        loss_of(route="source")


class TokensFirst(Mlp):
    """Gives its outputs with the examples second."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


def test_a_teacher_of_a_route_with_the_examples_elsewhere_is_refused() -> None:
    student, first, _ = networks()
    with Distiller(student, [first, TokensFirst(6).double()], route="source") as distiller:
        with distiller.record():
            task = student(X).mean()
        with pytest.raises(ValueError, match=r"answer for its 4 examples under a route.*\(3, 4\)"):
            distiller.total(task, {"source": SOURCE})
