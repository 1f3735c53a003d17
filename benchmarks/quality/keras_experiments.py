"""The table of all losses in Keras: the same data, networks and recipe as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_distill
from benchmarks.quality import data
from benchmarks.quality.classifier import UNLABELLED
from benchmarks.quality.methods import table

BATCH = 100
Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, 1) and classes (N,)


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
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=UNLABELLED),
        "metrics": ["accuracy"],
        "jit_compile": False,  # compiling takes longer than these trainings
    }


def channels_last(examples: data.Examples) -> tuple[Arrays, Arrays]:
    """The arrays to train on and to test on."""
    train, test = (
        (images.numpy().transpose(0, 2, 3, 1), classes.numpy()) for images, classes in (examples.train, examples.test)
    )
    return train, test


def few_labels(examples: data.Examples, a_class: int, seed: int) -> tuple[Arrays, Arrays]:
    """The arrays of a run where only some labels of each class are known."""
    (images, classes), test = channels_last(examples)
    places = data.few_labels(examples, a_class, seed).numpy()
    labels = np.full_like(classes, UNLABELLED)
    labels[places] = classes[places]
    return (images, labels), test


def trained(train: Arrays, kernel: tuple[int, int], epochs: int, lr: float, file: Path) -> keras.Model:
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
    examples: Callable[[], data.Examples],
    kernel: tuple[int, int],
    teacher_epochs: int,
    lr: float,
    epochs: int,
    folder: Path,
    labels: int | None = None,
) -> dict[str, Any]:
    """All losses with one recipe: the task's loss plus one term, whose weight is balanced.

    Args:
        labels: How many labels of each class the student knows; None for all.
    """
    train, test = channels_last(examples())
    teacher = trained(train, kernel, teacher_epochs, lr, folder / "teacher.weights.h5")
    losses = table(keras_distill, "balanced", ("deep_before_relu", "deep_before_relu"))
    return {
        "student": partial(convolutional, train[0].shape[1:3], [8], [12], kernel),
        "data": (train, test) if labels is None else partial(few_labels, examples(), labels),
        "teacher": teacher,
        "methods": {name: {"terms": make()} for name, make in losses.items()},
        "compile": partial(settings, 1e-2),
        "fit": {"epochs": epochs, "batch_size": BATCH, "validation_freq": 5},
    }
