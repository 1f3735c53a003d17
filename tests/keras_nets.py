"""Small Keras models and data that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest


def mlp(width: int = 8, *, name: str = "student", dropout: float = 0.0) -> keras.Model:
    """A functional model of 6 inputs and 3 logits, with the layers "hidden" and "logits"."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")(inputs)
    hidden = keras.layers.Dropout(dropout, seed=1)(hidden) if dropout else hidden
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name=name)


def table(examples: int = 16, seed: int = 0) -> tuple[Any, Any]:
    """Inputs (N, 6) and labels (N,) of 3 classes."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(examples, 6)).astype("float32")
    return inputs, inputs[:, :3].argmax(axis=-1).astype("int32")


def cross_entropy() -> keras.losses.Loss:
    """The task loss of the models above."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class _Interrupt(keras.callbacks.Callback):
    """Stops a training as a user does, before the third epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


def with_and_without_interruption(
    make: Callable[[], keras.Model], folder: Path, *data: Any, **fit: Any
) -> tuple[keras.Model, keras.Model]:
    """A model after 4 epochs, and one that went on from the backup of another, which was stopped after 2.

    Args:
        make: Makes a compiled model, always the same.
        folder: For the backup.
        data: Inputs and labels.
        fit: Further arguments of ``fit``.
    """
    whole, first, second = make(), make(), make()
    whole.fit(*data, epochs=4, **fit)
    with pytest.raises(KeyboardInterrupt):
        first.fit(*data, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(folder), _Interrupt()], **fit)
    second.fit(*data, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(folder)], **fit)
    return whole, second


def assert_same_weights(first: keras.Model, second: keras.Model, tolerance: float = 1e-4) -> None:
    """Both models have equal weights, all of them."""
    first_weights, second_weights = first.get_weights(), second.get_weights()
    assert len(first_weights) == len(second_weights)
    for weight, other in zip(first_weights, second_weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=tolerance, atol=tolerance)


def assert_same_logs(first: dict[str, Sequence[float]], second: dict[str, Sequence[float]], rtol: float = 1e-4) -> None:
    """Both histories have the same keys and values."""
    assert sorted(first) == sorted(second)
    for key, values in first.items():
        np.testing.assert_allclose(values, second[key], rtol=rtol, atol=1e-6, err_msg=key)


# One network in the ways users write one ------------------------------------------------------------------------------

STRUCTURES = ("functional", "sequential", "unbuilt_sequential", "subclassed", "built_subclassed", "nested", "deep")


@keras.saving.register_keras_serializable(package="keras_nets")
class Counter(keras.layers.Layer):
    """The identity; counts how often it ran, also in a graph, but not when Keras only infers shapes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = self.add_weight(
            name="calls", shape=(), dtype="float32", initializer="zeros", trainable=False, autocast=False
        )

    def call(self, inputs: Any) -> Any:
        self.calls.assign_add(1.0)
        return inputs


def parts(width: int = 8, dropout: float = 0.0) -> list[keras.layers.Layer]:
    """Layers "counter", "hidden", "norm", "drop" and "logits", in this order, from 6 inputs to 3 logits."""
    return [
        Counter(name="counter"),
        keras.layers.Dense(width, activation="tanh", name="hidden"),
        keras.layers.BatchNormalization(momentum=0.9, name="norm"),
        keras.layers.Dropout(dropout, seed=1, name="drop"),
        keras.layers.Dense(3, name="logits"),
    ]


class Chain(keras.Model):
    """A subclassed model that calls its layers one after the other."""

    def __init__(self, chain: Sequence[keras.layers.Layer], name: str) -> None:
        super().__init__(name=name)
        self.chain = list(chain)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        for layer in self.chain:
            takes_training = isinstance(layer, (keras.layers.BatchNormalization, keras.layers.Dropout))
            inputs = layer(inputs, training=training) if takes_training else layer(inputs)
        return inputs


def chained(layers: Sequence[keras.layers.Layer], name: str, features: int = 6) -> keras.Model:
    """A functional model that calls its layers one after the other."""
    inputs = keras.Input((features,))
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name=name)


def structured(kind: str, width: int = 8, *, dropout: float = 0.0, name: str = "student") -> keras.Model:
    """The network of ``parts`` as a model of one of the STRUCTURES."""
    layers = parts(width, dropout)
    if kind == "functional":
        return chained(layers, name)
    if kind == "sequential":
        return keras.Sequential([keras.Input((6,)), *layers], name=name)
    if kind == "unbuilt_sequential":
        return keras.Sequential(layers, name=name)
    if kind in ("subclassed", "built_subclassed"):
        model = Chain(layers, name)
        if kind == "built_subclassed":
            model(np.zeros((1, 6), "float32"))
            layers[0].calls.assign(0.0)
        return model
    backbone = chained(layers[:-1], "backbone")
    if kind == "nested":
        return chained([backbone, layers[-1]], name)
    return keras.Sequential([keras.Input((6,)), chained([backbone], "body"), layers[-1]], name=name)


# Formulas in float64 --------------------------------------------------------------------------------------------------


def log_softmax64(logits: Any) -> np.ndarray[Any, Any]:
    """z - log sum exp z over the last dimension."""
    z = np.asarray(logits, "float64")
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl64(student: Any, teacher: Any, temperature: float = 4.0) -> np.ndarray[Any, Any]:
    """T^2 sum_c p_t (log p_t - log p_s), one value for each row."""
    log_s = log_softmax64(np.asarray(student, "float64") / temperature)
    log_t = log_softmax64(np.asarray(teacher, "float64") / temperature)
    return temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(axis=-1)


def ce64(logits: Any, labels: Any) -> np.ndarray[Any, Any]:
    """-log p_label, one value for each row."""
    log_p = log_softmax64(logits)
    return -np.take_along_axis(log_p, np.asarray(labels)[..., None].astype(int), axis=-1)[..., 0]


def numpy_of(value: Any) -> np.ndarray[Any, Any]:
    """A tensor as a float64 array."""
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")
