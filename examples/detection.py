"""A detector learns from a larger one: its feature pyramid, and its features through the teacher's head.

`python examples/detection.py` takes a minute on one core and prints the average precision at an overlap of 0.5:

    teacher                             47.5 %
    student alone                        2.6 %
    student with the teacher's pyramid   9.0 %
    student through the teacher's head   4.8 %
"""

from __future__ import annotations

import functools

from common import show
from drawn_scenes import Detector, average_precision, detection_loss, draw, fit, loader

from lightning_distill import CrossHeadDistillation, DistillCallback, FeatureDistillation, FocalGlobalLoss, Tap


def main(epochs: int = 15) -> dict[str, float]:
    """The teacher sees four times as many scenes."""
    scenes, test = draw(600, seed=0), loader(draw(100, seed=1), shuffle=False)
    train = functools.partial(fit, Detector, detection_loss)
    teacher = train(32, scenes, epochs)
    pyramid = Tap("neck", output="*")  # both levels, each through an adapter
    into_head = Tap("head", output="*", where="input")
    terms = {
        "with the teacher's pyramid": FeatureDistillation(
            pyramid, pyramid, FocalGlobalLoss(), weight=10.0, boxes="boxes"
        ),
        "through the teacher's head": CrossHeadDistillation(into_head, Tap("head", output="scores"), weight=300.0),
    }
    students = {"alone": train(12, scenes[:150], epochs)}
    for name, term in terms.items():
        distill = DistillCallback(teacher, term, student="net", validate=False)
        students[name] = train(12, scenes[:150], epochs, distill)
    results = {"teacher": average_precision(teacher, test)}
    results |= {f"student {name}": average_precision(student, test) for name, student in students.items()}
    return show("Detection", results, "average precision")


if __name__ == "__main__":
    main()
