"""The demonstrations' report: table, plot, proof and closing sentences; rich and matplotlib are imported late."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCARCE, FULL = "10 %", "100 %"
METHODS = ("alone", "+ logits", "+ logits + features")
# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for printing in grey
_LOOKS = dict(zip(METHODS, (("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-.")), strict=True))
_NAMES = dict(zip(METHODS, ("student alone", "with the teacher's logits", "with its logits and features"), strict=True))


@dataclass
class Run:
    """Results of one training run: shares of images, and milliseconds."""

    labels: str
    method: str
    seed: int
    parameters: int
    validation_accuracy: list[float] = field(default_factory=list)
    test_accuracy: float = 0.0
    teacher_agreement: float = 0.0
    step_ms: float = 0.0


def table(runs: Sequence[Run]) -> Any:
    """The table of all methods, one row for each.

    Args:
        runs: The teacher's run, then the students'.

    Returns:
        A table of rich: means over the seeds, with the standard deviation if there are several seeds.
    """
    from rich import box
    from rich.table import Table

    seeds = 1 + max(run.seed for run in runs)
    printed = Table(
        title=f"Handwritten digits, 500 test images; mean ± standard deviation of {seeds} seed{'s' * (seeds > 1)}",
        caption="Agreement: same class as the teacher. Step: median time of a training step,\n"
        "and its ratio to the student alone. One teacher for all.",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    printed.add_column("labels", justify="right", no_wrap=True)
    printed.add_column("method", no_wrap=True)
    for name in ("parameters", "accuracy\n%", "agreement\n%", "step\nms", "ratio"):
        printed.add_column(name, justify="right", no_wrap=True)
    teacher, groups = runs[0], grouped(runs)
    for labels, method in [(FULL, "teacher"), *groups]:
        several = groups.get((labels, method), [teacher])
        milliseconds = statistics.median(run.step_ms for run in several)
        alone = statistics.median(run.step_ms for run in groups[labels, "alone"])
        printed.add_row(
            labels,
            method,
            f"{several[0].parameters:,}",
            _spread([run.test_accuracy for run in several]),
            _spread([run.teacher_agreement for run in several]) if method != "teacher" else "",
            f"{milliseconds:.2f}",
            f"{milliseconds / alone:.2f}",
            end_section=method in ("teacher", METHODS[-1]),
        )
    return printed


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The students' runs by labels and method, in order of their seeds."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs[1:]:
        groups.setdefault((run.labels, run.method), []).append(run)
    return groups


def closing(runs: Sequence[Run]) -> list[str]:
    """A sentence for each setting that says whether distillation helped or did harm.

    A method helped if its student is better than the student alone for every seed. It did harm if its student is worse
    for every seed. Otherwise it made no clear difference.

    Args:
        runs: The teacher's run, then the students'.

    Returns:
        The sentences; one more if only a single seed was trained.
    """
    groups = grouped(runs)
    sentences = []
    for labels in dict.fromkeys(labels for labels, _ in groups):
        alone = groups[labels, "alone"]
        claims = [_claim(groups[labels, method], alone) for method in METHODS if method != "alone"]
        sentences.append(f"With {labels} of the labels {'; '.join(claims)}.")
    if max(run.seed for run in runs) == 0:
        sentences.append("A single seed proves little: take several.")
    return sentences


def _claim(distilled: Sequence[Run], alone: Sequence[Run]) -> str:
    gains = [100 * (run.test_accuracy - base.test_accuracy) for run, base in zip(distilled, alone, strict=True)]
    verdict = "helped" if min(gains) > 0 else "did harm" if max(gains) < 0 else "made no clear difference"
    better, distilled_parts = sum(gain > 0 for gain in gains), distilled[0].method[2:].replace(" + ", " and ")
    return (
        f"distilling {distilled_parts} {verdict}: {statistics.mean(gains):+.1f} points of accuracy"
        f" (better for {better} of {len(gains)} seed{'s' * (len(gains) > 1)})"
    )


def best_run(runs: Sequence[Run]) -> Run:
    """The run to save: with few labels, by the method that is best on the validation images.

    Args:
        runs: The teacher's run, then the students'.

    Returns:
        The run of the first seed; the test images do not choose it.
    """
    groups = grouped(runs)
    first = next(iter(groups))[0]
    return max(
        (group for (labels, _), group in groups.items() if labels == first),
        key=lambda group: statistics.mean(run.validation_accuracy[-1] for run in group),
    )[0]


def proof(path: Path, best: Run, loaded: str, accuracy: float) -> dict[str, Any]:
    """The saved student's run, and the proof that its file does not need this library.

    Args:
        path: The student's file.
        best: The student's run.
        loaded: How the file was loaded.
        accuracy: Share of right answers of the loaded student on the test images.

    Returns:
        The saved run, its accuracy, and the proof in words.
    """
    words = (
        f"{path.name} is the student of seed {best.seed}, {best.labels} of the labels, {best.method}: the method of"
        f" best validation accuracy there. Loaded {loaded} it reaches {100 * accuracy:.1f} % on"
        f" the test images, and {100 * best.test_accuracy:.1f} % when it was trained."
    )
    chosen = {"labels": best.labels, "method": best.method, "seed": best.seed}
    return {**chosen, "test_accuracy": accuracy, "proof": words}


def publish(
    runs: Sequence[Run],
    settings: dict[str, Any],
    saved: dict[str, Any],
    output: Path,
    console: Any,
    started: float,
    **facts: Any,
) -> None:
    """Write ``curves.png`` and ``results.json``, and print the closing sentences.

    Args:
        runs: The teacher's run, then the students'.
        settings: Settings of the demonstration.
        saved: The saved student, from :func:`proof`.
        output: Folder to write to.
        console: Console of rich.
        started: The value of ``time.perf_counter`` at the start.
        **facts: Further entries of ``results.json``.
    """
    plot(runs, output / "curves.png")
    conclusion, seconds = closing(runs), round(time.perf_counter() - started, 1)
    results = {
        **facts,
        "settings": settings,
        "runs": [asdict(run) for run in runs],
        "saved_student": saved,
        "conclusion": conclusion,
        "seconds": seconds,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for line in (*conclusion, saved["proof"], f"All files, after {seconds} s, in {output.resolve()}"):
        console.print(line, highlight=False, soft_wrap=True)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plot the validation accuracy by epoch: mean over the seeds, band of one standard deviation.

    Args:
        runs: The teacher's run, then the students'.
        path: PNG file to write.
    """
    save_figure(lambda figure: _draw(figure, runs), path)


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


def _draw(figure: Any, runs: Sequence[Run]) -> None:
    groups, teacher = grouped(runs), runs[0]
    settings, seeds = list(dict.fromkeys(labels for labels, _ in groups)), 1 + max(run.seed for run in runs)
    panels = figure.subplots(1, len(settings), sharey=True)
    reached = 100 * teacher.validation_accuracy[-1]
    for panel, labels in zip(panels, settings, strict=True):
        name = f"teacher, {teacher.parameters:,} parameters: {reached:.1f} %"
        panel.axhline(reached, color="0.35", linestyle=":", linewidth=2, label=name)
        for method, (color, line) in _LOOKS.items():
            curves = 100 * np.array([run.validation_accuracy for run in groups[labels, method]])
            epochs, mean = range(1, curves.shape[1] + 1), curves.mean(0)
            deviation = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
            name = f"{_NAMES[method]}: {mean[-1]:.1f} %"
            panel.plot(epochs, mean, line, color=color, linewidth=2.5, label=name)
            panel.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
        panel.set_title(f"Labels for {labels} of the training images", fontsize=13)
        panel.set_xlabel("epoch", fontsize=12)
        panel.set_xlim(1, max(2, len(epochs)))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", title="After the last epoch", alignment="left", fontsize=11, title_fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    lowest = 100 * min(run.validation_accuracy[-1] for run in runs)  # the first epochs may lie below the panel
    panels[0].set_ylim(max(0, lowest - 25), 101)
    panels[0].set_ylabel("validation accuracy (%)", fontsize=12)
    size = groups[settings[0], METHODS[0]][0].parameters
    means = f"mean of {seeds} seeds, band: ± standard deviation" if seeds > 1 else "one seed"
    title = f"Handwritten digits: a student of {size:,} parameters, alone and with a teacher"
    figure.suptitle(f"{title}\n({means})", fontsize=13)


def _spread(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean
