"""The demonstration's images and networks, which do not depend on distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import layers, ops

Array: TypeAlias = np.ndarray[Any, Any]

UNLABELLED = -1  # the compiled cross entropy ignores this label


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 8, 8, 1)`` from 0 to 1 and classes ``(N,)`` for training, validation and test."""

    train: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


def make_teacher() -> keras.Model:
    """An untrained convolutional network of about 68,000 parameters: logits ``(N, 10)`` of images ``(N, 8, 8, 1)``."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *_convolution(32),
            *_convolution(32),
            layers.MaxPooling2D(),
            *_convolution(64),
            *_convolution(64, name="deep"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ],
        name="teacher",
    )


def make_student() -> keras.Model:
    """An untrained convolutional network of about 1,500 parameters: logits ``(N, 10)`` of images ``(N, 8, 8, 1)``."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *_convolution(8),
            layers.MaxPooling2D(),
            *_convolution(12, name="deep"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ],
        name="student",
    )


def _convolution(filters: int, name: str | None = None) -> list[keras.layers.Layer]:
    return [
        layers.Conv2D(filters, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),  # Keras' 0.99 would lag behind in a training as short as this
        layers.ReLU(name=name),
    ]


def load_digits_data() -> Digits:
    """1000 images for training, 297 for validation and 500 for test: always the same, stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, classes = (data.images[..., None] / 16).astype("float32"), data.target.astype("int32")
    rest, test = train_test_split(range(len(classes)), test_size=500, stratify=classes, random_state=0)
    train, validation = train_test_split(rest, test_size=297, stratify=classes[rest], random_state=0)
    return Digits(*((images[part], classes[part]) for part in (train, validation, test)))


def hide_labels(labels: Array, share: float, seed: int) -> Array:
    """The labels, of which only a share of each class is kept; all others become :data:`UNLABELLED`."""
    random = np.random.default_rng(seed)
    kept = np.full_like(labels, UNLABELLED)
    for members in (np.flatnonzero(labels == number) for number in range(10)):
        chosen = random.permutation(members)[: round(share * len(members))]
        kept[chosen] = labels[chosen]
    return kept


def predict(net: keras.Model, images: Array) -> Array:
    """Predicted class ``(N,)`` of each image, by a network in inference mode."""
    classes: Array = ops.convert_to_numpy(ops.argmax(net(images, training=False), axis=-1))
    return classes


def hit_rate(hits: Array) -> float:
    """The share of ``True`` among booleans ``(N,)``."""
    return float(hits.mean())
