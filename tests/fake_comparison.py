"""Runs of a comparison without a framework: their metrics are made up."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core.guidance.driver import MissingMetricError, Plan, Task, carry_out
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.run_records import RunRecord

METHODS = ("a", "b")


@dataclass
class Fake:
    """Makes records; ``errors`` holds exceptions and errors of records by method and seed."""

    values: Mapping[str, float] = field(default_factory=lambda: {ALONE: 0.5, EQUAL_COMPUTE: 0.6, "a": 0.7, "b": 0.4})
    errors: Mapping[tuple[str, int], Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=lambda: {"a": 1.5, "b": 2.0})
    done: list[Task] = field(default_factory=list)
    kill_at: int | None = None

    def __call__(self, task: Task) -> RunRecord:
        self.done.append(task)
        if len(self.done) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        error = self.errors.get((task.method, task.seed))
        if isinstance(error, Exception):
            raise error
        return RunRecord(
            task.method,
            task.seed,
            {} if error else {"acc": self.values[task.method] + 0.01 * task.seed * (1 + len(task.method) % 4)},
            seconds=2.0,
            steps=task.steps or 100,
            epochs=1,
            step_seconds=0.1 * self.costs.get(task.method, 1.0),
            error=error,
        )


def plan(folder: Path, **changed: Any) -> Plan:
    settings: dict[str, Any] = {"metric": "acc", "mode": "max", "seeds": [0, 1, 2], "methods": METHODS}
    return Plan(folder, **{**settings, "settings": {"trainer": "ten epochs"}, **changed})


def missing_metric(task: Task) -> RunRecord:
    raise MissingMetricError("the metric is missing")


if __name__ == "__main__":  # a comparison that is killed in its n-th run, and prints the runs that it has made
    fake = Fake(kill_at=int(sys.argv[2]) or None)
    carry_out(plan(Path(sys.argv[1])), fake)
    print(json.dumps([[task.method, task.seed, task.steps] for task in fake.done]))
