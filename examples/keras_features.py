"""Feature maps through adapters, and fused from deep to shallow as ReviewKD: `python examples/keras_features.py`.

It prints the accuracy with 200 labels; adapters gain nothing here:

    teacher, which knew all labels      96.0 %
    student alone                       76.4 %
    student with maps through adapters  75.8 %
    student with fused maps             78.9 %
"""

from __future__ import annotations

import keras
from keras_common import accuracy, cnn, digits, fit
from tables import show

from keras_distill import DistillModel, FeatureDistillation, ReviewDistillation

LABELLED = 200


def main(epochs: int = 20) -> dict[str, float]:
    """The teacher knows all images; the students know 200 and its maps of them."""
    keras.utils.set_random_seed(0)
    (x, y), test = digits()
    teacher = fit(cnn(32), x, y, epochs)
    scores = {"teacher, which knew all labels": accuracy(teacher, test)}
    x, y = x[:LABELLED], y[:LABELLED]
    layers = ["stem", "maps"]
    terms = {
        "alone": None,
        "with maps through adapters": FeatureDistillation(layers, layers, "mse", weight=1.0),
        "with fused maps": ReviewDistillation(layers, layers, weight=1.0),
    }
    for name, term in terms.items():
        keras.utils.set_random_seed(1)
        student = cnn(4)
        fit(DistillModel(student, teacher, term) if term else student, x, y, 3 * epochs)
        scores[f"student {name}"] = accuracy(student, test)
    return show("Feature maps", scores)


if __name__ == "__main__":
    main()
