"""Maps with labels and a mask, whose positions count in part: for the Keras tests of `mask=` and `ignore_index=`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

_RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = (_RANDOM.normal(size=(2, 4, 6, 5)).astype("float32") for _ in range(2))
FINE = _RANDOM.integers(0, 5, (2, 8, 12))
FINE[:, 2:7, 3:8] = 255  # void
MASK = _RANDOM.integers(0, 2, (2, 4, 6)).astype("bool")
INPUTS = {"images": _RANDOM.normal(size=(2, 4, 6, 3)).astype("float32"), "mask": MASK}


@keras.saving.register_keras_serializable(package="counted_maps")
def marked(inputs: Any) -> Any:
    """The mask of the inputs."""
    return inputs["mask"]


@keras.saving.register_keras_serializable(package="counted_maps")
def no_task(y_true: Any, y_pred: Any) -> Any:
    """Labels reach a model only beside a loss on them."""
    return 0.0 * ops.mean(y_pred, axis=(1, 2, 3))
