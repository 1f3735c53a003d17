"""Time of losses against the papers' plain formulas: ``python -m benchmarks.loss_time``.

Forward and backward pass of PyTorch's classes and of ``loss_formulas``, on the same tensors, in turns, in processor
time on one thread. Where the plain formula would not fit into memory both get smaller inputs (``Case.timed``).
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.timing import Arm, Plan, Row, compare, interleave, prepare, repeat, report

if __name__ == "__main__":
    prepare("benchmarks.loss_time")

import torch

from benchmarks import loss_formulas
from benchmarks.loss_cases import CASES
from lightning_distill import losses

QUICK, FULL = Plan(1, 5, 1, 1), Plan(2, 9, 1, 1)
GATE = 1.05
TURN = 0.05  # seconds that a turn takes at least, up to 50 units


def arms(name: str) -> dict[str, Arm]:
    case = CASES[name]
    loss = getattr(losses, case.loss)(**case.settings)
    formula = getattr(loss_formulas, case.formula)
    shape = case.timed or case.shape
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    return {
        "library": repeat(lambda index: loss(student, teacher).backward()),
        "formula": repeat(lambda index: formula(student, teacher).backward()),
    }


def measured(name: str, plan: Plan) -> Row:
    """The row of a loss. A turn of a fast loss has more units, since the first one after a switch takes longer."""
    shape = "x".join(map(str, CASES[name].timed or CASES[name].shape))
    ways = arms(name)
    for _ in range(2):
        start = time.perf_counter()
        ways["formula"](lambda: None, 1)
        seconds = time.perf_counter() - start
    plan = replace(plan, block=max(plan.block, min(50, math.ceil(TURN / seconds))))
    return compare(name, interleave(ways, plan, name), "library", "formula", gate=GATE, note=shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=Path("loss_time.json"), help="where to write the figures")
    arguments = parser.parse_args()
    rows = [measured(name, QUICK if arguments.quick else FULL) for name in CASES]
    report("Our losses over the papers' formulas", rows, arguments.json, {"gate": GATE})


if __name__ == "__main__":
    main()
