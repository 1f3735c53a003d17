"""A CNN from a CNN, as the YAML file beside this one says: `python examples/cnn_from_cnn.py`.

It prints the accuracy: teacher 97 %, student alone 86 %, distilled 86 %, so distillation gains nothing here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import accuracy, digits, show, train
from networks import cnn

from lightning_distill import Distillation

FILE = Path(__file__).with_suffix(".yaml")


def training_data() -> Any:
    """The data that the file names."""
    return digits()[0]


def test_data() -> Any:
    """The scores that the file names."""
    return digits()[1]


def main(epochs: int = 10) -> dict[str, float]:
    """The launcher with its built-in training."""
    sys.modules.setdefault("cnn_from_cnn", sys.modules[__name__])  # run as a script, this is called __main__
    torch.manual_seed(0)
    teacher, alone = train(cnn(24), training_data(), epochs), train(cnn(3), training_data(), epochs)
    distiller = Distillation(FILE)
    distiller.conf.distillation.train.end_epoch = epochs
    distiller.conf.distillation.train.trainer = {"enable_progress_bar": False}
    distiller.student_model, distiller.teacher_model = cnn(3), teacher
    student = distiller.fit()
    scores = {"teacher": accuracy(teacher, test_data()), "student alone": accuracy(alone, test_data())}
    return show("CNN from CNN, YAML", {**scores, "student distilled": accuracy(student, test_data())})


if __name__ == "__main__":
    main()
