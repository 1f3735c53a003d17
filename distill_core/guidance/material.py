"""All that the sections of a report read, gathered once; and the facts for the rules of advice."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.guidance.advice import HARMED, HARMED_EXAMPLES, Facts
from distill_core.guidance.evaluation import other_mass
from distill_core.guidance.measures import Measurements, Measures, mean, measure
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.results import Results, read_results
from distill_core.guidance.run_records import RunRecord, number
from distill_core.guidance.verdict import Verdict, verdict_of
from distill_core.guidance.wording import Numbers, clipped


@dataclass(frozen=True)
class Layers:
    """Similarity of layers.

    Args:
        student: Names of the student's layers.
        teacher: Names of the teacher's layers.
        similarity: Centred kernel alignment from 0 to 1, a row for each of the student's layers.
    """

    student: Sequence[str]
    teacher: Sequence[str]
    similarity: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Material:
    """The content of a report.

    Args:
        results: The results folder.
        numbers: The way in which the metric is written.
        verdict: The verdict.
        measurements: Measures of the predictions.
        layers: The map of layers, or None.
        problems: Sentences on what could not be read.
    """

    results: Results
    numbers: Numbers
    verdict: Verdict
    measurements: Measurements
    layers: Layers | None
    problems: tuple[str, ...]

    @property
    def shown(self) -> str | None:
        """The distilled method that sections on single models show: the best, or else the first with predictions."""
        if self.verdict.best in self.measurements.methods:
            return self.verdict.best
        return next((method for method in self.results.distilled if method in self.measurements.methods), None)

    def models(self) -> list[tuple[str, Measures]]:
        """The teacher, the student alone and the distilled student, those of them that have predictions."""
        models = [("teacher", self.measurements.teacher)] if self.measurements.teacher else []
        models += [
            (name, self.measurements.methods[name])
            for name in (ALONE, self.shown)
            if name in self.measurements.methods and name is not None
        ]
        return models

    def class_name(self, index: int) -> str:
        """The name of a class, or its number."""
        names = self.results.comparison.get("classes")
        return clipped(names[index], 40) if isinstance(names, list) and index < len(names) else str(index)

    def cost(self, model: str) -> Mapping[str, Any]:
        """The costs of the ``"teacher"`` or the ``"student"``; empty if they were not measured."""
        entry = self.results.comparison.get(model)
        cost = entry.get("cost") if isinstance(entry, dict) else None
        return cost if isinstance(cost, dict) else {}


def gather(folder: str | Path) -> Material:
    """Read a results folder and measure its predictions.

    Args:
        folder: The folder.

    Raises:
        ValueError: If the folder does not hold the results of a comparison.
    """
    results = read_results(folder)
    measurements = measure(results)
    problems = [*results.problems, *measurements.problems]
    layers = _layers(results.folder / "pairs.json", problems)
    return Material(results, Numbers.of(results), verdict_of(results), measurements, layers, tuple(problems))


def curve(run: RunRecord, metric: str) -> dict[float, float]:
    """The values of a metric by epoch, the last of each; by step where epochs are not known.

    Args:
        run: The run.
        metric: Name of the metric.
    """
    points: dict[float, float] = {}
    for point in run.curve:
        place = number(point.get("epoch", point.get("step")))
        value = number(point.get(metric))
        if math.isfinite(place) and math.isfinite(value):
            points[place] = value
    return dict(sorted(points.items()))


def mean_curve(runs: Sequence[RunRecord], metric: str) -> list[tuple[float, list[float]]]:
    """The values of all runs at each epoch that every run with a curve has.

    Args:
        runs: Runs of one method.
        metric: Name of the metric.

    Returns:
        Pairs of an epoch and the values, in order.
    """
    curves = [points for run in runs if (points := curve(run, metric))]
    if not curves:
        return []
    shared = set(curves[0]).intersection(*curves[1:])
    return [(place, [points[place] for points in curves]) for place in sorted(shared)]


def facts_of(material: Material) -> Facts:
    """The numbers that the rules of advice read.

    Args:
        material: The content of the report.
    """
    results, verdict, methods = material.results, material.verdict, material.measurements.methods
    best, sign = verdict.best, 1 if results.higher_is_better else -1
    alone_values = list(results.values(ALONE).values())
    beside, beside_compute = verdict.beside(ALONE), verdict.beside(EQUAL_COMPUTE)
    best_measures, alone, teacher = (
        methods.get(best or "", Measures()),
        methods.get(ALONE, Measures()),
        _teacher(material),
    )
    return Facts(
        seeds=beside.seeds if beside else 0,
        failed=sum(run.error is not None for run in results.runs),
        not_finite=tuple(
            clipped(method) for method in results.methods if len(results.values(method)) < len(results.finished(method))
        ),
        best=None if best is None else clipped(best),
        verdict=beside.verdict if beside else Facts.verdict,
        verdict_equal_compute=beside_compute.verdict if beside_compute else None,
        equal_compute_leads=bool(beside_compute and sign * beside_compute.mean < 0),
        teacher_lead=sign * (results.teacher_value() - statistics.fmean(alone_values)) if alone_values else math.nan,
        still_rising=_still_rising(results, best),
        agreement=mean(best_measures.agreement),
        agreement_alone=mean(alone.agreement),
        teacher_other_mass=_other_mass(material),
        teacher_gap=teacher.reliability.gap if teacher.reliability else math.nan,
        gap=best_measures.reliability.gap if best_measures.reliability else math.nan,
        inherited=mean(best_measures.inherited),
        inherited_alone=mean(alone.inherited),
        teacher_error=1 - mean(teacher.accuracy),
        size_ratio=_ratio(material.cost("teacher").get("parameters"), material.cost("student").get("parameters")),
        step_ratio=_ratio(_step(results, best), _step(results, ALONE)),
        harmed=_harmed(material, best_measures, alone, teacher),
        layers=_most_similar(material.layers),
    )


def _teacher(material: Material) -> Measures:
    return material.measurements.teacher or Measures()


def _other_mass(material: Material) -> float:
    predictions = material.measurements.teacher_predictions
    return math.nan if predictions is None else other_mass(predictions.logits)


def _step(results: Results, method: str | None) -> float:
    return mean(run.step_seconds for run in results.finished(method or "") if run.step_seconds is not None)


def _ratio(numerator: Any, denominator: Any) -> float:
    return number(numerator) / number(denominator) if number(denominator) > 0 else math.nan


def _still_rising(results: Results, method: str | None) -> float:
    """Share of the improvement of the mean curve that came in its last fifth."""
    points = [
        statistics.fmean(values) for _, values in mean_curve(results.finished(method or ""), results.curve_metric)
    ]
    if len(points) < 5:
        return math.nan
    sign = 1 if results.higher_is_better else -1
    reached = [max(sign * value for value in points[: index + 1]) for index in range(len(points))]
    before = reached[-1 - len(points) // 5]
    whole = reached[-1] - reached[0]
    return (reached[-1] - before) / whole if whole > 0 else 0.0


def _harmed(material: Material, best: Measures, alone: Measures, teacher: Measures) -> tuple[str, float, bool] | None:
    """The class that loses most, if it loses much and has enough examples."""
    if best.classes is None or alone.classes is None or best.examples is None:
        return None
    losses = np.where(best.examples >= HARMED_EXAMPLES, alone.classes - best.classes, -np.inf)
    index = int(np.argmax(losses))
    if not losses[index] > HARMED:
        return None
    teacher_too = teacher.classes is not None and bool(teacher.classes[index] < alone.classes[index])
    return material.class_name(index), float(losses[index]), teacher_too


def _most_similar(layers: Layers | None) -> tuple[str, str, float] | None:
    if layers is None:
        return None
    value, row, column = max(
        (value, row, column) for row, values in enumerate(layers.similarity) for column, value in enumerate(values)
    )
    return clipped(layers.student[row]), clipped(layers.teacher[column]), value


def _layers(file: Path, problems: list[str]) -> Layers | None:
    """The map of layers; None without a file, or after a sentence on its fault."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        student, teacher = (
            [str(name) for name in content["student_layers"]],
            [str(n) for n in content["teacher_layers"]],
        )
        similarity = [[float(value) for value in row] for row in content["similarity"]]
        if not student or not teacher or [len(row) for row in similarity] != [len(teacher)] * len(student):
            raise ValueError("shape")
        if not all(math.isfinite(value) for row in similarity for value in row):
            raise ValueError("values")
    except (ValueError, TypeError, KeyError, OSError):
        problems.append(f"{file.name} does not hold a finite similarity for each pair of layers and was left out.")
        return None
    return Layers(student, teacher, similarity)
