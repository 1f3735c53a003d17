"""The networks of the Keras table, with weights that every backend draws alike."""

from __future__ import annotations

import math
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops


def network(width: int, name: str, dtype: str | None = None) -> keras.Model:
    """Six inputs, the layers "hidden" and "deep", three logits in float32."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(width, "tanh", name="hidden", dtype=dtype)(inputs)
    deep = keras.layers.Dense(width + 1, "tanh", name="deep", dtype=dtype)(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits", dtype=dtype)(deep), name=name)


def tagger(width: int, name: str, dtype: str | None = None) -> keras.Model:
    """Tokens with a mask, "hidden" and three logits for each."""
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(9, width, mask_zero=True, dtype=dtype)(inputs)
    hidden = keras.layers.Dense(width, "tanh", name="hidden", dtype=dtype)(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits", dtype=dtype)(hidden), name=name)


def inner(model: keras.Model, x: Any, *names: str) -> list[Any]:
    """Features of some layers and the output, by a functional model that shares the layers."""
    if "parts" not in model.__dict__:
        outputs = [model.get_layer(name).output for name in names]
        object.__setattr__(model, "parts", keras.Model(model.input, [*outputs, model.output]))
    return [ops.cast(part, "float32") for part in model.parts(x)]


def drawn(model: Any, name: str = "") -> Any:
    """The model or layer with weights that are the same on every backend."""
    generator = np.random.default_rng(zlib.crc32((name or model.name).encode()))
    shapes = [weights.shape for weights in model.get_weights()]
    model.set_weights([generator.normal(size=shape, scale=max(math.prod(shape[:-1]), 4) ** -0.5) for shape in shapes])
    return model
