"""A vision transformer teaches a convolutional network without labels: `python examples/keras_vit_to_cnn.py`.

It prints the accuracy on handwritten digits; a linear layer on frozen maps learns from the 50 labels:

    teacher, all labels                          96.0 %
    student's untrained maps, 50 labels          64.0 %
    student alone, 50 labels                     64.4 %
    student distilled without labels, 50 labels  82.9 %
"""

from __future__ import annotations

from typing import Any

import keras
from keras_common import accuracy, cnn, digits, fit, vit
from tables import show

from keras_distill import DistillModel, FeatureDistillation

LABELLED = 50


def probed(network: keras.Model, x: Any, y: Any, epochs: int) -> keras.Model:
    """A linear classifier on the frozen maps of a network."""
    maps = network.get_layer("maps").output
    features = keras.Model(network.input, maps)
    features.trainable = False
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(features(network.input)))
    return fit(keras.Model(network.input, outputs), x, y, epochs, batch_size=10)


def main(epochs: int = 20) -> dict[str, float]:
    """The student sees all images, and the teacher's tokens instead of labels; the classifier gets 50 labels."""
    keras.utils.set_random_seed(0)
    (x, y), test = digits()
    few = x[:LABELLED], y[:LABELLED]
    teacher = fit(vit(), x, y, epochs)

    keras.utils.set_random_seed(1)
    student, untrained = cnn(8), cnn(8)
    untrained.set_weights(student.get_weights())
    alone = keras.models.clone_model(student)
    alone.set_weights(student.get_weights())
    fit(DistillModel(student, teacher, FeatureDistillation("maps", "tokens", "cosine")), x, None, epochs)

    scores = {
        "teacher, all labels": accuracy(teacher, test),
        "student's untrained maps, 50 labels": accuracy(probed(untrained, *few, 5 * epochs), test),
        "student alone, 50 labels": accuracy(fit(alone, *few, 5 * epochs, batch_size=10), test),
        "student distilled without labels, 50 labels": accuracy(probed(student, *few, 5 * epochs), test),
    }
    return show("Tokens to maps", scores)


if __name__ == "__main__":
    main()
