"""The records of the benchmarks, and their figures as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "records"
BENCHMARKS = (
    *("step_overhead", "fused_linear", "token_alignment", "on_device", "device_steps", "pair_layers", "device_cache"),
    *("keras_step", "cache", "cache_reading", "loss_time", "loss_memory", "codecs"),
)
ON_DEVICE = ("on_device", "device_steps", "device_cache")
UNITS = {"x": "", "calls": "", "us": "µs"}  # all others are written as they are
COUNTED = ("calls", "bytes")
MISSED = "**missed**"

Entry = dict[str, Any]


class Record:
    """The rows that a benchmark measured, and where.

    Args:
        name: Name of the benchmark.
        content: Content of its file, see :func:`benchmarks.record.write_record`.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.name, self.content = name, content
        self.settings: Entry = content["settings"]
        self.rows: list[Entry] = content["rows"]
        self.questions = {row["question"]: row for row in self.rows if row["kind"] == "Row"}

    def row(self, question: str) -> Entry:
        """The row of a question.

        Raises:
            KeyError: If the record does not answer it.
        """
        if question not in self.questions:
            raise KeyError(f"Expected a row {question!r} in the record of {self.name}. Its rows: {[*self.questions]}")
        return self.questions[question]

    def of_kind(self, kind: str) -> list[Entry]:
        """The rows that were dataclasses of this name."""
        return [row for row in self.rows if row["kind"] == kind]

    def arms(self, question: str) -> dict[str, Entry]:
        """The measured arms of a question, by name."""
        return {row["arm"]: row for row in self.of_kind("Measured") if row["question"] == question}


def read_records(folder: Path = RECORDS) -> dict[str, Record]:
    """The records in a folder, by name of the benchmark, in the order of the page."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {
        name: Record(name, json.loads(file.read_text(encoding="utf-8")))
        for name, file in files.items()
        if file.exists()
    }


def number(value: float, decimals: int | None = None) -> str:
    """A number with two or three significant digits, thousands with commas; whole numbers as they are."""
    if decimals is None:
        size = abs(value)
        if size >= 100 or isinstance(value, int):
            decimals = 0
        elif size >= 10:
            decimals = 1
        elif size >= 0.1:
            decimals = 2
        else:
            return f"{value:.2g}"
    return f"{value:,.{decimals}f}"


def with_unit(value: float, unit: str, decimals: int | None = None) -> str:
    """A number and its unit, without the unit for ratios and counts."""
    value = round(value) if unit in COUNTED and value == round(value) else value
    return f"{number(value, decimals)} {UNITS.get(unit, unit)}".rstrip()


def shown(row: Entry) -> str:
    """The measured value of a row; the reason if it was not measured.

    It has as many decimals as it takes to see whether it is above its goal.
    """
    value, gate = row["value"], row["gate"]
    if value is None:
        return row["note"]
    text = with_unit(value, row["unit"])
    for decimals in (2, 3, 4):
        if gate is None or (float(text.split()[0].replace(",", "")) <= gate) == row["passed"]:
            break
        text = with_unit(value, row["unit"], decimals)
    return text


def quartiles(row: Entry) -> str:
    """Half of the rounds were between these; empty for a row of one value."""
    if row["low"] is None:
        return ""
    low, high = (number(row[side]) for side in ("low", "high"))
    return f"{low} to {with_unit(row['high'], row['unit'])}" if low != high else shown(row)


def goal(row: Entry) -> str:
    """The goal of a row, with a remark if it is missed; empty without one."""
    return limit(row) + (f", {MISSED}" if row["passed"] is False else "")


def limit(row: Entry) -> str:
    """The goal of a row by itself; empty without one."""
    return "" if row["gate"] is None else f"{row['gate']:g} {UNITS.get(row['unit'], row['unit'])}".rstrip()


def span(values: Iterable[float]) -> str:
    """The smallest and the largest of some numbers; one number if they read the same."""
    values = list(values)
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def markdown(heads: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A table, without the columns that are empty in all lines, except the first."""
    heads, table = list(heads), [[str(cell) for cell in line] for line in lines]
    kept = [column for column in range(len(heads)) if column == 0 or any(line[column] for line in table)]
    rows = [heads, ["---"] * len(heads), *table]
    written = (" | ".join(row[column] for column in kept) for row in rows)
    return "\n".join("|---|" + "---|" * (len(kept) - 1) if row.startswith("---") else f"| {row} |" for row in written)
