"""Detection and segmentation on drawn scenes: a teacher, a student alone, and distilled students, over three seeds.

`python -m benchmarks.dense --json benchmarks/records/dense.json` takes about ten minutes on one core. It prints the
average precision at an overlap of 0.5 and the mean overlap of pixels (mIoU), on scenes that no network was trained
with, and writes them to a file, from which `python -m benchmarks.quality.page` makes a table; `--quick` shows that it
runs. Average precision over several overlaps, as torchmetrics computes it, would need pycocotools.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import write_record
from lightning_distill import (
    ChannelWiseLoss,
    CrossHeadDistillation,
    Distiller,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    SoftTargetLoss,
    Tap,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import drawn_scenes as scenes


@dataclass(frozen=True)
class Scores:
    """The results of a method.

    Args:
        task: ``"detection"`` or ``"segmentation"``.
        metric: The measure.
        method: The terms, ``"teacher"`` or ``"student alone"``.
        values: The measure for each seed, between 0 and 1.
    """

    task: str
    metric: str
    method: str
    values: list[float]


PYRAMID, INTO_HEAD = Tap("neck", output="*"), Tap("head", output="*", where="input")


def detection_terms() -> dict[str, list[Any]]:
    """The methods for detection, by name."""
    cross = [
        CrossHeadDistillation(INTO_HEAD, Tap("head", output="scores"), weight=300.0, name="scores"),
        CrossHeadDistillation(INTO_HEAD, Tap("head", output="edges"), "l1", weight=0.3, name="edges"),
    ]
    return {
        "FocalGlobalLoss on the pyramid": [
            FeatureDistillation(PYRAMID, PYRAMID, FocalGlobalLoss(), weight=10.0, boxes="boxes")
        ],
        "CrossHeadDistillation": cross,
    }


def segmentation_terms() -> dict[str, list[Any]]:
    """The methods for segmentation, by name."""
    soft = LogitsDistillation(SoftTargetLoss(1.0), ignore_index=scenes.VOID)
    return {
        "soft targets": [soft],
        "soft targets and ChannelWiseLoss": [
            LogitsDistillation(SoftTargetLoss(1.0), ignore_index=scenes.VOID),
            LogitsDistillation(ChannelWiseLoss(), ignore_index=scenes.VOID, weight=0.3, name="channels"),
        ],
    }


def train(
    model: nn.Module, data: list[Any], loss: Callable[..., Tensor], epochs: int, teacher: Any = None, terms: Any = None
) -> nn.Module:
    """The model after a training on these scenes, alone or with a teacher."""
    batches = scenes.loader(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    distiller = None if terms is None else Distiller(model, teacher, terms)
    if distiller is not None:
        distiller.follow(optimizer)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            if distiller is None:
                total = loss(model(batch["images"]), batch)
            else:
                with distiller.record():
                    output = model(batch["images"])
                total = distiller.total(loss(output, batch), batch)
            total.backward()
            optimizer.step()
            schedule.step()
    if distiller is not None:
        distiller.close()
    return model.eval()


def measure(task: str, quick: bool) -> dict[str, list[float]]:
    """The measure of teacher, student alone and each method, for each seed."""
    network, loss, score, methods = {
        "detection": (scenes.Detector, scenes.detection_loss, scenes.average_precision, detection_terms),
        "segmentation": (scenes.Segmenter, scenes.segmentation_loss, scenes.mean_iou, segmentation_terms),
    }[task]
    many, few, epochs, seeds = (48, 32, 1, 1) if quick else (600, 200, 12, 3)
    test = scenes.loader(scenes.draw(16 if quick else 100, seed=1), shuffle=False)
    data = scenes.draw(many, seed=0)
    torch.manual_seed(0)
    teacher = train(network(32), data, loss, epochs)
    results = {"teacher": [score(teacher, test)]}
    for seed in range(seeds):
        for name, terms in {"student alone": None, **methods()}.items():
            torch.manual_seed(seed)
            student = train(network(12), data[:few], loss, epochs, teacher, terms)
            results.setdefault(name, []).append(score(student, test))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch on a few scenes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task, metric in (("detection", "average precision"), ("segmentation", "mIoU")):
        start = time.perf_counter()
        print(f"{task}: {metric}, in percent")
        for method, values in measure(task, options.quick).items():
            rows.append(Scores(task, metric, method, values))
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            each = ", ".join(f"{100 * value:.1f}" for value in values)
            print(f"  {method:34} {100 * statistics.mean(values):5.1f}{spread}  ({each})", flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if options.json is not None:
        write_record(options.json, "detection and segmentation on drawn scenes", rows, {"quick": options.quick})


if __name__ == "__main__":
    main()
