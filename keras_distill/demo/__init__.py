"""The demonstration: a student of handwritten digits, alone and distilled, with few labels and with all.

It is two calls of :func:`keras_distill.compare`: every student of a seed starts from the same weights and gets the same
batches; they differ only in the terms of their :class:`DistillModel`. If labels are scarce, the other images have the
label -1, which the compiled cross entropy ignores (``ignore_class=-1``); distillation adds the teacher's outputs on
them. A ``sample_weight`` of 0 would take an image out of the terms too, unless they have ``use_sample_weight=False``.

Data and settings are those of the Lightning half's demonstration. The test images are used once, after the last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import keras
from rich.console import Console

from distill_core.demo_report import SCARCE, publish
from distill_core.guidance.comparison import Comparison
from keras_distill.demo.digits import load_digits_data, make_student
from keras_distill.demo.report import prove_plain
from keras_distill.demo.training import Settings, compared, trained_teacher
from keras_distill.guidance.runs import kept_random_state

QUICK = Settings(epochs=2, teacher_epochs=2, batch_size=25, seeds=1)


def run(
    output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None
) -> dict[str, Comparison]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for the comparisons, ``curves.png`` and ``student.keras``; created if it does not exist.
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
    with _usual_settings(), kept_random_state():
        teacher = trained_teacher(digits, settings)
        with console.status("training the students") as status:
            comparisons = compared(digits, settings, teacher, output, status.update)
        proved = prove_plain(output / "student.keras", comparisons[SCARCE], digits.test)
        sizes = make_student().count_params(), teacher.count_params()
    publish(comparisons, sizes, proved, output, console, begun)
    return comparisons


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
