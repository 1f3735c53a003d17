"""Time and peak memory of a forward and backward pass on one device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROUNDS = {"cuda": 15, "cpu": 3}
IN_A_ROW = 10


@dataclass(frozen=True)
class Measured:
    """Time, memory and value of one arm; the error's text if it failed.

    Attributes:
        question: Name of the measurement.
        arm: Name of the way to do it.
        shape: Shape of the inputs, in words.
        milliseconds: Of one step by itself, the first launch included.
        in_a_row: Milliseconds of a step among others, whose launches overlap with the work of the device.
        extra_mib: Peak memory beyond what is allocated after the step.
        value: Result of the step.
        error: Reason for a missing result.
    """

    question: str
    arm: str
    shape: str = ""
    milliseconds: float | None = None
    in_a_row: float | None = None
    extra_mib: float | None = None
    value: float | None = None
    error: str = ""


def wait_for(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def measured_step(question: str, arm: str, step: Callable[[], Tensor], device: str, shape: str = "") -> Measured:
    """The median time of a step, and its peak memory beyond what is allocated after it.

    Args:
        question: The first two columns.
        arm: Name of the arm.
        step: Does the work and returns its value, a scalar.
        device: ``"cpu"`` or ``"cuda"``; memory is measured on the latter only.
        shape: Shape of the inputs, in words.
    """
    try:
        value, extra, seconds = step().item(), None, []
        step()
        if device == "cuda":
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            extra = (torch.cuda.max_memory_allocated() - base) / 2**20
        for _ in range(ROUNDS[device]):
            wait_for(device)
            start = time.perf_counter()
            step()
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            step()
        wait_for(device)
        in_a_row = (time.perf_counter() - start) / IN_A_ROW
        return Measured(question, arm, shape, 1000 * statistics.median(seconds), 1000 * in_a_row, extra, value)
    except Exception as error:  # one arm that lacks memory must not end the others
        return Measured(question, arm, shape, error=f"{type(error).__name__}: {error}"[:120])
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def show_steps(title: str, rows: Sequence[Measured], against: str) -> None:
    """Print the rows as a table.

    Args:
        title: Title of the table.
        rows: The rows, those of one question together.
        against: Name of the arm to which the times of a question are compared.
    """
    table = Table(title=title)
    for column in ("question", "shape", "arm", "ms", f"of the {against}", "in a row", "extra MiB", "value"):
        table.add_column(column)
    base = {row.question: row.milliseconds for row in rows if row.arm == against}
    for row in rows:
        compared = base.get(row.question)
        ratio = row.milliseconds / compared if row.milliseconds and compared else None
        values = (row.milliseconds, ratio, row.in_a_row, row.extra_mib, row.value)
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(row.question, row.shape, row.arm, *numbers[:4], row.error or numbers[4])
    Console(width=150).print(table)
