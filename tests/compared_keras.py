"""A small Keras model, its data and its teacher for comparisons, also in other processes and from YAML files."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

COMPILE: dict[str, Any] = {
    "optimizer": keras.optimizers.SGD(0.1),
    "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": ["accuracy"],
}
FIT: dict[str, Any] = {"epochs": 2, "batch_size": 16}


def make_student() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3),
        ]
    )


def make_teacher() -> keras.Model:
    teacher = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="tanh", name="hidden"), keras.layers.Dense(3)]
    )
    generator = np.random.default_rng(0)
    teacher.set_weights([generator.normal(size=weight.shape) for weight in teacher.get_weights()])
    return teacher


def arrays() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Arrays to train and to validate, labelled by the teacher."""
    x = np.random.default_rng(1).normal(size=(96, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(make_teacher()(x)).argmax(1)
    return (x[:64], y[:64]), (x[64:], y[64:])
