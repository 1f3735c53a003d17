"""Interleaved timing: every arm once a round, and the median of the per-round ratios with its spread."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record

# Without the first two, freed blocks go back to the system and are fetched again, and timings scatter by up to a third.
# The third lets all threads share one heap.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_ARENA_MAX": "1",
}
ENVIRONMENT = {**ALLOCATOR, "OMP_NUM_THREADS": "1"}


def prepare(module: str, steady: bool = True) -> None:
    """Use one thread and a steady allocator; restart the program if its environment lacks the settings.

    Args:
        module: Name under which the program runs, as in ``python -m <module>``.
        steady: False for the allocator's own settings: freed blocks go back to the system.
    """
    settings = ENVIRONMENT if steady else {**dict.fromkeys(ALLOCATOR), "OMP_NUM_THREADS": "1"}
    wrong = {name: value for name, value in settings.items() if (name in os.environ) != (value is not None)}
    if wrong:
        kept = {name: value for name, value in os.environ.items() if name not in wrong}
        added = {name: value for name, value in wrong.items() if value is not None}
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, kept | added)  # the allocator reads them at the start
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # keeps the garbage collector from walking the imported modules during a timing


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time and of wall time, of one unit of work."""

    cpu: float
    wall: float


Tick = Callable[[], None]
Arm = Callable[[Tick, int], None]  # does so many units of work; ticks before each of them and after the last
Runs = dict[str, list[Timing]]


def repeat(work: Callable[[int], Any]) -> Arm:
    """An arm that calls ``work(index)`` in a plain loop."""

    def arm(tick: Tick, units: int) -> None:
        for index in range(units):
            tick()
            work(index)
        tick()

    return arm


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        block: Units that an arm does when it is its turn.
        rounds: How often each arm has its turn.
        starts: How often all of it begins afresh, with new models at new addresses.
        warmup: Units before the first turn, untimed.
    """

    block: int
    rounds: int
    starts: int
    warmup: int


class _Lane(threading.Thread):
    """A thread in which an arm works while it is its turn, and waits between two units when it is not."""

    def __init__(self, arm: Arm, plan: Plan, wait: Callable[[], None]) -> None:
        super().__init__(daemon=True)  # after an error the other lanes never finish
        self.arm, self.plan, self.count, self.wait_for_device = arm, plan, 0, wait
        self.timings: list[Timing] = []
        self.error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def take_turn(self) -> None:
        """From the main thread: let the arm work for a block."""
        self._turn.release() if self.is_alive() else self.start()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            self.arm(self._tick, self.plan.warmup + self.plan.rounds * self.plan.block)
        except BaseException as error:
            self.error = error
        self._back.release()

    def _tick(self) -> None:
        done = self.count - self.plan.warmup
        self.count += 1
        if done < 0 or done % self.plan.block:
            return
        self.wait_for_device()
        if done:
            cpu, wall = time.thread_time() - self._cpu, time.perf_counter() - self._wall
            self.timings.append(Timing(cpu / self.plan.block, wall / self.plan.block))
        self._back.release()
        self._turn.acquire()
        self._wall, self._cpu = time.perf_counter(), time.thread_time()


def interleave(
    arms: Mapping[str, Arm], plan: Plan, label: str, wait_for_device: Callable[[], None] = lambda: None
) -> Runs:
    """The timings of every arm, taken in turn: A B A B ...

    Each arm runs in a thread of its own, of which only one is awake at a time, so that turns can be short and other
    work of the machine slows all arms alike.

    Args:
        arms: The arms to compare, by name.
        plan: How long.
        label: Printed while the measurement runs.
        wait_for_device: Called before a clock is read, such as ``torch.cuda.synchronize``.
    """
    runs: Runs = {name: [] for name in arms}
    for start in range(plan.starts):
        print(f"{label}: start {start + 1} of {plan.starts}", file=sys.stderr, flush=True)
        lanes = {name: _Lane(arm, plan, wait_for_device) for name, arm in arms.items()}
        for turn in range(plan.rounds + 2):  # the first turn warms up, the last one clears up
            gc.collect() if turn else None
            for lane in lanes.values():
                lane.take_turn()
        for name, lane in lanes.items():
            lane.join()
            runs[name] += lane.timings
    return runs


@dataclass(frozen=True)
class Row:
    """The answer to one question: the median over the rounds, the quartiles, and the gate that it has to stay under."""

    question: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    wall: float | None = None
    gate: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        return None if self.gate is None or self.value is None else self.value <= self.gate


def compare(
    question: str,
    runs: Runs,
    arm: str,
    *against: str,
    unit: str = "x",
    gate: float | None = None,
    note: str = "",
    clock: Literal["cpu", "wall"] = "cpu",
) -> Row:
    """The row of one arm against the sum of others, from the rounds' own ratios or differences.

    Args:
        question: First column.
        runs: The timings from :func:`interleave`.
        arm: The arm in question.
        against: The arms to compare with; their times are added.
        unit: ``"x"`` for the ratio, ``"ms"`` for the difference.
        gate: Upper limit.
        note: Last column.
        clock: Processor time, or wall time for work of a GPU.
    """

    def each(clock: Literal["cpu", "wall"]) -> list[float]:
        base = [sum(getattr(timing, clock) for timing in timings) for timings in zip(*map(runs.get, against))]  # noqa: B905
        seconds = [getattr(timing, clock) for timing in runs[arm]]
        pairs = zip(seconds, base, strict=True)
        return [a / b if unit == "x" else (a - b) * 1000 for a, b in pairs]

    return spread(question, each(clock), unit, gate, note, wall=statistics.median(each("wall")))


def absolute(question: str, runs: Runs, arm: str, note: str = "", clock: Literal["cpu", "wall"] = "cpu") -> Row:
    """The row of one arm by itself, in milliseconds: information, never a gate."""
    wall = statistics.median(timing.wall for timing in runs[arm]) * 1000
    return spread(question, [getattr(timing, clock) * 1000 for timing in runs[arm]], "ms", None, note, wall=wall)


def spread(
    question: str,
    values: Sequence[float],
    unit: str,
    gate: float | None = None,
    note: str = "",
    wall: float | None = None,
) -> Row:
    """The row of several values: their median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Row(question, middle, unit, low, high, wall, gate, note)


def show_rows(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title=title, caption="medians over the rounds; gates are for these medians")
    for column in ("question", "measured", "quartiles", "wall", "gate", "result", "note"):
        table.add_column(column, overflow="fold", no_wrap=column in ("measured", "quartiles", "result"))
    for row in rows:
        result = {None: "", True: "[green]pass[/]", False: "[red]FAIL[/]"}[row.passed]
        quartiles = "" if row.low is None or row.high is None else f"{_number(row.low)} .. {_number(row.high)}"
        measured = "" if row.value is None else f"{_number(row.value)} {row.unit}"
        gate = "" if row.gate is None else f"<= {row.gate:g}"
        wall = "" if row.wall is None else _number(row.wall)
        table.add_row(row.question, measured, quartiles, wall, gate, result, row.note)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def report(title: str, rows: Sequence[Row], path: Path, settings: Mapping[str, Any]) -> None:
    """Print the rows as a table and write them, with the settings, the machine and the versions, as JSON."""
    show_rows(title, rows)
    write_record(path, title, rows, settings)


def _number(value: float) -> str:
    return f"{value:.3f}"
