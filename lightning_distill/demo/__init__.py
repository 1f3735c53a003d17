"""The demonstration: a student of handwritten digits, alone and distilled, where labels are scarce and where not.

Every student of a seed starts from the same weights and gets the same batches for the same number of steps; they
differ in the terms of their :class:`DistillCallback` only. Where labels are scarce the other images carry the label
-100, which the cross entropy leaves out; distillation adds the teacher's outputs on them. Settings were chosen on
the validation images. The test images are used once, after the last epoch.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from distill_core.demo_report import Run, closing, plot, table
from lightning_distill.demo.digits import load_digits_data
from lightning_distill.demo.report import prove_plain
from lightning_distill.demo.training import Settings, train_all


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for ``results.json``, ``curves.png`` and ``student.pt``; made where it is missing.
        seeds: Students trained for each method and setting; ``None`` is 3, or 1 if ``quick``.
        quick: Whether to train two epochs only.
        console: Where to print; ``None`` is the standard output.

    Returns:
        The teacher's run, then the students'.

    Raises:
        OSError: If the folder cannot be written to.
    """
    started, console = time.perf_counter(), console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(epochs=2, teacher_epochs=2) if quick else Settings()
    settings = Settings(**{**asdict(settings), "seeds": seeds or (1 if quick else settings.seeds)})
    digits = load_digits_data()
    with quiet(), torch.random.fork_rng(devices=[]), _one_thread():
        runs, students = train_all(digits, settings, console)
        console.print(table(runs))
        saved = prove_plain(output / "student.pt", runs, students, digits.test)
    plot(runs, output / "curves.png")
    conclusion, seconds = closing(runs), round(time.perf_counter() - started, 1)
    results = {
        "settings": asdict(settings),
        "runs": [asdict(each) for each in runs],
        "saved_student": saved,
        "conclusion": conclusion,
        "seconds": seconds,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for line in (*conclusion, saved["proof"], f"All files, after {seconds} s, in {output.resolve()}"):
        console.print(line, highlight=False, soft_wrap=True)
    return runs


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's banner and two warnings that no line here causes; all other warnings are shown."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
            warnings.filterwarnings("ignore", message=r".isinstance\(treespec, LeafSpec\). is deprecated")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: on networks this small a second thread slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
