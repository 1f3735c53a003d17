"""Measures of classifiers: against torchmetrics, SciPy and computations by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from distill_core.guidance import evaluation
from lightning_distill import TeacherAgreement, TeacherDivergence


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a student and a teacher, and labels: more rows than are computed at a time."""
    monkeypatch.setattr(evaluation, "_NUMBERS", 6 * 1024)
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 5000)
    student, teacher = (random.normal(size=(5000, 6)) + strength * np.eye(6)[labels] for strength in (1.0, 3.0))
    return student.astype(np.float32), teacher.astype(np.float32), labels


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_equals_that_of_torchmetrics(models, bins: int) -> None:
    student, _, labels = models
    expected = multiclass_calibration_error(torch.tensor(student), torch.tensor(labels), 6, n_bins=bins, norm="l1")
    assert evaluation.calibration_error(student, labels, bins=bins) == pytest.approx(float(expected), abs=1e-6)


def test_reliability_by_hand() -> None:
    """Two bins: (0, 0.5] holds a right answer of confidence 0.5, (0.5, 1] a right one of 0.8 and a wrong one of 0.6."""
    logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
    diagram = evaluation.reliability(logits, np.array([0, 1, 2]), bins=2)
    np.testing.assert_array_equal(diagram.counts, [1, 2])
    np.testing.assert_allclose(diagram.confidence, [0.5, 1.4])
    np.testing.assert_array_equal(diagram.correct, [1, 1])
    assert diagram.error == pytest.approx((0.5 + 0.4) / 3)
    assert diagram.gap == pytest.approx((1.9 - 2) / 3)


def test_the_sum_of_two_diagrams_is_that_of_all_examples(models) -> None:
    student, _, labels = models
    halves = [evaluation.reliability(student[part], labels[part]) for part in (slice(100), slice(100, None))]
    whole = evaluation.reliability(student, labels)
    np.testing.assert_allclose((halves[0] + halves[1]).confidence, whole.confidence)


def test_accuracy_equals_that_of_torchmetrics(models) -> None:
    student, _, labels = models
    expected = multiclass_accuracy(torch.tensor(student), torch.tensor(labels), 6, average="micro")
    assert evaluation.accuracy(student, labels) == pytest.approx(float(expected))


def test_class_accuracies_equal_those_of_torchmetrics(models) -> None:
    student, _, labels = models
    expected = multiclass_accuracy(torch.tensor(student), torch.tensor(labels), 6, average="none")
    np.testing.assert_allclose(evaluation.class_accuracies(student, labels)[0], expected, rtol=1e-6)


def test_divergence_is_that_from_the_teacher_in_nats(models) -> None:
    student, teacher, _ = models
    expected = entropy(softmax(teacher.astype(float), 1), softmax(student.astype(float), 1), axis=1).mean()
    assert evaluation.divergence(student, teacher) == pytest.approx(expected)


def test_agreement_and_divergence_equal_the_metrics_of_the_package(models) -> None:
    student, teacher, _ = models
    agreement, divergence = TeacherAgreement(), TeacherDivergence()
    for metric in (agreement, divergence):
        metric.update(torch.tensor(student), torch.tensor(teacher))
    assert evaluation.agreement(student, teacher) == pytest.approx(float(agreement.compute()))
    assert evaluation.divergence(student, teacher) == pytest.approx(float(divergence.compute()), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(models) -> None:
    student, _, _ = models
    assert evaluation.divergence(student, student) == 0
    assert evaluation.agreement(student, student) == 1


def test_disagreements_count_who_is_right() -> None:
    """The teacher says 0, 0, 1, 2 and the student 1, 1, 1, 0; the labels are 0, 1, 1, 1."""
    teacher, student = np.eye(3)[[0, 0, 1, 2]], np.eye(3)[[1, 1, 1, 0]]
    pairs = evaluation.disagreements(student, teacher, np.array([0, 1, 1, 1]))
    assert {pair: counts.tolist() for pair, counts in pairs.items()} == {(0, 1): [2, 1, 1], (2, 0): [1, 0, 0]}
    assert evaluation.disagreements(teacher, teacher, np.array([0, 1, 1, 1])) == {}


def test_inherited_errors_are_a_share_of_the_teachers_errors() -> None:
    teacher, student, labels = np.eye(3)[[0, 0, 1, 2]], np.eye(3)[[0, 2, 1, 2]], np.array([1, 1, 1, 2])
    assert evaluation.inherited_errors(student, teacher, labels) == 0.5
    assert math.isnan(evaluation.inherited_errors(student, teacher, np.array([0, 0, 1, 2])))


def test_other_mass_is_the_probability_beside_the_first_class() -> None:
    logits = np.log([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]])
    assert evaluation.other_mass(logits) == pytest.approx(0.2)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    assert evaluation.calibration_error(logits, np.array([0, 1])) == 0
    assert evaluation.divergence(logits, logits[::-1]) == pytest.approx(1e4)
