"""Teachers of several kinds in one list: a cache and the student itself beside networks. The last rows of the table."""

from __future__ import annotations

import tempfile
from typing import Any

import keras
from keras import ops
from pairs.keras_dense import BATCH, EPOCHS, FEATURES, TOGETHER
from pairs.keras_table import Feature, X, inner, kl, teacher_logits

from keras_distill import FeatureDistillation, LogitsDistillation, TeacherCache

__all__ = ["BATCH", "EPOCHS", "FEATURES", "TOGETHER"]
_FOLDERS: list[Any] = []  # removed when the process ends


def with_cache(held: list[keras.Model]) -> list[Any]:
    """The first network, and the outputs and features of the second one in a cache."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    hidden, logits = (ops.convert_to_numpy(part) for part in inner(held[1], X, "hidden"))
    arrays = {"output": logits, "hidden": hidden}
    return [held[0], TeacherCache.from_arrays(arrays, _FOLDERS[-1].name, inputs=X, dtype="float32")]


@keras.saving.register_keras_serializable(package="pairs")
def seeded(student: Any, teacher: Any) -> keras.layers.Layer:
    """An adapter with the same weights whenever it is made: a model makes it in its first step, as it has a cache."""
    return keras.layers.Dense(teacher[-1], kernel_initializer="identity", dtype="float32")


def beside_a_cache(twin: Any, x: Any, y: Any, step: float) -> Any:
    """A quarter of the first teacher's losses and three quarters of the second's, with an adapter for each."""
    hidden, z = inner(twin.student, x, "hidden")
    total = 0.0
    for share, adapter, model in zip((0.25, 0.75), twin.terms[1].adapters, twin.held.models, strict=True):
        target, logits = inner(model, x, "hidden")
        total = total + share * (ops.mean(kl(z, logits)) + 2.0 * ops.mean(ops.square(adapter(hidden) - target)))
    return total


@keras.saving.register_keras_serializable(package="pairs")
def mirrored(inputs: Any) -> Any:
    return -1.0 * inputs


def beside_itself(twin: Any, x: Any, y: Any, step: float) -> Any:
    """Half of the divergence to the student's own answer to other inputs, and half of that to a network's answer."""
    z, own = twin.student(x), ops.stop_gradient(twin.student(-1.0 * x))
    return (ops.mean(kl(z, own)) + ops.mean(kl(z, teacher_logits(twin, -1.0 * x)))) / 2


TEACHERS = {
    "a cache beside a network": Feature(
        lambda: [LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=2.0, adapter=seeded)],
        beside_a_cache, teachers=2, widths=(6, 8), teacher=with_cache, cached=True,
        settings={"teacher_weights": [1.0, 3.0]},
    ),
    "the student itself beside a network": Feature(
        lambda: [LogitsDistillation()], beside_itself, itself=True, settings={"teacher_inputs": mirrored}
    ),
}  # fmt: skip
FEATURES.update(TEACHERS)
