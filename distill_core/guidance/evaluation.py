"""Measures of classifiers from their logits, alone and beside a teacher. NumPy in, numbers out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_NUMBERS: Final = 2**22  # in float64 at a time, so that many rows or many classes need little memory
BINS: Final = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: examples in bins of equal width of the model's confidence.

    Args:
        counts: Number of examples in each bin, shape ``(bins,)``.
        confidence: Sum of the probabilities of the predicted classes in each bin.
        correct: Number of right answers in each bin.
    """

    counts: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.float64]

    def __add__(self, other: Reliability) -> Reliability:
        """The diagram of both sets of examples together."""
        return Reliability(self.counts + other.counts, self.confidence + other.confidence, self.correct + other.correct)

    @property
    def error(self) -> float:
        """Expected calibration error, from 0 to 1."""
        return float(np.abs(self.confidence - self.correct).sum() / self.counts.sum())

    @property
    def gap(self) -> float:
        """Mean confidence minus accuracy: positive for a model that is too sure."""
        return float((self.confidence - self.correct).sum() / self.counts.sum())


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithms of the probabilities.

    Args:
        logits: Shape ``(N, C)``.

    Returns:
        Shape ``(N, C)``, in nats.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of examples whose highest score is that of their label.

    Args:
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``.

    Returns:
        From 0 to 1.

    Example:
        >>> accuracy(np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), np.array([0, 1, 1])).__round__(4)
        0.6667
    """
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(student_logits: NDArray[Any], teacher_logits: NDArray[Any]) -> float:
    """Share of examples where both models give the highest score to the same class, right or wrong.

    Args:
        student_logits: Shape ``(N, C)``.
        teacher_logits: Same shape.

    Returns:
        From 0 to 1.

    References:
        Stanton et al. 2021 (average top-1 agreement), arXiv:2106.05945.
    """
    return float((student_logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean())


def divergence(student_logits: NDArray[Any], teacher_logits: NDArray[Any]) -> float:
    r"""Mean Kullback-Leibler divergence of the student's probabilities from the teacher's.

    .. math:: \frac{1}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc})

    Args:
        student_logits: Shape ``(N, C)``.
        teacher_logits: Same shape.

    Returns:
        From 0 up, in nats.

    Example:
        >>> round(divergence(np.array([[2.0, 0.0, 1.0]]), np.array([[4.0, 1.0, 0.0]])), 4)
        0.2437

    References:
        Stanton et al. 2021 (average predictive KL), arXiv:2106.05945.
    """
    total = 0.0
    for student, teacher in _blocks(student_logits, teacher_logits):
        student_log, teacher_log = log_softmax(student), log_softmax(teacher)
        total += float((np.exp(teacher_log) * (teacher_log - student_log)).sum())
    return total / len(student_logits)


def reliability(logits: NDArray[Any], labels: NDArray[Any], *, bins: int = BINS) -> Reliability:
    """Confidence and right answers in bins of equal width; each bin contains its upper end.

    Args:
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``.
        bins: Number of bins from confidence 0 to 1.

    Returns:
        The diagram.

    References:
        Guo et al. 2017, equations 1 to 3, arXiv:1706.04599.
    """
    counts, confidences, correct = np.zeros(bins), np.zeros(bins), np.zeros(bins)
    for block, targets in _blocks(logits, labels):
        confidence = np.exp(log_softmax(block).max(axis=1))
        places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        counts += np.bincount(places, minlength=bins)
        confidences += np.bincount(places, confidence, minlength=bins)
        correct += np.bincount(places, block.argmax(axis=1) == targets, minlength=bins)
    return Reliability(counts, confidences, correct)


def calibration_error(logits: NDArray[Any], labels: NDArray[Any], *, bins: int = BINS) -> float:
    r"""Expected calibration error: the mean distance between confidence and accuracy.

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Args:
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``.
        bins: Number of bins of equal width.

    Returns:
        From 0 to 1, lower is better.

    Example:
        >>> logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
        >>> round(calibration_error(logits, np.array([0, 1, 1])), 4)
        0.4

    References:
        Guo et al. 2017, equation 3, arXiv:1706.04599.
    """
    return reliability(logits, labels, bins=bins).error


def class_accuracies(logits: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Accuracy on the examples of each class, and their number.

    Args:
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``.

    Returns:
        Accuracies, NaN for a class without examples, and counts; both of shape ``(C,)``.

    Example:
        >>> class_accuracies(np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [5.0, 4.0, 0.0]]), np.array([0, 1, 1]))
        (array([1. , 0.5, nan]), array([1, 2, 0]))
    """
    classes = logits.shape[1]
    counts = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[logits.argmax(axis=1) == labels], minlength=classes)
    return np.where(counts > 0, right / np.maximum(counts, 1), np.nan), counts


def disagreements(
    student_logits: NDArray[Any], teacher_logits: NDArray[Any], labels: NDArray[Any]
) -> dict[tuple[int, int], NDArray[np.int64]]:
    """The examples where the two models differ, counted by the teacher's and the student's class.

    Args:
        student_logits: Shape ``(N, C)``.
        teacher_logits: Same shape.
        labels: Shape ``(N,)``.

    Returns:
        By teacher's and student's class: the number of examples, on how many of them the teacher is right, and on how
        many the student.

    Example:
        >>> teacher, student = np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[0.0, 3.0], [5.0, 4.0]])
        >>> disagreements(student, teacher, np.array([1, 1]))
        {(0, 1): array([1, 0, 1])}
    """
    teacher, student = teacher_logits.argmax(axis=1), student_logits.argmax(axis=1)
    differ = teacher != student
    teacher, student, labels = teacher[differ], student[differ], labels[differ]
    pairs, places = np.unique(np.stack([teacher, student], axis=1), axis=0, return_inverse=True)
    counts = np.zeros((len(pairs), 3), np.int64)
    np.add.at(
        counts, places.reshape(-1), np.stack([np.ones_like(labels), teacher == labels, student == labels], axis=1)
    )
    return {(int(a), int(b)): row for (a, b), row in zip(pairs, counts, strict=True)}


def inherited_errors(student_logits: NDArray[Any], teacher_logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of the teacher's wrong answers where the student gives the same wrong answer.

    Args:
        student_logits: Shape ``(N, C)``.
        teacher_logits: Same shape.
        labels: Shape ``(N,)``.

    Returns:
        From 0 to 1; NaN if the teacher is always right.
    """
    teacher = teacher_logits.argmax(axis=1)
    wrong = teacher != labels
    return float((student_logits.argmax(axis=1) == teacher)[wrong].mean()) if wrong.any() else float("nan")


def other_mass(logits: NDArray[Any]) -> float:
    """Mean probability that a model leaves to all classes but its first: the part that soft targets can teach.

    Args:
        logits: Shape ``(N, C)``.

    Returns:
        From 0 to 1.
    """
    return sum(float((1 - np.exp(log_softmax(block).max(axis=1))).sum()) for (block,) in _blocks(logits)) / len(logits)


def _blocks(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    rows = max(1, _NUMBERS // arrays[0].shape[1])
    for start in range(0, len(arrays[0]), rows):
        yield tuple(array[start : start + rows] for array in arrays)
