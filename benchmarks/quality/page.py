"""docs/results.md, written from the results of the experiments: ``python -m benchmarks.quality.page``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.experiments import EXPERIMENTS
from benchmarks.quality.methods import LEFT_OUT
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
TABLES = ("losses_images", "losses_signals")
INTRODUCTION = """# Results

<!-- Written by `python -m benchmarks.quality.page` from benchmarks/quality/results: change it there. -->

Trainings with and without a teacher on real data. `make results` makes these runs again, and goes on
where it was stopped. A line of `benchmarks/quality/results/*/runs.jsonl` is one training.

Every number is a mean over seeds on test examples, in percent, with a 95 % interval. Differences are paired by seed:
both students begin with the same weights and see the same batches. Their intervals hold for all methods of a table
together (Bonferroni). *Equal compute* is the student alone, trained for as many more steps as the most expensive method
takes longer.
"""


def write(results: Path) -> None:
    """Write the page.

    Args:
        results: The folder with a folder for each experiment.
    """
    done = {
        name: Comparison.read(results / name) for name in EXPERIMENTS if (results / name / "comparison.json").exists()
    }
    parts = [INTRODUCTION, *_losses(done)]
    for name, comparison in done.items():
        if name not in TABLES:
            parts += [f"## {EXPERIMENTS[name].title}\n", f"{EXPERIMENTS[name].text}\n", *_methods(name, comparison)]
    PAGE.write_text("\n".join([*parts, *_machines(results, done)]).rstrip() + "\n")


def _losses(done: dict[str, Comparison]) -> Iterator[str]:
    """The table of all losses, sorted by the mean of their gains."""
    tasks = [name for name in TABLES if name in done]
    if not tasks:
        return
    yield "## All losses with one recipe\n"
    yield from (f"- **{EXPERIMENTS[name].title.split(': ')[1]}**: {EXPERIMENTS[name].text}\n" for name in tasks)
    yield "The differences to the student alone, in points, sorted by their mean; + and - mark intervals without 0.\n"
    titles = [EXPERIMENTS[name].title.split(": ")[1] for name in tasks]
    yield f"| loss | {' | '.join(titles)} | mean |\n|---|{'---|' * len(tasks)}---|"
    rows = []
    for method in done[tasks[0]].methods:
        gains = [done[task].difference(method) for task in tasks]
        known = [gain for gain in gains if gain is not None]
        mean = statistics.fmean(gain.mean for gain in known) if len(known) == len(tasks) else None
        rows.append(
            (mean, f"| `{method}` | {' | '.join(map(_gain, gains))} | {'' if mean is None else f'{100 * mean:+.1f}'} |")
        )
    yield "\n".join(text for _, text in sorted(rows, key=lambda row: -1e9 if row[0] is None else row[0], reverse=True))
    for name, title in zip(tasks, titles, strict=True):
        yield f"\n{_reference(name, done[name], title)}"
    yield "\nNot in this table: " + "; ".join(f"`{name}` ({why})" for name, why in LEFT_OUT.items()) + ".\n"


def _reference(name: str, comparison: Comparison, title: str) -> str:
    facts = json.loads((comparison.folder / "comparison.json").read_text())
    accuracy = facts["teacher"]["metrics"].get(EXPERIMENTS[name].metric)
    known = "" if accuracy is None else f"teacher {100 * accuracy:.1f}, "
    alone, equal = _value(comparison, ALONE), _value(comparison, EQUAL_COMPUTE)
    sizes = [facts[network]["cost"]["parameters"] for network in ("teacher", "student")]
    return (
        f"{title}: {known}student alone {alone}, at equal compute {equal} ({facts['equal_compute']['ratio']:.1f} times the"
        f" steps). Parameters of the teacher {sizes[0]:,}, of the student {sizes[1]:,}."
    )


def _methods(name: str, comparison: Comparison) -> Iterator[str]:
    """A small experiment: every metric of every method, then the verdict."""
    metrics = sorted({metric for run in comparison.runs for metric in run.metrics if "accuracy" in metric})
    metrics.sort(key=lambda metric: metric != comparison.metric)
    heads = [metric.replace("_", " ") for metric in metrics]
    yield f"| method | {' | '.join(heads)} | against the student alone | steps | seconds |"
    yield f"|---|{'---|' * len(heads)}---|---|---|"
    for method in (ALONE, EQUAL_COMPUTE, *comparison.methods):
        runs = [run for run in comparison.runs if run.method == method and run.error is None]
        if not runs:
            continue
        means = [f"{100 * statistics.fmean(run.metrics[metric] for run in runs):.1f}" for metric in metrics]
        gain = "" if method == ALONE else _gain(comparison.difference(method))
        steps, seconds = (
            statistics.fmean(numbers) for numbers in ([run.steps for run in runs], [run.seconds for run in runs])
        )
        yield f"| {method} | {' | '.join(means)} | {gain} | {steps:.0f} | {seconds:.1f} |"
    yield f"\n{_reference(name, comparison, 'Accuracies')}\n"
    yield "\n".join(f"- {line}" for line in comparison.verdict.splitlines()) + "\n"


def _value(comparison: Comparison, method: str) -> str:
    mean = comparison.mean(method)
    if mean is None:
        return "unknown"
    return f"{100 * mean.mean:.1f}" + ("" if mean.margin is None else f" ± {100 * mean.margin:.1f}")


def _gain(gain: Any) -> str:
    if gain is None:
        return "failed"
    if gain.margin is None:
        return f"{100 * gain.mean:+.1f}"
    return f"{100 * gain.mean:+.1f} ± {100 * gain.margin:.1f}{('', ' **+**', ' **-**')[gain.sign]}"


def _machines(results: Path, done: dict[str, Comparison]) -> Iterator[str]:
    """How each experiment was run."""
    yield "## How it was measured\n"
    yield "| experiment | seeds | processor | versions | commit | command |\n|---|---|---|---|---|---|"
    for name, comparison in done.items():
        facts = json.loads((results / name / "comparison.json").read_text())
        machine = facts["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        processor = f"{machine['processor']}, {machine['cores']} cores"
        cells = [EXPERIMENTS[name].title, len(comparison.seeds), processor, versions, (facts["commit"] or "")[:12]]
        yield f"| {' | '.join(map(str, cells))} | `python -m benchmarks.quality {name}` |"


if __name__ == "__main__":
    write(Path(__file__).parent / "results")
