"""The demonstration: a student of handwritten digits, alone and distilled, with few labels and with all.

It is two calls of :func:`lightning_distill.compare`: every student of a seed starts from the same weights and gets the
same batches; they differ only in the terms of their :class:`DistillCallback`. If labels are scarce, the other images
have the label -100, which the cross entropy ignores; distillation adds the teacher's outputs on them. Learning rates,
temperature and weights were chosen on the validation images. The test images are used once, after the last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from distill_core.demo_report import SCARCE, publish
from distill_core.guidance.comparison import Comparison
from lightning_distill.demo.digits import Student, load_digits_data, size
from lightning_distill.demo.report import prove_plain
from lightning_distill.demo.training import Settings, compared, trained_teacher
from lightning_distill.guidance.runs import quiet

QUICK = Settings(epochs=2, teacher_epochs=2, batch_size=25, seeds=1)


def run(
    output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None
) -> dict[str, Comparison]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for the comparisons, ``curves.png`` and ``student.pt``; created if it does not exist.
        seeds: Number of students for each method and share of labels; ``None`` means 5, or 1 if ``quick``.
        quick: Whether to train two epochs only.
        console: Console to print to; ``None`` means the standard output.

    Returns:
        The comparisons by the share of labels.

    Raises:
        OSError: If the folder cannot be written to.
    """
    begun, console = time.perf_counter(), console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    settings = replace(settings, seeds=seeds or settings.seeds)
    digits = load_digits_data()
    with quiet(), torch.random.fork_rng(devices=[]), _one_thread():
        teacher = trained_teacher(digits, settings)
        with console.status("training the students") as status:
            comparisons = compared(digits, settings, teacher, output, status.update)
        proved = prove_plain(output / "student.pt", comparisons[SCARCE], digits.test)
        sizes = size(Student()), size(teacher)
    publish(comparisons, sizes, proved, output, console, begun)
    return comparisons


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: on networks this small a second thread slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
