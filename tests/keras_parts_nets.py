"""A small Keras network with the places that losses with parts of their own read, and a training with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_nets import assert_same_logs, assert_same_weights

from keras_distill import DistillModel

HAS_FLOAT64 = keras.backend.result_type("float64", "float64") == "float64"
DTYPE = "float64" if HAS_FLOAT64 else "float32"


def last(array: Any) -> np.ndarray[Any, Any]:
    """A map in Keras' layout."""
    return np.moveaxis(np.asarray(array), 1, -1)


def network(channels: int, seed: int, name: str) -> keras.Model:
    """Inputs (N, 3, 3, 2); layers "conv", "norm" before a ReLU, "body" with smaller maps, and "head"."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3, 3, 2))
    maps = keras.layers.Conv2D(channels, 1, name="conv")(inputs)
    random = {name: keras.initializers.RandomNormal(stddev=1.0, seed=seed) for name in ("gamma", "beta")}
    settings = {f"{name}_initializer": initializer for name, initializer in random.items()}
    maps = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(momentum=0.9, name="norm", **settings)(maps))
    maps = keras.layers.Conv2D(2 * channels, 2, 2, "same", activation="relu", name="body")(maps)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(maps)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(pooled), name=name)


def distilled(*terms: Any, teacher: Any = None) -> DistillModel:
    model = DistillModel(network(4, 1, "student"), teacher or network(4, 2, "teacher"), list(terms))
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)  # a trace takes longer than all its steps
    return model


def fitted(model: DistillModel, epochs: int, start: int = 0) -> dict[str, list[float]]:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((8, 3, 3, 2)).astype("float32"), random.standard_normal((8, 3)).astype("float32")
    return model.fit(x, y, 4, epochs, initial_epoch=start, shuffle=False, verbose=0).history


def assert_resumes(make: Any, path: Path) -> None:
    """Two epochs equal one epoch, a file, and another epoch."""
    straight, first = make(), make()
    logs = fitted(straight, 2)
    fitted(first, 1)
    begun = [ops.convert_to_numpy(variable) for variable in first.trainable_variables]
    first.save(path / "model.keras")
    second = keras.models.load_model(path / "model.keras")
    second.teacher, second.run_eagerly = first.teacher, True
    assert_same_logs(fitted(second, 2, 1), {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)
    pairs = zip(begun, second.trainable_variables, strict=True)
    assert not any(np.array_equal(before, ops.convert_to_numpy(variable)) for before, variable in pairs)


class Called:
    """A function of the student's and the teacher's tensor, called as a loss is."""

    needs_labels = False

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, teacher: Any, student: Any) -> Any:
        return self.function(student, teacher)
