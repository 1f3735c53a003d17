"""The demonstration: a student of handwritten digits, alone and distilled, where labels are scarce and where not.

Every student of a seed starts from the same weights and gets the same batches for the same number of steps; they
differ in the terms of their :class:`DistillModel` only. Where labels are scarce the other images carry the label -1,
which the compiled cross entropy leaves out (``ignore_class=-1``); distillation adds the teacher's outputs on them.
A ``sample_weight`` of 0 would take an image out of the terms too, unless they have ``use_sample_weight=False``.

Data, highest learning rates, temperature and weights are those of the Lightning half's demonstration, where they were
chosen on the validation images; batches are larger and epochs fewer, to keep it short. The test images are used
after the last epoch only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import keras
from rich.console import Console

from distill_core.demo_report import Run, closing, plot, table
from keras_distill.demo.digits import load_digits_data
from keras_distill.demo.report import prove_plain
from keras_distill.demo.training import Settings, train_all


def run(output: Path, *, seeds: int | None = None, quick: bool = False, console: Console | None = None) -> list[Run]:
    """The demonstration, from the data to the folder of results.

    Args:
        output: Folder for ``results.json``, ``curves.png`` and ``student.keras``; made where it is missing.
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
    with _usual_settings():
        runs, students = train_all(digits, settings, console)
        console.print(table(runs))
        saved = prove_plain(output / "student.keras", runs, students, digits.test)
    plot(runs, output / "curves.png")
    conclusion, seconds = closing(runs), round(time.perf_counter() - started, 1)
    results = {
        "backend": keras.backend.backend(),
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
