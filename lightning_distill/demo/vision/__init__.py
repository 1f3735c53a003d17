"""The demonstration on images: a vision transformer's tokens become the maps of a small convolutional network.

The teacher knows all labels, and stands for a foundation model. The student sees the images alone. How much it has
learned shows when a linear classifier of its frozen maps gets a few labels. The student before any training and one
that is trained on these labels, from the same weights and for as many steps, are compared with it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from lightning_distill.demo.vision.images import load_images
from lightning_distill.demo.vision.report import closing, plot, table
from lightning_distill.demo.vision.training import Run, Settings, train_all
from lightning_distill.guidance.runs import quiet

QUICK = Settings(seeds=1, digits=240, copies=1, labels=(2, 5), batch_size=16, teacher_steps=20, steps=20)


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the images to the folder of results.

    Args:
        output: Folder for ``vision.json``, ``vision.png`` and ``vision_student.pt``; created if it does not exist.
        seeds: Number of students for each method; ``None`` means 2, or 1 if ``quick``.
        quick: Whether to train for a few steps only.
        console: Console to print to; ``None`` means the standard output.

    Returns:
        The runs of all methods.

    Raises:
        OSError: If the folder cannot be written to.
    """
    started, console = time.perf_counter(), console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    settings = replace(settings, seeds=seeds or settings.seeds)
    images = load_images(settings.copies, settings.digits)
    with quiet(), torch.random.fork_rng(devices=[]):
        results = train_all(images, settings, console)
        console.print(table(results.runs, len(images.test[1])))
        plot(results, images, output / "vision.png")
    torch.save(results.distilled.state_dict(), output / "vision_student.pt")
    reached = f"The teacher itself, with the labels of all images, reaches {100 * results.reached:.1f} %."
    conclusion, seconds = [reached, *closing(results.runs)], round(time.perf_counter() - started, 1)
    record = {
        "settings": asdict(settings),
        "teacher_accuracy": results.reached,
        "runs": [asdict(result) for result in results.runs],
        "conclusion": conclusion,
        "seconds": seconds,
    }
    (output / "vision.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for line in (*conclusion, f"All files, after {seconds} s, in {output.resolve()}"):
        console.print(line, highlight=False, soft_wrap=True)
    return results.runs
