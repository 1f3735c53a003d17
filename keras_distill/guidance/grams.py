"""Gram matrices and fingerprints of features, on every backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

_CONSTANT = 1e-12  # of the sum of squares: below it the differences between examples are rounding errors


def gram(feature: Any, mask: Any = None) -> NDArray[np.float64]:
    """The Gram matrix of a feature's examples, each a vector of all its values.

    The mean over the examples is subtracted first, which does not change the similarity but keeps its digits. A feature
    that is the same for all examples has a matrix of zeros.

    Args:
        feature: Shape ``(n, ...)``.
        mask: The tokens that count, shape ``(n, L)``; read for features ``(n, L, C)``. A token's mean is taken over
            the examples that have it.

    Returns:
        Shape ``(n, n)``.

    Example:
        >>> gram(ops.convert_to_tensor([[1.0, 0.0], [3.0, 0.0]]))
        array([[ 1., -1.],
               [-1.,  1.]])
    """
    wide = _widened(feature)
    if mask is not None and len(wide.shape) == 3 and tuple(wide.shape[:2]) == tuple(mask.shape):
        counts = ops.cast(mask, "bool")[:, :, None]
        wide = ops.where(counts, wide, ops.zeros_like(wide))
        number = ops.maximum(ops.sum(ops.cast(counts, wide.dtype), axis=0), 1)
        mean = ops.sum(wide, axis=0) / number
        centred = ops.where(counts, wide - mean, ops.zeros_like(wide))
        centred = ops.reshape(centred, (wide.shape[0], -1))
    else:
        flat = ops.reshape(wide, (wide.shape[0], -1))
        mean = ops.mean(flat, axis=0)
        centred = flat - mean
    product = ops.convert_to_numpy(ops.matmul(centred, ops.transpose(centred))).astype("float64")
    constant = np.trace(product) <= _CONSTANT * len(product) * float(ops.sum(ops.square(mean)))
    return np.zeros_like(product) if constant else product


def fingerprints(feature: Any) -> NDArray[np.float64]:
    """A number for each example that tells other features apart, shape ``(n,)``.

    It is a projection on fixed directions, divided by the length of the feature.

    Args:
        feature: Shape ``(n, ...)``.
    """
    flat = ops.convert_to_numpy(_widened(feature)).reshape(len(feature), -1).astype("float64")
    lengths = np.maximum(np.linalg.norm(flat, axis=1), 1e-30)
    numbers: NDArray[np.float64] = flat @ np.cos(1.7 * np.arange(flat.shape[1])) / lengths
    return numbers


def _widened(feature: Any) -> Any:
    narrow = keras.backend.standardize_dtype(feature.dtype) in ("float16", "bfloat16")
    return ops.cast(feature, "float32") if narrow else feature
