"""The demonstration on text: a small GPT of Python sources, alone and distilled.

Every student of a seed starts from the same weights and gets the same batches in the same order. The student alone is
trained twice: for as many steps as the distilled ones, and for as much compute as the distillation, in which the
teacher runs beside the student. One distilled student writes the text of some batches itself, in as many steps as have
that compute. Settings were chosen on the validation files. The test files are used once, after the last step.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from lightning_distill.demo.language.report import PROMPTS, closing, plot, samples, table
from lightning_distill.demo.language.text import load_text
from lightning_distill.demo.language.training import LONGER, ONLINE, TEACHER, Run, Settings, train_all
from lightning_distill.guidance.runs import quiet

QUICK = Settings(
    files=3,
    vocabulary=400,
    length=64,
    rows=160,
    batch_size=16,
    teacher_epochs=2,
    teacher_size=(64, 2),
    student_size=(32, 1),
    top_k=16,
    own_prompt=32,
    own_tokens=4,
    curve_points=2,
    curve_rows=20,
)


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the text to the folder of results.

    Args:
        output: Folder for ``language.json``, ``language_curves.png`` and ``language_student.pt``; created if it does
            not exist.
        seeds: Number of students for each method; ``None`` means 1.
        quick: Whether to train tiny networks for a few steps only.
        console: Console to print to; ``None`` means the standard output.

    Returns:
        The teacher's run, then the students'.

    Raises:
        OSError: If the folder cannot be written to.
    """
    started, console = time.perf_counter(), console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    settings = replace(settings, seeds=seeds or settings.seeds)
    text = load_text(settings.vocabulary, settings.files)
    with quiet(), torch.random.fork_rng(devices=[]):
        runs, networks = train_all(text, settings, console)
        drawn = samples(networks, text, count=40)
    console.print(table(runs, text.test.size))
    for method in (TEACHER, LONGER, ONLINE):
        console.print(f"\n[bold]{method}[/bold] continues {PROMPTS[0].strip()!r}:", highlight=False)
        console.print(escape(drawn[method][PROMPTS[0]]), highlight=False, soft_wrap=True)
    conclusion, seconds = closing(runs), round(time.perf_counter() - started)
    plot(runs, output / "language_curves.png")
    torch.save(networks[ONLINE].state_dict(), output / "language_student.pt")
    results = {
        "settings": asdict(settings),
        "files": {part: getattr(text, part).names for part in ("train", "validation", "test")},
        "runs": [asdict(result) for result in runs],
        "continuations": drawn,
        "conclusion": conclusion,
        "seconds": seconds,
    }
    (output / "language.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print()
    for line in (*conclusion, f"All files, after {seconds} s, in {output.resolve()}"):
        console.print(line, highlight=False, soft_wrap=True)
    return runs
