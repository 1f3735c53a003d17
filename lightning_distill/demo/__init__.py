"""The demonstration: a student of handwritten digits, alone and distilled, with few labels and with all.

Every student of a seed starts from the same weights and gets the same batches for the same number of steps; they
differ only in the terms of their :class:`DistillCallback`. If labels are scarce, the other images have the label -100,
which the cross entropy ignores; distillation adds the teacher's outputs on them. Learning rates, temperature and
weights were chosen on the validation images. The test images are used once, after the last epoch.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from distill_core.demo_report import Run, publish, table
from lightning_distill.demo.digits import load_digits_data
from lightning_distill.demo.report import prove_plain
from lightning_distill.demo.training import Settings, train_all


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for ``results.json``, ``curves.png`` and ``student.pt``; created if it does not exist.
        seeds: Number of students for each method and setting; ``None`` means 3, or 1 if ``quick``.
        quick: Whether to train two epochs only.
        console: Console to print to; ``None`` means the standard output.

    Returns:
        The teacher's run, then the students'.

    Raises:
        OSError: If the folder cannot be written to.
    """
    started, console = time.perf_counter(), console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(epochs=2, teacher_epochs=2, batch_size=25, seeds=1) if quick else Settings()
    settings = replace(settings, seeds=seeds or settings.seeds)
    digits = load_digits_data()
    with quiet(), torch.random.fork_rng(devices=[]), _one_thread():
        runs, students = train_all(digits, settings, console)
        console.print(table(runs))
        saved = prove_plain(output / "student.pt", runs, students, digits.test)
    publish(runs, asdict(settings), saved, output, console, started)
    return runs


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's banner and two warnings that do not concern this code; all other warnings are printed."""
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
