"""Measures of all runs of a comparison whose predictions can be read."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_core.guidance import evaluation
from distill_core.guidance.evaluation import Reliability
from distill_core.guidance.results import Predictions, Results


@dataclass
class Measures:
    """Measures of a model, or of the runs of a method: a value for each seed.

    Args:
        accuracy: Shares of right answers.
        agreement: Shares of answers that equal the teacher's.
        divergence: Kullback-Leibler divergences from the teacher, in nats.
        calibration: Expected calibration errors.
        inherited: Shares of the teacher's wrong answers that the student repeats.
        reliability: The reliability diagram of all seeds together.
        classes: Accuracies of the classes, the mean over the seeds, shape ``(C,)``.
        examples: Number of validation examples of each class, shape ``(C,)``.
        pairs: Examples where the two differ, over all seeds, as :func:`evaluation.disagreements` counts them.
        first: Predicted classes of the first seed, shape ``(N,)``.
    """

    accuracy: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    calibration: list[float] = field(default_factory=list)
    inherited: list[float] = field(default_factory=list)
    reliability: Reliability | None = None
    classes: NDArray[np.float64] | None = None
    examples: NDArray[np.int64] | None = None
    pairs: dict[tuple[int, int], Any] = field(default_factory=dict)
    first: NDArray[np.int64] | None = None

    def add(self, model: Predictions, teacher: Predictions | None) -> None:
        """Measure the predictions of a run.

        Args:
            model: The predictions.
            teacher: The teacher's, or None if they are not known.
        """
        logits, labels = model.logits, model.labels
        self.accuracy.append(evaluation.accuracy(logits, labels))
        diagram = evaluation.reliability(logits, labels)
        self.calibration.append(diagram.error)
        self.reliability = diagram if self.reliability is None else self.reliability + diagram
        classes, self.examples = evaluation.class_accuracies(logits, labels)
        runs = len(self.accuracy)
        self.classes = classes if self.classes is None else self.classes + (classes - self.classes) / runs
        if self.first is None:
            self.first = logits.argmax(axis=1)
        if teacher is None:
            return
        self.agreement.append(evaluation.agreement(logits, teacher.logits))
        self.divergence.append(evaluation.divergence(logits, teacher.logits))
        self.inherited.append(evaluation.inherited_errors(logits, teacher.logits, labels))
        for pair, counts in evaluation.disagreements(logits, teacher.logits, labels).items():
            self.pairs[pair] = self.pairs.get(pair, 0) + counts


@dataclass
class Measurements:
    """The measures of a comparison.

    Args:
        teacher: The teacher's measures, or None.
        teacher_predictions: The teacher's predictions, or None.
        methods: The measures of each method that has predictions.
        labels: The labels of the validation set, or None.
        problems: Sentences on predictions that are missing or wrong.
    """

    teacher: Measures | None = None
    teacher_predictions: Predictions | None = None
    methods: dict[str, Measures] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    problems: list[str] = field(default_factory=list)


def measure(results: Results) -> Measurements:
    """Measure the teacher and every finished run; one file is in memory at a time.

    Args:
        results: The results of the comparison.

    Returns:
        The measures. Predictions that are absent, damaged or of other examples are named in ``problems``.
    """
    measurements = Measurements()
    teacher = results.comparison.get("teacher")
    name = teacher.get("predictions") if isinstance(teacher, dict) else None
    if name is not None and (predictions := _read(results, name, "the teacher", measurements)):
        measurements.teacher_predictions = predictions
        measurements.labels = predictions.labels
        measurements.teacher = Measures()
        measurements.teacher.add(predictions, None)
    for method in results.methods:
        for run in results.finished(method):
            owner = f"{method}, seed {run.seed}"
            if run.predictions is None or not (predictions := _read(results, run.predictions, owner, measurements)):
                continue
            measurements.methods.setdefault(method, Measures()).add(predictions, measurements.teacher_predictions)
    return measurements


def mean(values: Any) -> float:
    """The mean of the finite values; NaN for an empty list."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _read(results: Results, name: Any, owner: str, measurements: Measurements) -> Predictions | None:
    """A file of predictions that fits the others, or None after a sentence on the problem."""
    try:
        predictions = results.predictions(name)
        labels = measurements.labels
        if labels is not None and not np.array_equal(labels, predictions.labels):
            raise ValueError(f"{name} has other labels than the predictions before it: not the same validation set")
        if (teacher := measurements.teacher_predictions) and teacher.logits.shape != predictions.logits.shape:
            raise ValueError(
                f"{name} has {predictions.logits.shape[1]} classes, and the teacher's predictions have"
                f" {teacher.logits.shape[1]}"
            )
    except ValueError as error:
        measurements.problems.append(f"Predictions of {owner}: {error}.")
        return None
    measurements.labels = predictions.labels
    return predictions
