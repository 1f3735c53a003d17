"""Detection and segmentation on drawn scenes: a teacher, a student alone, and distilled students, over three seeds.

`python -m benchmarks.dense --json benchmarks/records/dense.json` takes about ten minutes on one core. It prints what
torchmetrics measures on scenes that no network was trained with: the mean average precision over the overlaps of 0.5 to
0.95 (mAP) and at 0.5, and the mean overlap of pixels (mIoU). It writes them to a file, from which
`python -m benchmarks.quality.page` makes a table; `--quick` shows that it runs. `MeanAveragePrecision` needs
pycocotools, which `make install` leaves out: pip install pycocotools.
"""

# ruff: noqa: E402 - torchmetrics looks for torchvision once, when it is imported
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "tests")]
import plain_operators

if not plain_operators.has_torchvision():
    raise SystemExit("MeanAveragePrecision of torchmetrics needs torchvision, which `make install` brings.")
sys.path.append(str(Path(sys.prefix) / "vision"))
import drawn_scenes as scenes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

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


@torch.no_grad()
def precision(model: nn.Module, batches: Any) -> dict[str, float]:
    """The mean average precision of detections, as COCO defines it."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False
    for batch in batches:
        objects = zip(batch["boxes"], batch["kinds"], strict=True)
        metric.update(
            scenes.detected(model(batch["images"])), [{"boxes": boxes, "labels": kinds} for boxes, kinds in objects]
        )
    values = metric.compute()
    return {"mAP": values["map"].item(), "mAP at an overlap of 0.5": values["map_50"].item()}


@torch.no_grad()
def overlap(model: nn.Module, batches: Any) -> dict[str, float]:
    """The mean overlap of the classes over all pixels that are not void."""
    metric = MulticlassJaccardIndex(scenes.KINDS + 1, ignore_index=scenes.VOID)
    for batch in batches:
        size = batch["labels"].shape[-2:]
        scores = F.interpolate(model(batch["images"]), size, mode="bilinear", align_corners=False)
        metric.update(scores, batch["labels"])
    return {"mIoU": metric.compute().item()}


def measure(task: str, quick: bool) -> dict[tuple[str, str], list[float]]:
    """The measures of teacher, student alone and each method, for each seed, by measure and method."""
    network, loss, score, methods = {
        "detection": (scenes.Detector, scenes.detection_loss, precision, detection_terms),
        "segmentation": (scenes.Segmenter, scenes.segmentation_loss, overlap, segmentation_terms),
    }[task]
    many, few, epochs, seeds = (48, 32, 1, 1) if quick else (600, 200, 12, 3)
    test = scenes.loader(scenes.draw(16 if quick else 100, seed=1), shuffle=False)
    data = scenes.draw(many, seed=0)
    torch.manual_seed(0)
    teacher = train(network(32), data, loss, epochs)
    results = {(metric, "teacher"): [value] for metric, value in score(teacher, test).items()}
    for seed in range(seeds):
        for name, terms in {"student alone": None, **methods()}.items():
            torch.manual_seed(seed)
            student = train(network(12), data[:few], loss, epochs, teacher, terms)
            for metric, value in score(student, test).items():
                results.setdefault((metric, name), []).append(value)
    return dict(sorted(results.items(), key=lambda item: item[0][0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch on a few scenes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    if importlib.util.find_spec("pycocotools") is None:
        parser.error("MeanAveragePrecision of torchmetrics needs pycocotools: pip install pycocotools")
    torch.set_num_threads(1)
    rows = []
    for task in ("detection", "segmentation"):
        start, shown = time.perf_counter(), ""
        for (metric, method), values in measure(task, options.quick).items():
            if metric != shown:
                print(f"{task}: {metric}, in percent")
                shown = metric
            rows.append(Scores(task, metric, method, values))
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            each = ", ".join(f"{100 * value:.1f}" for value in values)
            print(f"  {method:34} {100 * statistics.mean(values):5.1f}{spread}  ({each})", flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if options.json is not None:
        write_record(options.json, "detection and segmentation on drawn scenes", rows, {"quick": options.quick})


if __name__ == "__main__":
    main()
