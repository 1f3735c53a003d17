"""Mixtures of several teachers' class scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.functional.primitives import bounded

__all__ = ["confidence_weights", "mean_logits", "mixture_logits"]


def confidence_weights(logits: Sequence[Any]) -> Any:
    r"""Weights of several teachers for each row, by their confidence.

    .. math:: w_k = \frac{\exp(-H(p_k))}{\sum_j \exp(-H(p_j))}, \qquad H(p) = -\sum_c p_c \log p_c, \quad
        p_k = \mathrm{softmax}(z_k)

    :math:`\exp(H)` is the perplexity, the number of classes that a teacher hesitates between: a teacher that hesitates
    between four classes gets a quarter of the weight of one that is sure.

    Args:
        logits: The scores of each of K teachers, all of the same shape ``(N, ..., C)``; minus infinity is a probability
            of 0.

    Returns:
        Shape ``(K, N, ...)``; the weights of a row sum to 1 over the teachers.

    Example:
        >>> sure, unsure = ops.array([[100.0, 0.0]]), ops.array([[0.0, 0.0]])
        >>> [round(float(weight[0]), 4) for weight in confidence_weights([sure, unsure])]
        [0.6667, 0.3333]

    References:
        Kwon et al. 2020, Adaptive Knowledge Distillation Based on Entropy (ICASSP): teachers of lower entropy have a
        larger share. The exponential is a choice of this library, defined for every entropy, 0 included.
    """
    logs = ops.log_softmax(bounded(_stacked(logits)), axis=-1)
    return ops.softmax(ops.sum(ops.exp(logs) * logs, axis=-1), axis=0)


def mixture_logits(logits: Sequence[Any], weights: Any, *, temperature: Any = 1.0) -> Any:
    r"""Logits whose softmax at a temperature is the weighted mean of the teachers' softened probabilities.

    .. math:: z = T \log \sum_k w_k \, \mathrm{softmax}(z_k / T)

    Args:
        logits: The scores of each of K teachers, all of the same shape ``(N, ..., C)``.
        weights: Shape ``(K,)``, or ``(K, N, ...)``; they sum to 1 over the teachers.
        temperature: Softening of the probabilities, greater than 0.

    Returns:
        Shape ``(N, ..., C)``, float32 or better.

    Example:
        >>> unsure, sure = ops.array([[0.0, 0.0]]), ops.array([[100.0, 0.0]])
        >>> [round(float(p), 2) for p in ops.softmax(mixture_logits([unsure, sure], ops.array([0.5, 0.5])))[0]]
        [0.75, 0.25]
    """
    scores = bounded(_stacked(logits))
    temperature = ops.cast(temperature, scores.dtype)
    logs = ops.log_softmax(scores / temperature, axis=-1)
    weights = _over(weights, logs)
    present = weights > 0  # the logarithm of a weight of 0 is minus infinity, whose products may be NaN
    weighted = ops.where(present, logs + ops.log(ops.where(present, weights, ops.ones_like(weights))), -float("inf"))
    return temperature * ops.logsumexp(weighted, axis=0)


def mean_logits(logits: Sequence[Any], weights: Any) -> Any:
    """The weighted mean of the teachers' logits.

    Args:
        logits: The scores of each of K teachers, all of the same shape ``(N, ..., C)``.
        weights: Shape ``(K,)``, or ``(K, N, ...)``.

    Returns:
        Shape ``(N, ..., C)``, float32 or better.

    Example:
        >>> mean = mean_logits([ops.array([[1.0, 0.0]]), ops.array([[3.0, 4.0]])], ops.array([0.25, 0.75]))
        >>> [float(score) for score in mean[0]]
        [2.5, 3.0]
    """
    scores = _stacked(logits)
    weights = _over(weights, scores)
    return ops.sum(ops.where(weights > 0, weights * scores, ops.zeros_like(scores)), axis=0)


def _stacked(logits: Sequence[Any]) -> Any:
    dtype = keras.backend.result_type(*(keras.backend.standardize_dtype(each.dtype) for each in logits), "float32")
    return ops.stack([ops.cast(each, dtype) for each in logits])


def _over(weights: Any, scores: Any) -> Any:
    weights = ops.cast(weights, scores.dtype)
    for _ in range(len(scores.shape) - len(weights.shape)):
        weights = ops.expand_dims(weights, axis=-1)
    return weights
