"""Time and memory of `pair_layers`: a ResNet-50 and a ResNet-18, four batches of 32 images of 96 x 96 pixels.

`python -m benchmarks.pair_layers` compares it with the same forward passes alone, each in a process of its own, on two
threads. The aim is less than 20 seconds on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Row, report
from lightning_distill import pair_layers

BATCHES, EXAMPLES, PIXELS = 4, 32, 96
PARTS, THREADS = ("forward", "pairs"), 2
GATE = 20  # seconds of each core


def convolution(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch normalisation."""
    return nn.Sequential(nn.Conv2d(inside, outside, size, stride, size // 2, bias=False), nn.BatchNorm2d(outside))


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions, or with an expansion of three as in a ResNet-50."""

    def __init__(self, inside: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outside = width * expansion
        sizes = [(inside, width, 3, stride), (width, outside, 3, 1)]
        if expansion > 1:
            sizes = [(inside, width, 1, 1), (width, width, 3, stride), (width, outside, 1, 1)]
        layers: list[nn.Module] = [layer for size in sizes for layer in (convolution(*size), nn.ReLU(inplace=True))]
        self.branch = nn.Sequential(*layers[:-1])
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else convolution(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """``stem``, ``layer1`` to ``layer4``, ``head``."""

    def __init__(self, depths: list[int], expansion: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        inside = 64
        for number, depth in enumerate(depths):
            width, blocks = 64 * 2**number, []
            for place in range(depth):
                stride = 2 if number and not place else 1
                blocks.append(Block(inside, width, stride, expansion))
                inside = width * expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.head = nn.Linear(inside, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.head(x.mean((2, 3)))


def measure(part: str, batches: int, examples: int, pixels: int) -> dict[str, Any]:
    """Seconds, seconds of all cores, and MiB above the networks and the data, of one part in this process."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    student, teacher = ResNet([2, 2, 2, 2], 1), ResNet([3, 4, 6, 3], 4)
    images = [torch.randn(examples, 3, pixels, pixels) for _ in range(batches)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    if part == "pairs":
        print(pair_layers(student, teacher, images), file=sys.stderr)
    else:
        with torch.no_grad():
            for batch in images:
                student.eval()(batch), teacher.eval()(batch)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "of all cores": busy, "MiB": memory}


def rows(parts: dict[str, dict[str, Any]]) -> list[Row]:
    """The answers from the figures of both parts."""
    forward, pairs = parts["forward"], parts["pairs"]
    ratio = pairs["of all cores"] / forward["of all cores"]
    beyond = pairs["MiB"] - forward["MiB"]
    note = "about the duration on idle cores"
    return [
        Row("pair_layers / the forward passes alone, processor time", ratio, "x"),
        Row("pair_layers: processor time of each core", pairs["of all cores"] / THREADS, "s", note=note),
        Row("pair_layers: duration", pairs["seconds"], "s", wall=pairs["seconds"], gate=GATE),
        Row("the forward passes alone: duration", forward["seconds"], "s", wall=forward["seconds"]),
        Row("pair_layers: memory beyond the forward passes alone", beyond, "MiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller images")
    parser.add_argument("--json", type=Path, default=Path("pair_layers.json"), help="where to write the figures")
    arguments = parser.parse_args()
    data = (2, 4, 32) if arguments.quick else (BATCHES, EXAMPLES, PIXELS)
    if arguments.part is not None:
        print(json.dumps(measure(arguments.part, *data)))
        return
    torch.set_num_threads(THREADS)
    parts = {}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.pair_layers", "--part", part]
        command += ["--quick"] if arguments.quick else []
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        parts[part] = json.loads(result.stdout)
    settings = {"batches": data[0], "examples": data[1], "pixels": data[2]}
    report("pair_layers, a ResNet-50 and a ResNet-18", rows(parts), arguments.json, settings)


if __name__ == "__main__":
    main()
