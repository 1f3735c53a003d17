"""The demonstration's report: table, closing sentences, figure and continuations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from distill_core.demo_report import save_figure
from lightning_distill.demo.language.networks import GPT, continued
from lightning_distill.demo.language.text import Text
from lightning_distill.demo.language.training import (
    ALONE,
    LONGER,
    OFFLINE,
    ONLINE,
    OWN_TEXT,
    STUDENTS,
    TEACHER,
    Run,
)

PROMPTS = ("    def __init__(self", "import ")
# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for printing in grey
_LOOKS = {
    TEACHER: ("0.35", ":"),
    ALONE: ("#D55E00", "-"),
    LONGER: ("#CC79A7", (0, (5, 1))),
    ONLINE: ("#0072B2", "--"),
    OFFLINE: ("#009E73", "-."),
    OWN_TEXT: ("#E69F00", (0, (3, 1, 1, 1))),
}


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method, in order of their seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def table(runs: Sequence[Run], size: int) -> Table:
    """The table of all methods, one row for each.

    Args:
        runs: The teacher's run, then the students'.
        size: Number of bytes of the test text.

    Returns:
        A table of rich: means over the seeds, with the standard deviation if there are several seeds.
    """
    seeds = 1 + max(run.seed for run in runs)
    printed = Table(
        title=f"Python's standard library, {size:,} bytes of test text; {seeds} seed{'s' * (seeds > 1)}",
        caption="Compute: floating-point operations of all matrix products, with\n"
        "those of the teacher beside the student and of writing text,\n"
        "without the teacher's training. Equal compute: as much as the\n"
        "distillation without a cache.",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    printed.add_column("method", no_wrap=True)
    for name in ("parameters", "steps", "bits per\nbyte", "compute\nTFLOP", "time\ns"):
        printed.add_column(name, justify="right", no_wrap=True)
    for method, several in grouped(runs).items():
        first = several[0]
        printed.add_row(
            method,
            f"{first.parameters:,}",
            f"{first.steps:,}",
            _spread([run.test for run in several]),
            f"{first.flops() / 1e12:.3g}",
            f"{statistics.median(run.seconds for run in several):.0f}",
            end_section=method == TEACHER,
        )
    return printed


def closing(runs: Sequence[Run]) -> list[str]:
    """A sentence for each distillation that compares it with another student, and one on the cache.

    A method is better if its student needs fewer bits for every seed, and worse if it needs more for every seed.

    Args:
        runs: The teacher's run, then the students'.

    Returns:
        The sentences; one more if only a single seed was trained.
    """
    groups = grouped(runs)
    sentences = []
    for method in (ONLINE, OFFLINE):
        claims = [
            f"{_verdict(groups[method], groups[base])} than the student alone at equal {name}"
            for base, name in ((ALONE, "steps"), (LONGER, "compute"))
        ]
        sentences.append(f"The student {method} is {' and '.join(claims)}.")
    cache, online, own = groups[OFFLINE][0], groups[ONLINE][0], groups[OWN_TEXT][0]
    sentences.append(
        f"The student that also writes text of its own is {_verdict(groups[OWN_TEXT], groups[ONLINE])} than the student"
        f" {ONLINE} at equal compute, which is {own.steps / online.steps:.2f} of its steps."
    )
    sentences.append(
        f"The cache holds {cache.cache_bytes / 1e6:.0f} MB; filled and used once, it takes"
        f" {cache.flops() / online.flops():.2f} of the compute of the teacher beside the student."
    )
    if max(run.seed for run in runs) == 0:
        sentences.append("A single seed proves little: take several.")
    return sentences


def _verdict(distilled: Sequence[Run], base: Sequence[Run]) -> str:
    differences = [run.test - other.test for run, other in zip(distilled, base, strict=True)]
    word = "better" if max(differences) < 0 else "worse" if min(differences) > 0 else "not clearly better or worse"
    return f"{word} ({statistics.mean(differences):+.3f} bits per byte)"


def samples(networks: Mapping[str, GPT], text: Text, count: int) -> dict[str, dict[str, str]]:
    """Continuations of :data:`PROMPTS` by method: drawn with the same random numbers for all networks.

    Args:
        networks: The networks by method.
        text: The text, for its tokenizer.
        count: Number of tokens of a continuation.
    """
    drawn: dict[str, dict[str, str]] = {}
    for method, net in networks.items():
        generator = torch.Generator().manual_seed(0)
        drawn[method] = {
            prompt: text.tokenizer.decode(
                continued(net, torch.tensor(text.tokenizer.encode(prompt).ids), count, generator).tolist()
            )
            for prompt in PROMPTS
        }
    return drawn


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plot the bits per byte of the validation text by step and by compute: the first seed of each method.

    Args:
        runs: The teacher's run, then the students'.
        path: PNG file to write.
    """
    save_figure(lambda figure: _draw(figure, grouped(runs)), path)


def _draw(figure: Any, groups: Mapping[str, Sequence[Run]]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for method, (color, line) in _LOOKS.items():
        run = groups[method][0]
        steps, bits = zip(*run.curve, strict=True)
        name = f"{method}: {bits[-1]:.3f}"
        if method == TEACHER:
            panels[0].axhline(bits[-1], color=color, linestyle=line, linewidth=2, label=name)
            panels[1].axhline(bits[-1], color=color, linestyle=line, linewidth=2)
            continue
        panels[0].plot(steps, bits, color=color, linestyle=line, linewidth=2.5, label=name)
        compute = [run.flops(step) / 1e12 for step in steps]
        panels[1].plot(compute, bits, color=color, linestyle=line, linewidth=2.5)
    for panel, label in zip(panels, ("step", "compute (10¹² floating-point operations)"), strict=True):
        panel.set_xlabel(label, fontsize=12)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bits per byte of validation text", fontsize=12)
    panels[0].legend(loc="upper right", title="After the last step", alignment="left", fontsize=11, title_fontsize=11)
    size = groups[STUDENTS[0]][0].parameters
    teacher = groups[TEACHER][0].parameters
    figure.suptitle(f"Python sources: a student of {size:,} parameters, a teacher of {teacher:,}", fontsize=13)


def _spread(bits: Sequence[float]) -> str:
    mean = f"{statistics.mean(bits):.3f}"
    return f"{mean} ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else mean
