"""Peak memory of the relation and kernel losses, as multiples of their inputs: ``python -m benchmarks.loss_memory``.

Forward and backward pass of each loss in a process of its own: the highest resident memory that Linux has seen, less
what was resident before. Unlike counts of live tensors that includes the work space of matrix products, and it is the
same measure in both halves. The inputs, student and teacher together, are not counted; the student's gradient, a half
of them, is. Freed blocks go back to the system at once, so that nothing is hidden in the allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.loss_cases import CASES, SMALL, Shape
from benchmarks.timing import Row, report

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
Run = Callable[[Shape], Callable[[], object]]  # makes inputs of a shape and returns the function that does the work
GATE = 3


def torch_runs(name: str) -> Run:
    import torch

    from lightning_distill import losses

    case = CASES[name]
    loss = getattr(losses, case.loss)(**case.settings)

    def prepared(shape: Shape) -> Callable[[], object]:
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
        return lambda: loss(student, teacher).backward()

    return prepared


def keras_runs(name: str) -> Run:
    import tensorflow as tf

    from keras_distill import losses

    case = CASES[name]
    loss = getattr(losses, case.loss)(**case.settings)

    @tf.function
    def gradient(student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = loss(teacher, student)
        return tape.gradient(value, student)

    def prepared(shape: Shape) -> Callable[[], object]:
        if len(shape) == 4 and "map" not in name:
            shape = (shape[0], *shape[2:], shape[1])
        student, teacher = (tf.random.stateless_normal(shape, (0, seed)) for seed in (1, 2))
        return lambda: gradient(student, teacher)

    return prepared


HALVES = {"torch": torch_runs, "tensorflow": keras_runs}


def resident(key: str) -> int:
    """Bytes of this process that are in memory now (``VmRSS``), or were at its peak (``VmHWM``)."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else 0


def measure(half: str, name: str) -> int:
    """Bytes beyond the inputs, in a process that does nothing else."""
    case = CASES[name]
    prepared = HALVES[half](name)
    prepared(SMALL[case.shape])()  # loads and compiles everything once
    work = prepared(case.shape)
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measured(half: str, name: str) -> Row:
    arguments = [sys.executable, "-m", "benchmarks.loss_memory", "--half", half, "--loss", name]
    environment = {**os.environ, **ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": half}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    case, peak = CASES[name], json.loads(done.stdout.splitlines()[-1])
    inputs = 2 * 4
    for size in case.shape:
        inputs *= size
    shape = "x".join(map(str, case.shape))
    note = f"{peak / 2**20:.0f} MiB beyond {inputs / 2**20:.0f} MiB, {shape}"
    return Row(f"{half}: {name}", peak / inputs, "x", gate=GATE if case.gated else None, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="PyTorch alone")
    parser.add_argument("--json", type=Path, default=Path("loss_memory.json"), help="where to write the figures")
    parser.add_argument("--half", choices=HALVES, help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loss:
        print(measure(arguments.half, arguments.loss))
        return
    halves = ["torch"] if arguments.quick else list(HALVES)
    rows = [measured(half, name) for half in halves for name in CASES]
    report("Peak memory of the losses, beyond their inputs", rows, arguments.json, {"gate": GATE})


if __name__ == "__main__":
    main()
