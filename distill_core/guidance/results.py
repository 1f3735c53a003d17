"""The results folder of a comparison for a report, which shows all that can be read, and the problems in words.

``records`` reads the same folder to go on with the comparison, and raises at the first problem.
"""

from __future__ import annotations

import json
import math
import numbers
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distill_core.checks import message
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE, FORMAT

_LARGEST: Final = 1e100
_REMEDY: Final = "Pass the folder that a comparison of methods has written."


@dataclass(frozen=True)
class StoredRun:
    """A line of ``runs.jsonl``: a finished or failed training of one method with one seed.

    Args:
        method: Name of the method.
        seed: Seed of the run.
        metrics: The last values by name; NaN where the file holds null or NaN.
        seconds: Duration of the training, in seconds; None if it is not known.
        steps: Number of optimizer steps; None if it is not known.
        step_seconds: Duration of a step, in seconds; None if it is not known.
        curve: Values during the training, each with ``epoch`` and ``step``.
        error: The error that ended the run, or None.
        predictions: Path of the predictions within the folder, or None.
        warnings: Warnings of the run.
    """

    method: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    step_seconds: float | None = None
    curve: tuple[dict[str, float], ...] = ()
    error: str | None = None
    predictions: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """A model's outputs for the validation set.

    Args:
        logits: Shape ``(N, C)``, float32.
        labels: Shape ``(N,)``, from 0 to C - 1.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Results:
    """The content of a results folder.

    Args:
        folder: The folder.
        comparison: Content of ``comparison.json``.
        runs: The last record of each method and seed, in the order of the methods and seeds.
        problems: Sentences on what could not be read.
    """

    folder: Path
    comparison: Mapping[str, Any]
    runs: tuple[StoredRun, ...]
    problems: tuple[str, ...]

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        return str(self.comparison["metric"])

    @property
    def higher_is_better(self) -> bool:
        """Whether a greater metric is better."""
        return bool(self.comparison["mode"] == "max")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of the comparison, then others that have runs."""
        planned = [str(method) for method in self.comparison["methods"]]
        return tuple(dict.fromkeys([*planned, *(run.method for run in self.runs)]))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the comparison, or those of its runs where it names none."""
        planned = self.comparison.get("seeds")
        return tuple(planned) if isinstance(planned, list) else tuple(sorted({run.seed for run in self.runs}))

    @property
    def distilled(self) -> tuple[str, ...]:
        """The methods that have a teacher."""
        return tuple(method for method in self.methods if method not in (ALONE, EQUAL_COMPUTE))

    def finished(self, method: str) -> list[StoredRun]:
        """The runs of a method that ended without an error, by seed."""
        return [run for run in self.runs if run.method == method and run.error is None]

    def values(self, method: str) -> dict[int, float]:
        """The deciding metric of a method's finished runs by seed; NaN is left out."""
        values = {run.seed: run.metrics.get(self.metric, math.nan) for run in self.finished(method)}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def teacher_value(self) -> float:
        """The teacher's deciding metric; NaN if it is not known."""
        return number(_mapping(_mapping(self.comparison.get("teacher")).get("metrics")).get(self.metric))

    def predictions(self, name: Any) -> Predictions:
        """Read a file of predictions.

        Args:
            name: Path within the folder, from a record.

        Raises:
            ValueError: If the file is missing or wrong; the message says why, without a capital.
        """
        arrays = self.arrays(name, "logits", "labels")
        logits, labels = arrays["logits"], arrays["labels"]
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
            raise ValueError(f"{name} has logits of shape {logits.shape} and labels of shape {labels.shape}")
        if logits.dtype.kind not in "fiu" or labels.dtype.kind not in "iu":
            raise ValueError(f"{name} has logits of type {logits.dtype} and labels of type {labels.dtype}")
        if logits.shape[1] == 1:  # the score of a binary classifier is the logit of the second of two classes
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"{name} has labels outside of its {logits.shape[1]} classes")
        if not np.isfinite(logits).all():
            raise ValueError(f"{name} has logits that are not finite")
        return Predictions(logits.astype(np.float32), labels.astype(np.int64))

    def arrays(self, name: Any, *keys: str) -> dict[str, NDArray[Any]]:
        """Read arrays of an ``.npz`` file.

        Args:
            name: Path within the folder.
            *keys: Names of the arrays; only ``"labels"`` and ``"logits"`` must be there.

        Raises:
            ValueError: If the file is missing, damaged or outside of the folder.
        """
        path = (self.folder / str(name)).resolve()
        if not isinstance(name, str) or not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name!r} is not the name of a file within the folder")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: np.asarray(file[key]) for key in keys if key in file}
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except Exception as error:  # a damaged archive raises errors of many kinds
            raise ValueError(f"{name} cannot be read ({type(error).__name__})") from None
        if missing := [key for key in keys if key not in arrays and key in ("logits", "labels")]:
            raise ValueError(f"{name} has no array {' and '.join(missing)}")
        return arrays


def read_results(folder: str | Path) -> Results:
    """Read the results folder of a comparison.

    Args:
        folder: The folder, with ``comparison.json`` and ``runs.jsonl``.

    Returns:
        All that could be read. Lines that cannot be read are named in ``problems``.

    Raises:
        ValueError: If the folder does not hold the results of a comparison in this format.
        OSError: If a file cannot be read.
    """
    folder = Path(folder)
    file = folder / "comparison.json"
    if not file.is_file():
        kind = "without comparison.json" if folder.is_dir() else "which is not a folder"
        raise ValueError(message("`folder` to hold the results of a comparison", f"{str(folder)!r}, {kind}", _REMEDY))
    try:
        comparison = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(message(f"{file} to hold JSON", f"{error}", _REMEDY)) from None
    _check_comparison(file, comparison)
    problems: list[str] = []
    records = _read_runs(folder / "runs.jsonl", problems)
    order = {str(method): index for index, method in enumerate(comparison["methods"])}
    runs = sorted(records, key=lambda run: (order.get(run.method, len(order)), run.method, run.seed))
    return Results(folder, comparison, tuple(runs), tuple(problems))


def number(value: Any) -> float:
    """A number of a JSON file or of an array as a float; NaN for anything else, and for numbers of 1e100 and more.

    A run with such a number has diverged, and sums of such numbers can overflow.

    Example:
        >>> number(3), number(None), number(True)
        (3.0, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) < _LARGEST:  # type: ignore[operator]
        return math.nan
    return float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _check_comparison(file: Path, comparison: Any) -> None:
    if not isinstance(comparison, Mapping):
        raise ValueError(message(f"{file} to hold a mapping", type(comparison).__name__, _REMEDY))
    if comparison.get("format") != FORMAT:
        remedy = "It was written by another version of this package: make the report with that version."
        raise ValueError(message(f"`format` in {file} to be {FORMAT}", f"{comparison.get('format')!r}", remedy))
    for name, kinds in (("metric", str), ("mode", str), ("methods", list)):
        if not isinstance(comparison.get(name), kinds):
            raise ValueError(message(f"{file} to have `{name}`", f"{comparison.get(name)!r}", _REMEDY))
    if comparison["mode"] not in ("max", "min"):
        raise ValueError(message(f"`mode` in {file} to be 'max' or 'min'", f"{comparison['mode']!r}", _REMEDY))


def _read_runs(file: Path, problems: list[str]) -> list[StoredRun]:
    """The last readable record of each method and seed."""
    if not file.is_file():
        problems.append(f"{file.name} is missing: no run has ended yet.")
        return []
    lines = file.read_bytes().decode("utf-8", "replace").split("\n")
    records: dict[tuple[str, int], StoredRun] = {}
    repeated: Counter[str] = Counter()
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = _record(json.loads(line))
        except (ValueError, RecursionError):
            if index == len(lines) - 1:  # every complete line ends with a line break
                problems.append(
                    f"The last line of {file.name} is incomplete: that run was stopped while it was written. Run the"
                    " comparison again to complete it."
                )
            else:
                problems.append(f"Line {index + 1} of {file.name} is not the record of a run and was left out.")
            continue
        repeated[record.method] += (record.method, record.seed) in records
        records[record.method, record.seed] = record
    problems += [
        f"Of {method}, {count} record{'s' * (count > 1)} of a seed replaced by a later one."
        for method, count in repeated.items()
        if count
    ]
    return list(records.values())


def _record(entry: Any) -> StoredRun:
    """Check the types of a record; optional parts of a wrong type are left out."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise ValueError("not a record")
    if not isinstance(entry.get("seed"), int) or isinstance(entry.get("seed"), bool):
        raise ValueError("not a record")
    curve, warnings, error = entry.get("curve"), entry.get("warnings"), entry.get("error")
    seconds, steps, step_seconds = (number(entry.get(name)) for name in ("seconds", "steps", "step_seconds"))
    return StoredRun(
        entry["method"],
        entry["seed"],
        {str(name): number(value) for name, value in _mapping(entry.get("metrics")).items()},
        seconds if math.isfinite(seconds) else None,
        int(steps) if math.isfinite(steps) else None,
        step_seconds if math.isfinite(step_seconds) else None,
        tuple(
            {str(name): number(value) for name, value in point.items()}
            for point in (curve if isinstance(curve, list) else [])
            if isinstance(point, Mapping)
        ),
        None if error is None else str(error),
        entry.get("predictions") if isinstance(entry.get("predictions"), str) else None,
        tuple(map(str, warnings)) if isinstance(warnings, list) else (),
    )
