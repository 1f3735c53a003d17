"""Costs of a Keras model for one example, against computations by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_distill.guidance.costs import costs


def sequential(shape: tuple[int, ...], *parts: keras.Layer) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *parts])


def attention() -> keras.Model:
    tokens = keras.Input((6, 8))
    return keras.Model(tokens, layers.MultiHeadAttention(2, 4)(tokens, tokens))


def zeros(*shape: int) -> Any:
    return np.zeros((1, *shape), "float32")


# model, shape of an example, multiply-adds
CASES: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...], int]] = {
    "dense": (lambda: sequential((8,), layers.Dense(3)), (8,), 24),
    "convolution": (lambda: sequential((8, 8, 3), layers.Conv2D(4, 3)), (8, 8, 3), 6 * 6 * 4 * 27),
    "depthwise": (
        lambda: sequential((8, 8, 3), layers.DepthwiseConv2D(3, depth_multiplier=2)),
        (8, 8, 3),
        6 * 6 * 6 * 9,
    ),
    "transposed": (lambda: sequential((6, 8), layers.Conv1DTranspose(4, 3)), (6, 8), 6 * 8 * 4 * 3),
    "attention": (attention, (6, 8), 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8),
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", CASES)
def test_multiply_adds_equal_those_by_hand(name: str) -> None:
    model, shape, expected = CASES[name]
    assert costs(model(), zeros(*shape))["multiply_adds"] == expected


@pytest.mark.tensorflow
@pytest.mark.parametrize("layer", [layers.LSTM(3), layers.Conv1D(4, 3, groups=2)])
def test_operations_that_cannot_be_counted_are_not_known(layer: keras.Layer) -> None:
    assert costs(sequential((6, 8), layer), zeros(6, 8))["multiply_adds"] is None


def test_parameters_bytes_and_latency() -> None:
    model = sequential((4,), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5))
    measured = costs(model, zeros(4))
    assert (measured["parameters"], measured["bytes"], measured["memory_bytes"]) == (36, 144, None)
    assert measured["latency_seconds"] > 0


def test_half_precision_takes_half_the_bytes() -> None:
    model = sequential((4,), layers.Dense(4, dtype="bfloat16"))
    assert costs(model, zeros(4))["bytes"] == 40


def test_a_model_without_weights_yet_is_built() -> None:
    assert costs(keras.Sequential([layers.Dense(3)]), zeros(4))["parameters"] == 15


def test_weights_stay_as_they_were() -> None:
    model = sequential((4,), layers.Dense(4), layers.BatchNormalization())
    before = [np.array(weight) for weight in model.get_weights()]
    costs(model, np.ones((1, 4), "float32"))
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_inputs_may_have_names() -> None:
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    model = keras.Model(inputs, layers.Dense(2)(inputs["a"] + inputs["b"]))
    assert costs(model, {"a": zeros(4), "b": zeros(4)})["parameters"] == 10


@pytest.mark.parametrize(
    ("model", "example", "error", "words"),
    [
        (len, zeros(4), TypeError, "Expected `model` to be a keras.Model. Received: model=builtin"),
        (None, np.zeros((8, 4)), ValueError, r"hold one example. Pass a slice.* of shape \(8, 4\)"),
        (None, 3.0, ValueError, r"hold one example. Pass a slice.* of shape \(\)"),
    ],
)
def test_wrong_arguments_are_refused(model: Any, example: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        costs(model or sequential((4,), layers.Dense(2)), example)
