"""The record of a run, and the file that holds a line of JSON for each."""

from __future__ import annotations

import json
import math
import numbers
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from distill_core.terminal import short

_LARGEST: Final = 1e100


@dataclass(frozen=True)
class RunRecord:
    """One run: a line of ``runs.jsonl``.

    Args:
        method: Name of the method.
        seed: Its seed.
        metrics: The metrics of the trained student by name, and the last logged values of the training.
        seconds: Duration of the training without validation; 0 if it is not known.
        steps: Number of optimizer steps; 0 if it is not known.
        epochs: Number of epochs, of which the last may be incomplete.
        step_seconds: Duration of a step with the loading of its batch, undisturbed: see :func:`typical_seconds`.
        curve: Logged values after each validation, each with ``epoch`` and ``step``.
        error: The error that ended the run, or None.
        predictions: File of the student's predictions in the folder, or None.
        warnings: Remarks on the run.
        weights: File of the student's weights in the folder, or None.
        student: Digest of the student's weights before the first step.
        batches: Digests of the first batch of each epoch.
        random: How far two evaluations of the same weights differ in the metric; None if it was not measured.
    """

    method: str
    seed: int
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    epochs: int = 0
    step_seconds: float | None = None
    curve: list[dict[str, float | None]] = field(default_factory=list)
    error: str | None = None
    predictions: str | None = None
    warnings: list[str] = field(default_factory=list)
    weights: str | None = None
    student: str | None = None
    batches: list[str] = field(default_factory=list)
    random: float | None = None

    def value(self, metric: str) -> float | None:
        """The metric, if the run has ended without an error."""
        return None if self.error is not None else self.metrics.get(metric)


@dataclass(frozen=True)
class ReadRuns:
    """The content of a file of runs.

    Args:
        records: The last record of each method and seed.
        damaged: Number and error of each line that is not a record.
        incomplete: Whether the last line was cut off.
        replaced: How many records of a method were replaced by a later one with the same seed.
    """

    records: dict[tuple[str, int], RunRecord]
    damaged: tuple[tuple[int, str], ...]
    incomplete: bool
    replaced: Mapping[str, int]


def read_runs(file: Path) -> ReadRuns:
    """Read a file of runs, and leave out all that is damaged; a file that does not exist has no runs.

    Args:
        file: The file. Every complete line ends with a line break.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    records: dict[tuple[str, int], RunRecord] = {}
    damaged, incomplete, replaced = [], False, Counter[str]()
    for number_of_line, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _record(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number_of_line == len(lines):
                incomplete = True
            else:
                damaged.append((number_of_line, short(error)))
            continue
        replaced[record.method] += (record.method, record.seed) in records
        records[record.method, record.seed] = record
    return ReadRuns(records, tuple(damaged), incomplete, replaced)


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


def _record(entry: Any) -> RunRecord:
    """Check the types of a record; other parts than method and seed are left out if they have a wrong type."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"a {type(entry).__name__}")
    method, seed = entry.get("method"), entry.get("seed")
    if not isinstance(method, str) or not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"method={method!r} and seed={seed!r}")
    error, curve = entry.get("error"), _list(entry.get("curve"))
    texts = {name: entry[name] for name in ("predictions", "weights", "student") if isinstance(entry.get(name), str)}
    return RunRecord(
        method,
        seed,
        _numbers(entry.get("metrics")),
        seconds=_finite(entry.get("seconds")) or 0.0,
        steps=int(_finite(entry.get("steps")) or 0),
        epochs=int(_finite(entry.get("epochs")) or 0),
        step_seconds=_finite(entry.get("step_seconds")),
        curve=[_numbers(point) for point in curve if isinstance(point, Mapping)],
        error=None if error is None else str(error),
        warnings=[str(warning) for warning in _list(entry.get("warnings"))],
        batches=[str(digest) for digest in _list(entry.get("batches"))],
        random=_finite(entry.get("random")),
        **texts,
    )


def _finite(value: Any) -> float | None:
    known = number(value)
    return known if math.isfinite(known) else None


def _numbers(values: Any) -> dict[str, float | None]:
    return {str(name): _finite(value) for name, value in values.items()} if isinstance(values, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
