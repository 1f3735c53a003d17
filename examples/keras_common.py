"""The digits and small networks of the recipes for Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

Arrays = tuple[Any, Any]


def digits() -> tuple[Arrays, Arrays]:
    """Handwritten digits: images (N, 8, 8, 1) and labels, 1,347 to train and 450 to test."""
    data = load_digits()
    images, labels = (data.images[..., None] / 16).astype("float32"), data.target.astype("int32")
    return (images[450:], labels[450:]), (images[:450], labels[:450])


def cnn(width: int, name: str | None = None) -> keras.Model:
    """A convolutional network, with maps of 4 x 4 positions in its layer `maps`."""
    inputs = keras.Input((8, 8, 1), name="images")
    x = layers.Conv2D(width, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Conv2D(2 * width, 3, padding="same", activation="relu", name="maps")(layers.MaxPooling2D()(x))
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(layers.AveragePooling2D(2)(x))), name=name)


class Patches(layers.Layer):
    """Images to tokens (N, 16, C) of patches of 2 x 2 pixels, each with a learned place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = layers.Conv2D(width, 2, strides=2)
        self.places = self.add_weight(shape=(16, width), initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, images: Any) -> Any:
        """The tokens."""
        return keras.ops.reshape(self.patches(images), (-1, *self.places.shape)) + self.places


def vit(width: int = 32, depth: int = 2) -> keras.Model:
    """A small vision transformer, with its tokens in its layer `tokens`."""
    inputs = keras.Input((8, 8, 1))
    x = Patches(width)(inputs)
    for _ in range(depth):
        normalized = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(normalized, normalized)
        x = x + layers.Dense(width)(layers.Dense(2 * width, activation="gelu")(layers.LayerNormalization()(x)))
    tokens = layers.LayerNormalization(name="tokens")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(tokens)))


def label_loss() -> keras.losses.Loss:
    """Cross entropy of logits, in which images with the label -1 do not count."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)


def fit(model: keras.Model, x: Any, y: Any = None, epochs: int = 10, **settings: Any) -> keras.Model:
    """The model after a training; without labels, it has no loss of its own."""
    model.compile(keras.optimizers.AdamW(3e-3), None if y is None else label_loss(), jit_compile=False)
    model.fit(x, y, epochs=epochs, **{"batch_size": 32, "verbose": 0, **settings})
    return model


def accuracy(model: keras.Model, test: Arrays) -> float:
    """The share of right answers."""
    logits = keras.ops.convert_to_numpy(model(test[0], training=False))
    return float(np.mean(logits.argmax(-1) == test[1]))
