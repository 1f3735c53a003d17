"""The table of all losses in Keras: the same data, networks and recipe as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_distill
from benchmarks.quality.data import Examples
from benchmarks.quality.methods import table

BATCH = 100


def convolutional(
    shape: tuple[int, int], early: list[int], deep: list[int], kernel: tuple[int, int], dropout: float = 0.0
) -> keras.Model:
    """:class:`~benchmarks.quality.networks.Convolutional` in Keras: logits (N, 10) of images (N, H, W, 1)."""
    layers = keras.layers
    x = inputs = keras.Input((*shape, 1))
    shrink = (min(2, kernel[0]), 2)  # signals are images with one row
    for stage, widths in (("early", early), ("deep", deep)):
        shrinks = 0 if stage == "deep" else len(widths) - 1
        for place, width in enumerate(widths):
            last = place == len(widths) - 1
            strides = shrink if place == shrinks else (1, 1)
            x = layers.Conv2D(width, kernel, strides, "same", use_bias=False)(x)
            name = f"{stage}_before_relu" if last else None
            x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)
            x = layers.ReLU(name=stage if last else None)(x)
    x = layers.GlobalAveragePooling2D(name="pooled")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Dropout(dropout)(x)))


def settings(lr: float, steps: int) -> dict[str, Any]:
    """The arguments of ``compile``: Adam on a cosine with a warm-up."""
    warmup = 3 * steps // 10
    cosine = keras.optimizers.schedules.CosineDecay(
        lr / 25, steps - warmup, warmup_target=lr, warmup_steps=max(warmup, 1)
    )
    return {
        "optimizer": keras.optimizers.Adam(cosine),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        "jit_compile": False,  # compiling takes longer than these trainings
    }


def channels_last(examples: Examples) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (N, H, W, 1) and classes (N,), to train and to test."""
    return [
        (images.numpy().transpose(0, 2, 3, 1), classes.numpy()) for images, classes in (examples.train, examples.test)
    ]


def trained(
    train: tuple[np.ndarray, np.ndarray], kernel: tuple[int, int], epochs: int, lr: float, file: Path
) -> keras.Model:
    """The teacher: trained once with seed 0, then read from its file."""
    keras.utils.set_random_seed(0)
    teacher = convolutional(train[0].shape[1:3], [32, 32], [64, 64], kernel, 0.3)
    if file.exists():
        teacher.load_weights(file)
        return teacher
    teacher.compile(**settings(lr, epochs * (len(train[0]) // BATCH)))
    teacher.fit(*train, BATCH, epochs, verbose=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    teacher.save_weights(file)
    return teacher


def loss_table(
    examples: Callable[[], Examples],
    kernel: tuple[int, int],
    teacher_epochs: int,
    lr: float,
    epochs: int,
    folder: Path,
) -> dict[str, Any]:
    """All losses with one recipe: the task's loss plus one term, whose weight is balanced."""
    train, test = channels_last(examples())
    teacher = trained(train, kernel, teacher_epochs, lr, folder / "teacher.weights.h5")
    losses = table(keras_distill, "balanced", ("deep_before_relu", "deep_before_relu"))
    return {
        "student": partial(convolutional, train[0].shape[1:3], [8], [12], kernel),
        "data": (train, test),
        "teacher": teacher,
        "methods": {name: {"terms": make()} for name, make in losses.items()},
        "compile": partial(settings, 1e-2),
        "fit": {"epochs": epochs, "batch_size": BATCH, "validation_freq": 5},
    }
