"""The demonstration's report: table, closing sentences, and figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from distill_core.demo_report import save_figure
from lightning_distill.demo.vision.images import Images
from lightning_distill.demo.vision.networks import Student, Transformer
from lightning_distill.demo.vision.training import ALONE, DISTILLED, STUDENTS, TEACHER, UNTRAINED, Results, Run

SHOWN = 5
# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for printing in grey
_LOOKS = {
    TEACHER: ("0.35", ":"),
    UNTRAINED: ("#CC79A7", "-."),
    ALONE: ("#D55E00", "-"),
    DISTILLED: ("#0072B2", "--"),
}


def grouped(runs: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """The runs by method and number of labels, in order of their seeds."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.labels), []).append(run)
    return groups


def table(runs: Sequence[Run], count: int) -> Table:
    """The table of all methods, one row for each.

    Args:
        runs: The runs.
        count: Number of test images.

    Returns:
        A table of rich: accuracies, means over the seeds, with the standard deviation if there are several seeds.
    """
    groups, seeds = grouped(runs), 1 + max(run.seed for run in runs)
    labels = list(dict.fromkeys(run.labels for run in runs))
    printed = Table(
        title=f"Digits in front of photos, {count} test images; {seeds} seed{'s' * (seeds > 1)}",
        caption="Accuracy in %, by the number of labels of each class. Probed: a linear\n"
        "classifier of frozen features learns from these labels. The student\n"
        "trained alone learns all its weights from them, the distilled one saw\n"
        "no label before, and the teacher saw those of all images.",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    printed.add_column("method", no_wrap=True)
    for name in ("parameters", "steps", *(f"{number}\nlabels" for number in labels)):
        printed.add_column(name, justify="right", no_wrap=True)
    for method in (TEACHER, *STUDENTS):
        first = groups[method, labels[0]][0]
        spreads = [_spread([run.test for run in groups[method, number]]) for number in labels]
        printed.add_row(method, f"{first.parameters:,}", f"{first.steps:,}", *spreads, end_section=method == TEACHER)
    return printed


def closing(runs: Sequence[Run]) -> list[str]:
    """A sentence for each number of labels that compares the distilled student with the two others.

    A student is better if it has more right answers for every seed, and worse if it has fewer for every seed.

    Args:
        runs: The runs.

    Returns:
        The sentences; one more if only a single seed was trained.
    """
    groups = grouped(runs)
    sentences = []
    for labels in dict.fromkeys(run.labels for run in runs):
        distilled = groups[DISTILLED, labels]
        claims = [
            f"{_verdict(distilled, groups[base, labels])} than the student {name}"
            for base, name in ((ALONE, "trained on these labels for as many steps"), (UNTRAINED, "before any training"))
        ]
        sentences.append(f"With {labels} labels of each class the distilled student is {' and '.join(claims)}.")
    if max(run.seed for run in runs) == 0:
        sentences.append("A single seed proves little: take several.")
    return sentences


def _verdict(distilled: Sequence[Run], base: Sequence[Run]) -> str:
    gains = [100 * (run.test - other.test) for run, other in zip(distilled, base, strict=True)]
    word = "better" if min(gains) > 0 else "worse" if max(gains) < 0 else "not clearly better or worse"
    return f"{word} ({statistics.mean(gains):+.1f} points)"


def plot(results: Results, images: Images, path: Path) -> None:
    """Plot the accuracies by number of labels, and some images with the features of teacher and student as colours.

    Args:
        results: The results of all trainings.
        images: The images.
        path: PNG file to write.
    """
    save_figure(lambda figure: _draw(figure, results, images), path)


def _draw(figure: Any, results: Results, images: Images) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    panel, groups = left.subplots(), grouped(results.runs)
    labels = list(dict.fromkeys(run.labels for run in results.runs))
    for method, (color, line) in _LOOKS.items():
        means = [100 * statistics.mean(run.test for run in groups[method, number]) for number in labels]
        panel.plot(labels, means, color=color, linestyle=line, linewidth=2.5, marker="o", label=method)
    panel.set_xscale("log")
    panel.set_xticks(labels, [str(number) for number in labels])
    panel.minorticks_off()
    panel.set_xlabel("labels of each class", fontsize=12)
    panel.set_ylabel("accuracy (%)", fontsize=12)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    left.legend(loc="outside upper center", fontsize=10)
    shown = images.test[0][:SHOWN]
    rows = {"image": shown.permute(0, 2, 3, 1), **colors(results, images.test[0])}
    grid = right.subplots(len(rows), SHOWN)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=10)
        for panel, picture in zip(line, pictures[:SHOWN], strict=True):
            panel.imshow(picture.numpy())
            panel.set_xticks([])
            panel.set_yticks([])
    right.suptitle("The principal components of the tokens as colours, and those that the maps give", fontsize=11)


@torch.no_grad()
def colors(results: Results, images: Tensor) -> dict[str, Tensor]:
    """The features of each patch as colours ``(N, 6, 6, 3)`` from 0 to 1.

    The teacher's colours are the first three principal components of its tokens. A student's are the linear function
    of its maps that is closest to them.
    """
    goal = _patches(results.teacher, images)
    centered = goal - goal.mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:3].T
    low, high = components.amin(0), components.amax(0)
    pictures = {"teacher": components}
    for name, net in {"distilled": results.distilled, "untrained": results.untrained}.items():
        maps = _patches(net, images)
        maps = torch.cat([maps, torch.ones(len(maps), 1)], 1)
        pictures[name] = maps @ torch.linalg.lstsq(maps, components).solution
    return {
        name: ((picture - low) / (high - low)).clamp(0, 1).view(len(images), 6, 6, 3)
        for name, picture in pictures.items()
    }


def _patches(net: Transformer | Student, images: Tensor) -> Tensor:
    """The features ``(N * 36, C)`` of all patches."""
    return net.eval().features(images).flatten(2).mT.flatten(0, 1)


def _spread(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean
