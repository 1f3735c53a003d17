"""The results folder of a comparison for a report, which shows all that can be read, and the problems in words.

``records`` goes on with the comparison in the same folder, and raises at the first problem.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distill_core.checks import message
from distill_core.guidance.comparison import Comparison, EqualCompute
from distill_core.guidance.records import ALONE, COMPARISON, EQUAL_COMPUTE, FORMAT, RUNS
from distill_core.guidance.run_records import ReadRuns, RunRecord, number, read_runs

_REMEDY: Final = "Pass the folder that a comparison of methods has written."


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
    runs: tuple[RunRecord, ...]
    problems: tuple[str, ...]

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        return str(self.comparison["metric"])

    @property
    def curve_metric(self) -> str:
        """Name of the metric whose curves are shown: that of the comparison, or its twin on the validation set.

        Runs are tested once, after the training, so that a metric such as ``test_accuracy`` has no curve of its own.
        """
        recorded = {name for run in self.runs for point in run.curve for name in point}
        rest = self.metric.removeprefix("test")
        twins = [f"{prefix}{rest}" for prefix in ("val", "valid", "validation")] if rest != self.metric else []
        return next((name for name in (self.metric, *twins) if name in recorded), self.metric)

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

    def finished(self, method: str) -> list[RunRecord]:
        """The runs of a method that ended without an error, by seed."""
        return [run for run in self.runs if run.method == method and run.error is None]

    def values(self, method: str) -> dict[int, float]:
        """The deciding metric of a method's finished runs by seed; a value that is not finite is left out."""
        return self.compared.values(method)

    @property
    def compared(self) -> Comparison:
        """The comparison of the runs."""
        equal = _mapping(self.comparison.get("equal_compute"))
        ratio, seed, steps = (number(equal.get(name)) for name in ("ratio", "seed", "steps"))
        known = all(map(math.isfinite, (ratio, seed, steps)))
        return Comparison(
            self.folder,
            self.metric,
            "max" if self.higher_is_better else "min",
            self.seeds,
            self.distilled,
            self.runs,
            EqualCompute(ratio, str(equal.get("method")), int(seed), int(steps)) if known else None,
        )

    def teacher_value(self, metric: str | None = None) -> float:
        """A metric of the teacher; NaN if it is not known.

        Args:
            metric: Name of the metric; None for the deciding metric.
        """
        metrics = _mapping(_mapping(self.comparison.get("teacher")).get("metrics"))
        return number(metrics.get(self.metric if metric is None else metric))

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
    file = folder / COMPARISON
    if not file.is_file():
        kind = f"without {COMPARISON}" if folder.is_dir() else "which is not a folder"
        raise ValueError(message("`folder` to hold the results of a comparison", f"{str(folder)!r}, {kind}", _REMEDY))
    try:
        comparison = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(message(f"{file} to hold JSON", f"{error}", _REMEDY)) from None
    _check_comparison(file, comparison)
    file = folder / RUNS
    read = read_runs(file)
    order = {str(method): index for index, method in enumerate(comparison["methods"])}
    runs = sorted(read.records.values(), key=lambda run: (order.get(run.method, len(order)), run.method, run.seed))
    return Results(folder, comparison, tuple(runs), tuple(_problems(file, read)))


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


def _problems(file: Path, read: ReadRuns) -> Iterator[str]:
    """Sentences on the parts of a file of runs that could not be read."""
    if not file.is_file():
        yield f"{file.name} is missing: no run has ended yet."
    for line, _ in read.damaged:
        yield f"Line {line} of {file.name} is not the record of a run and was left out."
    if read.incomplete:
        yield (
            f"The last line of {file.name} is incomplete: that run was stopped while it was written. Run the"
            " comparison again to complete it."
        )
    for method, count in read.replaced.items():
        if count:
            yield f"Of {method}, {count} record{'s' * (count > 1)} of a seed replaced by a later one."
