"""Steps with the teacher's outputs read from disk, on one device: ``python -m benchmarks --device cuda``.

A ResNet-18 on images of one byte a number, and a GPT on tokens, with a DataLoader of several workers: alone, with the
teacher live, and from a cache of that teacher. With ``--device cpu`` everything is tiny: it shows that it runs.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.device_steps import ACCELERATORS, GPT, SIZES, LanguageModel, image_workload
from benchmarks.device_timing import wait_for
from benchmarks.record import write_record
from benchmarks.step_overhead import quiet_lightning
from benchmarks.timing import Arm, Plan, Row, Tick, absolute, compare, interleave, show_rows
from benchmarks.workloads import Clock, trainer_for
from lightning_distill import DistillCallback, LogitsDistillation, SequenceDistillation, TeacherCache

WORKERS = {"cuda": 6, "cpu": 0}
# A turn is longer than what the workers read ahead, or their work would not count.
PLANS = {"cuda": Plan(block=40, rounds=5, starts=1, warmup=10), "cpu": Plan(1, 2, 1, 1)}
BATCHES = 4  # different ones, taken again and again


class Bytes(nn.Module):
    """A network on images of one byte a number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.float() / 255)
        return logits


class Images(Dataset[tuple[Tensor, int]]):
    """Random images of one byte a number, and labels."""

    def __init__(self, number: int, edge: int) -> None:
        self.images = torch.randint(256, (number, 3, edge, edge), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 100


class Texts(Dataset[dict[str, Tensor]]):
    """Random sequences of tokens."""

    def __init__(self, number: int, length: int, vocabulary: int) -> None:
        self.tokens = torch.randint(vocabulary, (number, length))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Classifier(LightningModule):
    """The student on images alone."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.network = make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def cached_rows(
    name: str,
    device: str,
    data: Dataset[Any],
    batch_size: int,
    module: Callable[[], LightningModule],
    teacher: nn.Module,
    terms: Callable[[], Any],
    cache: dict[str, Any],
    **settings: Any,
) -> Iterator[Row]:
    """Steps of the student alone, with a teacher live, and from its cache.

    Args:
        name: First words of the rows.
        device: ``"cuda"`` or ``"cpu"``.
        data: The examples.
        batch_size: Examples in a batch.
        module: Makes the student's module.
        teacher: The teacher, on the device.
        terms: Makes the terms of the distillation.
        cache: Settings of the cache.
        settings: Those of the Trainer.
    """
    with tempfile.TemporaryDirectory() as folder:
        stored = TeacherCache.build(
            teacher, data, Path(folder, "cache"), batch_size=batch_size, progress=False, **cache
        )

        def arm(source: Any) -> Arm:
            return partial(_fit, data, batch_size, device, module, source, terms, settings)

        arms = {"plain": arm(None), "live": arm(teacher), "cached": arm(stored)}
        runs = interleave(arms, PLANS[device], name, partial(wait_for, device))
    yield from (absolute(f"{name}: {way}", runs, way) for way in arms)
    yield compare(f"{name}: live / plain", runs, "live", "plain")
    yield compare(f"{name}: cached / plain", runs, "cached", "plain", gate=1.03)


def _fit(
    data: Dataset[Any],
    batch_size: int,
    device: str,
    module: Callable[[], LightningModule],
    source: Any,
    terms: Callable[[], Any],
    settings: dict[str, Any],
    tick: Tick,
    units: int,
) -> None:
    callbacks: list[Any] = [Clock(tick)] if source is None else [Clock(tick), DistillCallback(source, terms())]
    loader = DataLoader(
        data,
        batch_size,
        sampler=RandomSampler(data, replacement=True, num_samples=(units + 1) * batch_size),  # type: ignore[arg-type]
        num_workers=WORKERS[device],
        pin_memory=device == "cuda",
    )
    torch.manual_seed(2)
    trainer_for(callbacks, **settings).fit(module(), loader)


def image_rows(device: str) -> Iterator[Row]:
    """A ResNet-18 from a ResNet-50 in mixed precision."""
    work, (number, edge) = image_workload(device), SIZES[device].images
    yield from cached_rows(
        "images",
        device,
        Images(BATCHES * number, edge),
        number,
        lambda: Classifier(lambda: Bytes(copy.deepcopy(work.student))),
        Bytes(work.teacher),
        lambda: LogitsDistillation(),
        {},
        accelerator=ACCELERATORS[device],
        precision="bf16-mixed",
    )


def text_rows(device: str) -> Iterator[Row]:
    """A GPT from a larger one in bfloat16, whose 50 likeliest tokens are kept."""
    size = SIZES[device]
    student, teacher = (
        GPT(size.vocabulary, size.sequences[1], *shape).to(device, torch.bfloat16)
        for shape in (size.student, size.teacher)
    )
    yield from cached_rows(
        "text",
        device,
        Texts(BATCHES * size.sequences[0], size.sequences[1], size.vocabulary),
        size.sequences[0],
        lambda: LanguageModel(student),
        teacher.eval(),
        lambda: SequenceDistillation(),
        {"top_k": 50, "dtype": "uint8"},
        accelerator=ACCELERATORS[device],
        precision="bf16-true",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("device_cache.json"), help="where to write the figures")
    arguments = parser.parse_args()
    quiet_lightning()
    torch.manual_seed(0)
    device = arguments.device
    rows = [*image_rows(device), *text_rows(device)]
    show_rows("Steps from a cache", rows)
    settings = {"device": device, "workers": WORKERS[device], **asdict(SIZES[device]), **asdict(PLANS[device])}
    write_record(arguments.json, "Steps with the teacher's outputs from a cache, on one device", rows, settings, device)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    main()
