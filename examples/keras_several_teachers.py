"""Three specialists teach one student: `python examples/keras_several_teachers.py`.

It prints the accuracy over three cameras. Teachers are sure of themselves where they know nothing, so their mean is of
little use; the student needs to know which teacher to ask:

    teacher of upright images      38.7 %
    teacher of negative images     34.9 %
    teacher of turned images       38.7 %
    student alone, 150 labels      57.8 %
    student with the mean of all   21.7 %
    student with each image's own  78.7 %
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras_common import accuracy, cnn, digits, fit
from tables import show

from keras_distill import DistillModel, LogitsDistillation, SoftTargetLoss

VIEWS = {  # a camera each: as the digits are, negatives, and turned by a quarter
    "upright": lambda images: images,
    "negative": lambda images: 1 - images,
    "turned": lambda images: np.rot90(images, axes=(1, 2)),
}


LABELLED = 50  # images of each camera


def views(images: Any) -> Any:
    """The images of all cameras, one camera after the other."""
    return np.concatenate([view(images) for view in VIEWS.values()])


def main(epochs: int = 10) -> dict[str, float]:
    """Each teacher knows one camera. The student learns to see through all, without labels."""
    (x, y), (x_test, y_test) = digits()
    test = views(x_test), np.tile(y_test, 3)
    teachers, scores = [], {}
    for name, view in VIEWS.items():
        keras.utils.set_random_seed(0)
        teachers.append(fit(cnn(24, name), view(x), y, epochs, batch_size=64))
        scores[f"teacher of {name} images"] = accuracy(teachers[-1], test)

    keras.utils.set_random_seed(1)
    few, steps = (views(x[:LABELLED]), np.tile(y[:LABELLED], 3)), epochs * len(x) // LABELLED
    scores["student alone, 150 labels"] = accuracy(fit(cnn(8), *few, steps, batch_size=150), test)

    term = LogitsDistillation(SoftTargetLoss(temperature=2.0))
    data = {"images": views(x), "source": np.repeat(np.arange(3, dtype="int32"), len(x))}
    settings: dict[str, dict[str, str]] = {
        "the mean of all": {"mix": "probabilities"},
        "each image's own": {"route": "source"},
    }
    for name, setting in settings.items():
        keras.utils.set_random_seed(1)
        student = cnn(8)
        fit(DistillModel(student, teachers, term, **setting), data, None, epochs, batch_size=150)
        scores[f"student with {name}"] = accuracy(student, test)
    return show("Three specialists", scores)


if __name__ == "__main__":
    main()
