"""The runs of a comparison, in order: those that are not in its folder yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core.checks import message
from distill_core.guidance.comparison import Comparison, EqualCompute
from distill_core.guidance.processes import in_processes
from distill_core.guidance.records import (
    ALONE,
    EQUAL_COMPUTE,
    ResultsFolder,
    check_settings,
    described,
    settings_fingerprint,
)
from distill_core.guidance.run_records import RunRecord
from distill_core.locks import locked
from distill_core.terminal import one_line


class MissingMetricError(ValueError):
    """The metric of a comparison is not among those that a run has measured."""


@dataclass(frozen=True)
class Task:
    """One run to make.

    Args:
        method: Name of the method.
        seed: Its seed.
        steps: Number of optimizer steps, if it is not that of the settings.
        ratio: These steps as a multiple of those of the settings; 1 or more.
        examined: Whether to evaluate twice, to see whether the evaluation is random.
    """

    method: str
    seed: int
    steps: int | None = None
    examined: bool = False
    ratio: float = 1.0

    def stretched(self, epochs: int) -> int:
        """The epochs that the steps take, by which a learning rate schedule may count.

        Args:
            epochs: The epochs of the settings.

        Example:
            >>> Task("student alone", 0, steps=15, ratio=1.5).stretched(3)
            5
        """
        return math.ceil(epochs * self.ratio)


@dataclass(frozen=True)
class Plan:
    """A comparison to make.

    Args:
        folder: The folder of its results.
        metric: The metric that decides.
        mode: ``"max"`` if a greater metric is better, else ``"min"``.
        seeds: The seeds.
        methods: Names of the methods that distil.
        settings: All other settings that change the results, in words.
        facts: Makes further entries of ``comparison.json``, when the folder is new.
        workers: Number of processes; 1 trains in this one.
        resume: Whether runs in the folder are kept.
        show: Called with a line for each finished run.
    """

    folder: Path
    metric: str
    mode: str
    seeds: Sequence[int]
    methods: Sequence[str]
    settings: Mapping[str, str]
    facts: Callable[[], Mapping[str, Any]] = dict
    workers: int = 1
    resume: bool = True
    show: Callable[[str], None] = field(default=lambda line: None)


def carry_out(plan: Plan, train: Callable[[Task], RunRecord]) -> Comparison:
    """Make the runs of a comparison that its folder does not hold yet.

    Args:
        plan: The comparison.
        train: Makes a run. An exception is a mistake in the settings if it comes from the first seed; else the run
            counts as failed.

    Returns:
        The comparison.

    Raises:
        ValueError: If the folder holds runs of other settings.
        CacheError: If another process writes into the folder.
    """
    folder = ResultsFolder(plan.folder)
    settings = {
        "metric": plan.metric,
        "mode": plan.mode,
        "methods": described(list(plan.methods)),
        **plan.settings,
    }
    with locked(plan.folder, "comparing"):
        if not plan.resume:
            folder.clear()
        folder.repair()
        comparison = folder.read()
        if comparison is None or not folder.runs():
            comparison = {"settings": settings, "fingerprint": settings_fingerprint(settings), **plan.facts()}
        else:
            check_settings(plan.folder, comparison.get("settings", {}), settings)
        comparison |= {"metric": plan.metric, "mode": plan.mode, "seeds": list(plan.seeds)}
        comparison["methods"] = [ALONE, EQUAL_COMPUTE, *plan.methods]
        folder.write(comparison)
        return _Runs(plan, train, folder, comparison).all()


class _Runs:
    """The runs of a comparison.

    Args:
        plan: The comparison.
        train: Makes a run.
        folder: The folder.
        comparison: The content of its file.
    """

    def __init__(
        self, plan: Plan, train: Callable[[Task], RunRecord], folder: ResultsFolder, comparison: dict[str, Any]
    ) -> None:
        self.plan, self.train, self.folder, self.comparison = plan, train, folder, comparison
        self.records = folder.runs()
        known = comparison.get("equal_compute")
        self.equal = None if known is None else EqualCompute(**known)

    def all(self) -> Comparison:
        """Make the runs that are missing or have failed."""
        for tasks in self._stages():
            missing = [task for task in tasks if not self._has(task)]
            if self.plan.workers > 1 and len(missing) > 1:
                for task, future in in_processes(self.train, missing, self.plan.workers):
                    self._add(task, future.result)
            else:
                for task in missing:
                    self._add(task, lambda task=task: self.train(task))  # type: ignore[misc]
        plan = self.plan
        runs = [
            self.records[method, seed]
            for method in self.comparison["methods"]
            for seed in plan.seeds
            if (method, seed) in self.records
        ]
        return Comparison(
            plan.folder, plan.metric, plan.mode, tuple(plan.seeds), tuple(plan.methods), tuple(runs), self.equal
        )

    def _has(self, task: Task) -> bool:
        record = self.records.get((task.method, task.seed))
        return record is not None and record.error is None

    def _add(self, task: Task, result: Callable[[], RunRecord]) -> None:
        try:
            record = result()
        except MissingMetricError:
            raise
        except Exception as error:
            if task.seed == self.plan.seeds[0]:
                raise
            record = RunRecord(task.method, task.seed, error=one_line(f"{type(error).__name__}: {error}"))
        self.folder.append(record)
        self.records[task.method, task.seed] = record
        value = record.value(self.plan.metric)
        shown = f"failed: {record.error}" if value is None else f"{self.plan.metric} {value:.4g}"
        self.plan.show(f"{task.method}, seed {task.seed}: {shown} ({record.seconds:.1f} s)")

    def _stages(self) -> Iterator[list[Task]]:
        """The first seed; then all others, and the student alone at the compute that the first seed has measured."""
        first, *others = self.plan.seeds
        yield self._of(first)
        measured = self._measured()
        tasks = self._alone([first]) if measured else []
        for seed in others:
            tasks += [*self._of(seed), *(self._alone([seed]) if measured else [])]
        yield tasks
        if not measured and self._measured():  # no method has finished with the first seed
            yield self._alone(self.plan.seeds)

    def _of(self, seed: int) -> list[Task]:
        first = seed == self.plan.seeds[0]
        return [Task(method, seed, examined=first) for method in (ALONE, *self.plan.methods)]

    def _alone(self, seeds: Sequence[int]) -> list[Task]:
        if self.equal is None:
            return [Task(EQUAL_COMPUTE, seed) for seed in seeds]
        return [Task(EQUAL_COMPUTE, seed, self.equal.steps, ratio=self.equal.ratio) for seed in seeds]

    def _measured(self) -> bool:
        """Whether the cost of a step is known, from the first seed with which the student alone and a method ended."""
        if self.equal is not None:
            return True
        for seed in self.plan.seeds:
            alone = self.records.get((ALONE, seed))
            if alone is None or alone.error is not None or not alone.step_seconds:
                continue
            costs = {
                method: record.step_seconds / alone.step_seconds
                for method in self.plan.methods
                if (record := self.records.get((method, seed))) and record.error is None and record.step_seconds
            }
            if costs:
                method = max(costs, key=lambda name: costs[name])
                ratio = max(1.0, costs[method])
                self.equal = EqualCompute(ratio, method, seed, round(alone.steps * ratio))
                self.comparison["equal_compute"] = vars(self.equal)
                self.folder.write(self.comparison)
                return True
        return False


def check_fresh(name: str, first: Iterable[Hashable], second: Iterable[Hashable]) -> None:
    """Check that a function makes new weights whenever it is called, so that no run goes on where another ended.

    Args:
        name: The argument that is the function.
        first: Keys of the weights of one call that are trained, equal for weights that change together.
        second: Those of another call, while the former weights exist.

    Raises:
        ValueError: If both have a weight.
    """
    if {*first} & {*second}:
        remedy = "Build the network inside the function, or copy it there."
        expected = f"`{name}` to make new weights for each run"
        raise ValueError(message(expected, "the same again, which every run would train further", remedy))


def checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    """The seeds of a comparison: ``5`` is 0 to 4.

    Raises:
        ValueError: If the list is empty, one is negative or not whole, or one stands twice.
    """
    listed = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    if (
        not isinstance(listed, (list, tuple, range))
        or not listed
        or any(not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32 for seed in listed)
        or len({*listed}) < len(listed)
    ):
        raise ValueError(
            message("`seeds` to be a number of seeds, or distinct whole numbers from 0", f"seeds={seeds!r}")
        )
    return list(listed)
