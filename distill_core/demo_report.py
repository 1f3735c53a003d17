"""The demonstrations' report: tables, verdicts, a plot and a proof; matplotlib is imported late."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE
from distill_core.guidance.run_records import RunRecord

SCARCE, FULL = "10 %", "100 %"
FOLDERS = {SCARCE: "labels-10", FULL: "labels-100"}
METHODS = ("soft targets", "soft targets and features")
METRIC, VALIDATION = "test_accuracy", "val_accuracy"
# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for printing in grey
_LOOKS = dict(zip((ALONE, *METHODS), (("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-.")), strict=True))


def best_run(comparison: Comparison) -> RunRecord:
    """The run to save: the first seed of the method that is best on the validation images.

    Args:
        comparison: The comparison.

    Returns:
        The run; the test images do not choose it.
    """
    by_method: dict[str, list[RunRecord]] = {}
    for run in comparison.runs:
        if run.method in _LOOKS and run.error is None:
            by_method.setdefault(run.method, []).append(run)
    return max(by_method.values(), key=lambda runs: np.mean([run.metrics[VALIDATION] for run in runs]))[0]


def proof(path: Path, best: RunRecord, loaded: str, accuracy: float) -> str:
    """The proof in words that the saved student's file does not need this library.

    Args:
        path: The student's file.
        best: The student's run.
        loaded: How the file was loaded.
        accuracy: Share of right answers of the loaded student on the test images.
    """
    return (
        f"{path.name} is the student of seed {best.seed}, {SCARCE} of the labels, {best.method}: the method of best"
        f" validation accuracy there. Loaded {loaded} it reaches {100 * accuracy:.1f} % on the test images, and"
        f" {100 * (best.metrics[METRIC] or 0.0):.1f} % when it was trained."
    )


def publish(
    comparisons: Mapping[str, Comparison], sizes: tuple[int, int], proved: str, output: Path, console: Any, begun: float
) -> None:
    """Write ``curves.png``, and print the tables and verdicts.

    Args:
        comparisons: The comparisons by the share of labels.
        sizes: Numbers of parameters of the student and the teacher.
        proved: The proof in words.
        output: Folder to write to.
        console: Console of rich.
        begun: The value of ``time.perf_counter`` at the start.
    """
    plot(comparisons, sizes, output / "curves.png")
    lines = [f"Handwritten digits: a student of {sizes[0]:,} parameters, a teacher of {sizes[1]:,}."]
    for labels, comparison in comparisons.items():
        lines += ["", f"Labels on {labels} of the training images", str(comparison)]
    seconds = round(time.perf_counter() - begun, 1)
    lines += ["", proved, f"All files, after {seconds} s, in {output.resolve()}"]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def plot(comparisons: Mapping[str, Comparison], sizes: tuple[int, int], path: Path) -> None:
    """Plot the validation accuracy by epoch: mean over the seeds, band of one standard deviation.

    Args:
        comparisons: The comparisons by the share of labels.
        sizes: Numbers of parameters of the student and the teacher.
        path: PNG file to write.
    """
    save_figure(lambda figure: _draw(figure, comparisons, sizes), path)


def save_figure(draw: Callable[[Any], None], path: Path) -> None:
    """Save a figure that looks the same on every machine.

    Args:
        draw: Draws on a figure of matplotlib.
        path: PNG file to write.
    """
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with style.context("default"):  # on white, whatever the user's settings are
        figure = Figure(figsize=(11, 5), layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=110)


def _draw(figure: Any, comparisons: Mapping[str, Comparison], sizes: tuple[int, int]) -> None:
    panels = figure.subplots(1, len(comparisons), sharey=True)
    seeds = len(next(iter(comparisons.values())).seeds)
    lowest = 100.0
    for panel, (labels, comparison) in zip(panels, comparisons.items(), strict=True):
        for method, (color, line) in _LOOKS.items():
            runs = [run for run in comparison.runs if run.method == method and run.error is None]
            curves = 100 * np.array([[point[VALIDATION] for point in run.curve] for run in runs], float)
            epochs, mean = range(1, curves.shape[1] + 1), curves.mean(0)
            deviation = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
            panel.plot(epochs, mean, line, color=color, linewidth=2.5, label=f"{method}: {mean[-1]:.1f} %")
            panel.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
            lowest = min(lowest, curves[:, -1].min())  # the first epochs may lie below the panel
        panel.set_title(f"Labels for {labels} of the training images", fontsize=13)
        panel.set_xlabel("epoch", fontsize=12)
        panel.set_xlim(1, max(2, len(epochs)))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", title="After the last epoch", alignment="left", fontsize=11, title_fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(max(0, lowest - 25), 101)
    panels[0].set_ylabel("validation accuracy (%)", fontsize=12)
    means = f"mean of {seeds} seeds, band: ± standard deviation" if seeds > 1 else "one seed"
    title = f"Handwritten digits: a student of {sizes[0]:,} parameters, a teacher of {sizes[1]:,}"
    figure.suptitle(f"{title}\n({means})", fontsize=13)
