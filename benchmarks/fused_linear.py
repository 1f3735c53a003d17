"""Memory and time of a divergence from hidden states against dense logits: ``python -m benchmarks.fused_linear``.

Forward and backward pass of ``fused_linear_divergence``, of ``F.linear`` for both heads with ``F.kl_div``, as most
people write it, and of ``F.linear`` with ``soft_target_kl``, on the same tensors: 2048 tokens, a vocabulary of 32768,
float32, one thread. The goals refer to the second.

Memory is the highest resident memory of a process of its own beyond the inputs (see ``loss_memory``). Time is processor
time, in turns. Dense logits of this size are fetched from the system and given back in each step, as in a training; the
steady allocator of the other timings would hide that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import Plan, Row, absolute, compare, interleave, prepare, repeat, report

if __name__ == "__main__" and "--way" not in sys.argv:
    prepare("benchmarks.fused_linear", steady=False)

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_memory import ENVIRONMENT, resident
from lightning_distill.functional import fused_linear_divergence, soft_target_kl
from lightning_distill.functional.rows import DIVERGENCES

TOKENS, VOCABULARY, CHUNK, TEMPERATURE = 2048, 32768, 256, 2.0
WIDTHS = (256, 512)
# At a width of 512 the products, which both ways have, take about 0.6 of the formula's time by themselves.
BOUND_GATE, MEMORY_GATE, TIME_GATE, HALF_GATE = 1.5, 0.10, 0.6, 0.55
QUICK, FULL = Plan(1, 3, 1, 1), Plan(1, 7, 1, 1)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(width: int, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Inputs:
    student, teacher = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    return student, weight, teacher, torch.randn(vocabulary, width) / width**0.5


def clear(tensors: Inputs) -> None:
    for tensor in tensors:
        tensor.grad = None


def fused(tensors: Inputs, divergence: str = "kl", mask: Tensor | None = None) -> None:
    clear(tensors)
    fused_linear_divergence(*tensors, divergence=divergence, temperature=TEMPERATURE, mask=mask).backward()


def logits_of(tensors: Inputs) -> tuple[Tensor, Tensor]:
    student, weight, teacher, teacher_weight = tensors
    return F.linear(student, weight), F.linear(teacher, teacher_weight)


def formula(tensors: Inputs) -> None:
    clear(tensors)
    logs = [F.log_softmax(logits / TEMPERATURE, dim=-1) for logits in logits_of(tensors)]
    (F.kl_div(*logs, reduction="batchmean", log_target=True) * TEMPERATURE**2).backward()


def dense(tensors: Inputs) -> None:
    clear(tensors)
    logits = logits_of(tensors)
    soft_target_kl(*logits, temperature=TEMPERATURE, reduction="mean").backward()


@torch.no_grad()
def products(tensors: Inputs) -> None:
    """The matrix products of the fused loss, and nothing else."""
    student, weight, teacher, teacher_weight = tensors
    gradient, sums = torch.zeros_like(weight), torch.empty_like(student)
    student_logits, teacher_logits = torch.empty(2, CHUNK, len(weight))
    for start in range(0, len(student), CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(student[rows], weight.T, out=student_logits)
        torch.mm(teacher[rows], teacher_weight.T, out=teacher_logits)
        torch.mm(student_logits, weight, out=sums[rows])
        gradient.addmm_(student_logits.T, student[rows])


WAYS: dict[str, Callable[[Inputs], None]] = {"fused": fused, "formula": formula, "dense": dense}


def measure(way: str, width: int) -> int:
    """Bytes beyond the inputs, in a process that does nothing else."""
    torch.set_num_threads(1)
    WAYS[way](inputs(width, 64, 512))  # loads everything once
    tensors = inputs(width)
    before = resident("VmRSS")
    WAYS[way](tensors)
    return resident("VmHWM") - before


def measured(way: str, width: int) -> int:
    arguments = [sys.executable, "-m", "benchmarks.fused_linear", "--way", way, "--width", str(width)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1]))


def memory_rows(width: int) -> list[Row]:
    numbers = 2 * CHUNK * VOCABULARY + VOCABULARY * width + TOKENS * width
    peaks = {way: measured(way, width) for way in WAYS}
    own, note = peaks["fused"], f"{peaks['fused'] / 2**20:.0f} MiB beyond the inputs"
    notes = {way: f"{way} {peak / 2**20:.0f} MiB" for way, peak in peaks.items()}
    return [
        Row(f"memory over 2CV + VH + BTH, H {width}", own / (4 * numbers), "x", gate=BOUND_GATE, note=note),
        Row(f"memory over formula, H {width}", own / peaks["formula"], "x", gate=MEMORY_GATE, note=notes["formula"]),
        Row(f"memory over dense, H {width}", own / peaks["dense"], "x", note=notes["dense"]),
    ]


def time_rows(width: int, plan: Plan) -> list[Row]:
    torch.set_num_threads(1)
    tensors, mask = inputs(width), torch.arange(TOKENS) % 2 == 0
    arms = {way: repeat(lambda index, run=run: run(tensors)) for way, run in WAYS.items()}
    arms["products"] = repeat(lambda index: products(tensors))
    arms["half"] = repeat(lambda index: fused(tensors, mask=mask))
    if width == WIDTHS[0]:
        arms |= {name: repeat(lambda index, name=name: fused(tensors, name)) for name in DIVERGENCES[1:]}
    runs = interleave(arms, plan, f"H {width}")
    rows = [
        compare(f"time over formula, H {width}", runs, "fused", "formula", gate=TIME_GATE, note="KL, T 2"),
        compare(f"products alone over formula, H {width}", runs, "products", "formula"),
        compare(f"time over dense, H {width}", runs, "fused", "dense"),
        compare(f"half of the tokens masked, H {width}", runs, "half", "fused", gate=HALF_GATE, note="over all tokens"),
        absolute(f"KL, H {width}", runs, "fused"),
        absolute(f"formula, H {width}", runs, "formula"),
        absolute(f"dense, H {width}", runs, "dense"),
    ]
    return rows + [absolute(f"{name}, H {width}", runs, name) for name in DIVERGENCES[1:] if name in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=Path("fused_linear.json"), help="where to write the figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(measure(arguments.way, arguments.width))
        return
    rows = [row for width in WIDTHS for row in memory_rows(width)]
    rows += [row for width in WIDTHS for row in time_rows(width, QUICK if arguments.quick else FULL)]
    settings = {"tokens": TOKENS, "vocabulary": VOCABULARY, "chunk": CHUNK, "temperature": TEMPERATURE}
    report("Divergence from hidden states and heads, against dense logits", rows, arguments.json, settings)


if __name__ == "__main__":
    main()
