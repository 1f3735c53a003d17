"""The demonstration: a student of handwritten digits, alone and distilled, with few labels and with all.

Every student of a seed starts from the same weights and gets the same batches for the same number of steps; they
differ only in the terms of their :class:`DistillModel`. If labels are scarce, the other images have the label -1,
which the compiled cross entropy ignores (``ignore_class=-1``); distillation adds the teacher's outputs on them.
A ``sample_weight`` of 0 would take an image out of the terms too, unless they have ``use_sample_weight=False``.

Data and settings are those of the Lightning half's demonstration. The test images are used once, after the last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import keras
from rich.console import Console

from distill_core.demo_report import Run, publish, table
from keras_distill.demo.digits import load_digits_data
from keras_distill.demo.report import prove_plain
from keras_distill.demo.training import Settings, train_all


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for ``results.json``, ``curves.png`` and ``student.keras``; created if it does not exist.
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
    with _usual_settings():
        runs, students = train_all(digits, settings, console)
        console.print(table(runs))
        saved = prove_plain(output / "student.keras", runs, students, digits.test)
    publish(runs, asdict(settings), saved, output, console, started, backend=keras.backend.backend())
    return runs


@contextmanager
def _usual_settings() -> Iterator[None]:
    """Set the layout and precision that the demonstration is written for, independent of the user's ``keras.json``."""
    layout, policy = keras.config.image_data_format(), keras.config.dtype_policy()
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_image_data_format(layout)
        keras.config.set_dtype_policy(policy)
