"""The answer to "did it help?": paired differences over the seeds, a table, and a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core.checks import message
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE, ResultsFolder
from distill_core.guidance.run_records import RunRecord
from distill_core.guidance.statistics import CONFIDENCE, Estimate, estimate, paired


@dataclass(frozen=True)
class EqualCompute:
    """The compute that the student alone gets to be a fair opponent.

    Args:
        ratio: Duration of a step of the most expensive method, as a multiple of that of the student alone; 1 or more.
        method: That method.
        seed: The seed with which both were measured.
        steps: Number of optimizer steps of the student alone that take as long as the method's run.
    """

    ratio: float
    method: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, and what follows from them. Print it for the table and the verdict.

    Args:
        folder: The folder of the results.
        metric: The metric that decides.
        mode: ``"max"`` if a greater metric is better, ``"min"`` if a smaller one is.
        seeds: The seeds.
        methods: The methods that distil.
        runs: The runs, by method and seed.
        equal_compute: The compute of the student alone that is compared at equal compute; None before it is known.
    """

    folder: Path
    metric: str
    mode: str
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    runs: tuple[RunRecord, ...]
    equal_compute: EqualCompute | None = None

    def values(self, method: str) -> dict[int, float]:
        """The metric of a method by seed, without failed runs."""
        values = {run.seed: run.value(self.metric) for run in self.runs if run.method == method}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, method: str) -> Estimate | None:
        """The mean of a method over the seeds, with an interval of 95 % for this method; None if every run failed."""
        values = list(self.values(method).values())
        return estimate(values) if values else None

    def difference(self, method: str, base: str = ALONE) -> Estimate | None:
        """The mean of the differences to another method with the same seed.

        The intervals are as wide as it takes for those of all methods to be right together with a probability of 95 %
        (Bonferroni's correction for the number of methods).

        Args:
            method: The method.
            base: The method to compare it with: the student alone, at equal steps or at equal compute.

        Returns:
            The estimate of the method's metric minus the other's; None if no seed has both.
        """
        return paired(self.values(method), self.values(base), comparisons=len(self.methods))

    @property
    def in_points(self) -> bool:
        """Whether the metric is a share of which more is better, such as an accuracy: written in percent."""
        values = [value for run in self.runs if (value := run.value(self.metric)) is not None]
        return self.mode == "max" and all(0 <= value <= 1 for value in values)

    @property
    def verdict(self) -> str:
        """A sentence or two for each method, and remarks on anything that weakens them, one on each line."""
        return "\n".join([*map(self.sentence, self.methods), *self.remarks])

    @property
    def table(self) -> str:
        """The methods in a table of text: means, differences, steps and seconds."""
        rows = [
            ("", "", "against", "against", "", ""),
            ("method", "mean", ALONE, "equal compute", "steps", "seconds"),
        ]
        for method in (ALONE, EQUAL_COMPUTE, *self.methods):
            ended = [run for run in self.runs if run.method == method and run.error is None]
            to_alone = None if method == ALONE else self.difference(method)
            to_equal = None if method in (ALONE, EQUAL_COMPUTE) else self.difference(method, EQUAL_COMPUTE)
            rows.append(
                (
                    "  at equal compute" if method == EQUAL_COMPUTE else method,
                    self._text(self.mean(method)),
                    self._text(to_alone, signed=True),
                    self._text(to_equal, signed=True),
                    f"{round(statistics.fmean(run.steps for run in ended)):,}" if ended else "",
                    f"{statistics.fmean(run.seconds for run in ended):.1f}" if ended else "",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = []
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(2, "-" * max(map(len, lines)))
        title = f"{self.metric}{' in %' if self.in_points else ''}: "
        if len(self.seeds) == 1:
            return "\n".join([f"{title}one seed, without intervals", *lines])
        lines.insert(0, f"{title}means of {len(self.seeds)} seeds, with intervals of {CONFIDENCE:.0%}")
        if len(self.methods) > 1:
            lines.append(f"Intervals of differences: right together for all {len(self.methods)} methods (Bonferroni).")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.verdict}"

    def report(self, file: str | Path | None = None) -> Path:
        """Write the report on the comparison, one HTML file.

        Args:
            file: The file; None is ``report.html`` in the folder.

        Returns:
            The file.

        Raises:
            ImportError: If jinja2 is not installed.
        """
        from distill_core.guidance.report import write_report  # imported late: it needs jinja2

        return write_report(self.folder, file)

    @classmethod
    def read(cls, folder: str | Path) -> Comparison:
        """Read the results of a comparison, finished or not.

        Args:
            folder: The folder.

        Returns:
            The comparison.

        Raises:
            ValueError: If the folder does not hold the results of a comparison.
        """
        results = ResultsFolder(Path(folder))
        comparison, records = results.read(), results.runs()
        if comparison is None:
            raise ValueError(message("`folder` to hold a comparison", f"{str(folder)!r} without comparison.json"))
        methods, seeds, equal = comparison["methods"], comparison["seeds"], comparison.get("equal_compute")
        return cls(
            Path(folder),
            comparison["metric"],
            comparison["mode"],
            tuple(seeds),
            tuple(method for method in methods if method not in (ALONE, EQUAL_COMPUTE)),
            tuple(records[method, seed] for method in methods for seed in seeds if (method, seed) in records),
            None if equal is None else EqualCompute(**equal),
        )

    # In words --------------------------------------------------------------------------------------------------------

    def _text(self, estimated: Estimate | None, *, signed: bool = False) -> str:
        if estimated is None:
            return ""
        scale = 100.0 if self.in_points else 1.0
        mean, margin = scale * estimated.mean, None if estimated.margin is None else scale * estimated.margin
        digits = 1 if self.in_points else _decimals(mean, margin)
        text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
        return text if margin is None else f"{text} ± {margin:.{digits}f}"

    def sentence(self, method: str) -> str:
        """The verdict on a method: against the student alone at equal steps, and at equal compute where it was made.

        Args:
            method: The method.
        """
        estimated = self.difference(method)
        if estimated is None:
            return f"{method}: not compared, since no seed has a run of it and one of the {ALONE}."
        unit = f"{'points of ' if self.in_points else ''}{self.metric}"
        seeds = f"{estimated.count} seed{'s' * (estimated.count > 1)}"
        if estimated.margin is None:
            return (
                f"{method}: {self._text(estimated, signed=True)} {unit} against the {ALONE} with one seed, which has no"
                " interval and proves little: take several seeds."
            )
        better = estimated.sign if self.mode == "max" else -estimated.sign
        size = self._text(Estimate(abs(estimated.mean), estimated.margin, estimated.count))
        if better:
            word = "better" if better > 0 else "worse"
            sentence = f"{method} is {word} than the {ALONE} by {size} {unit} ({seeds})."
        else:
            sentence = (
                f"{method}: no clear difference to the {ALONE}, {self._text(estimated, signed=True)} {unit} ({seeds})."
            )
        return f"{sentence}{self._at_equal_compute(method)}"

    def _at_equal_compute(self, method: str) -> str:
        estimated = self.difference(method, EQUAL_COMPUTE)
        if estimated is None or estimated.margin is None:
            return ""
        steps = "" if self.equal_compute is None else f" ({self.equal_compute.ratio:.2f} times the steps)"
        start = f" Against the {ALONE} at equal compute{steps}"
        better = estimated.sign if self.mode == "max" else -estimated.sign
        size = self._text(Estimate(abs(estimated.mean), estimated.margin, estimated.count))
        if better:
            return f"{start} it is {'better' if better > 0 else 'worse'} by {size}."
        return f"{start} the difference is not clear, {self._text(estimated, signed=True)}."

    @property
    def remarks(self) -> list[str]:
        """Sentences on anything that weakens the verdict: failed runs, random evaluations, runs that are not paired."""
        remarks = [
            f"{run.method} failed with seed {run.seed} ({run.error}): its pairs are left out."
            for run in self.runs
            if run.error is not None
        ]
        if uncertain := [run for run in self.runs if run.random]:
            largest = max(uncertain, key=lambda run: run.random or 0.0)
            remarks.append(
                f"The evaluation is random: two evaluations of the same weights ({largest.method}) differ by"
                f" {self._plain(largest.random or 0.0)} in {self.metric}. Turn the randomness off, or the noise hides"
                " differences."
            )
        for name, things in (("student", "initial weights"), ("batches", "batches")):
            if unequal := self._unequal(lambda run, name=name: getattr(run, name)):  # type: ignore[misc]
                remarks.append(
                    f"Not paired: with the same seed {unequal} had other {things} than the {ALONE}, so the intervals"
                    " are wider than they could be. Make models and data from the global random generators alone, and"
                    " pass functions that make them for each run."
                )
        remarks += dict.fromkeys(
            f"{run.method}, seed {run.seed}: {warning}" for run in self.runs for warning in run.warnings
        )
        return remarks

    def _plain(self, difference: float) -> str:
        return f"{100 * difference:.2g} points" if self.in_points else f"{difference:.2g}"

    def _unequal(self, part: Callable[[RunRecord], Any]) -> str:
        """The methods of which a run began otherwise than the student alone with the same seed."""
        alone = {run.seed: part(run) for run in self.runs if run.method == ALONE}
        names = dict.fromkeys(
            run.method for run in self.runs if run.error is None and _differ(part(run), alone.get(run.seed))
        )
        return ", ".join(names)


def _differ(first: Any, second: Any) -> bool:
    if not first or not second:
        return False
    if isinstance(first, str):
        return bool(first != second)
    return any(one_digest != other for one_digest, other in zip(first, second, strict=False))


def _decimals(mean: float, margin: float | None) -> int:
    """Decimals with which the margin, or else the mean, has two digits that count."""
    size = abs(margin if margin else mean)
    return 3 if size == 0 else min(max(1 - math.floor(math.log10(size)), 0), 9)


def check_mode(mode: str) -> None:
    """Check the direction of a metric.

    Raises:
        ValueError: If it is not ``"max"`` or ``"min"``.
    """
    if mode not in ("max", "min"):
        expected = '`mode` to be "max", if a greater metric is better, or "min"'
        raise ValueError(message(expected, f"mode={mode!r}"))


def wrong_metric(metric: str, names: Sequence[str]) -> str:
    """The message for a metric that a run has not measured."""
    listed = ", ".join(map(repr, sorted(names))) or "nothing"
    remedy = "Log it in `validation_step`, or pass one of these."
    return message(f"`metric` to name a metric of the evaluation, one of {listed}", f"metric={metric!r}", remedy)
