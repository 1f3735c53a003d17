"""A Keras detector learns from a larger one: its feature pyramid, and its features through the teacher's head.

`python examples/keras_detection.py` takes a minute and a half on one core. It prints the average precision at an
overlap of 0.5, of a single run:

    teacher                             35.6 %
    student alone                        6.0 %
    student with the teacher's pyramid   8.1 %
    student through the teacher's head   6.9 %
"""

from __future__ import annotations

from typing import Any

from drawn_scenes import draw
from keras_scenes import batch_of, detector, precision, train
from tables import show

import keras  # isort: skip - after torch, which draws the scenes

from keras_distill import CrossHeadDistillation, DistillModel, FeatureDistillation, FocalGlobalLoss, Tap


def student_of(teacher: keras.Model, term: Any, data: Any, epochs: int) -> keras.Model:
    """A small detector after a training with a term, or alone."""
    keras.utils.set_random_seed(0)
    student = detector(12)
    train(DistillModel(student, teacher, term) if term else student, data, epochs)
    return student


def main(epochs: int = 15) -> dict[str, float]:
    """The teacher sees four times as many scenes; a student sees its own three times as often."""
    scenes, test = draw(600, seed=0), draw(100, seed=1)
    keras.utils.set_random_seed(0)
    teacher, few = detector(32), batch_of(scenes[:150])
    train(teacher, batch_of(scenes), epochs)
    pyramid = Tap("neck", output="*")  # both levels, each through an adapter
    into_head = Tap("head", output="*", where="input")
    terms = {
        "alone": None,
        "with the teacher's pyramid": FeatureDistillation(
            pyramid, pyramid, FocalGlobalLoss(), weight=10.0, boxes="boxes"
        ),
        "through the teacher's head": CrossHeadDistillation(into_head, Tap("head", output="scores"), weight=300.0),
    }
    results = {"teacher": precision(teacher, test)}
    for name, term in terms.items():
        results[f"student {name}"] = precision(student_of(teacher, term, few, 3 * epochs), test)
    return show("Detection", results, "average precision")


if __name__ == "__main__":
    main()
