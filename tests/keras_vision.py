"""Small vision models in Keras: a transformer with class and register tokens, convolutions, models of Keras' own."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

SIZE = 32


@keras.saving.register_keras_serializable(package="tests")
class PrefixTokens(layers.Layer):
    """Puts class and register tokens in front of the patches."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count

    def build(self, shape: Any) -> None:
        self.tokens = self.add_weight(name="tokens", shape=(1, self.count, shape[-1]))

    def call(self, patches: Any) -> Any:
        repeated = ops.repeat(self.tokens, ops.shape(patches)[0], axis=0)
        return ops.concatenate([ops.cast(repeated, patches.dtype), patches], axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[1] + self.count, shape[2])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "count": self.count}


def vit(prefix: int = 1, width: int = 8, size: Any = SIZE, patch: int = 8, name: str = "vit") -> keras.Model:
    """A transformer with one block; ``tokens`` returns prefix tokens and patches, ``embedding`` a vector."""
    height, across = (size, size) if isinstance(size, int) else size
    images = keras.Input((height, across, 3))
    patches = layers.Conv2D(width, patch, strides=patch, name="patches")(images)
    tokens = layers.Reshape((height // patch * (across // patch), width))(patches)
    if prefix:
        tokens = PrefixTokens(prefix, name="prefix")(tokens)
    normalized = layers.LayerNormalization()(tokens)
    tokens = layers.Add()([tokens, layers.MultiHeadAttention(2, width // 2)(normalized, normalized)])
    tokens = layers.LayerNormalization(name="tokens")(tokens)
    embedding = layers.GlobalAveragePooling1D(name="embedding")(tokens)
    return keras.Model(images, layers.Dense(3, name="head")(embedding), name=name)


def cnn(channels: int = 6, size: Any = SIZE, stride: int = 4, name: str = "cnn") -> keras.Model:
    """``maps`` returns a map, ``pool`` a vector."""
    height, across = (size, size) if isinstance(size, int) else size
    images = keras.Input((height, across, 3))
    maps = layers.Conv2D(channels, 3, strides=stride, padding="same", activation="tanh", name="maps")(images)
    return keras.Model(images, layers.Dense(3)(layers.GlobalAveragePooling2D(name="pool")(maps)), name=name)


def mobilenet() -> keras.Model:
    return keras.applications.MobileNetV3Small(
        input_shape=(SIZE, SIZE, 3), alpha=0.25, weights=None, minimalistic=True, classes=3, include_preprocessing=False
    )
