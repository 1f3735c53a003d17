"""Formulas that several losses share: divergences of log-probabilities and of scores, the Huber function."""

from __future__ import annotations

from typing import Any

from keras import ops

# Replaces minus infinity: the difference of two infinite scores is NaN. Its softmax is 0 too.
LEAST_SCORE = -1e30


def bounded(scores: Any) -> Any:
    """Replace scores of minus infinity by a finite score whose softmax is 0 too.

    Args:
        scores: Any shape, float32 or float64.

    Returns:
        Same shape; a score that was minus infinity gets a gradient of 0.
    """
    return ops.maximum(scores, LEAST_SCORE)


def kl_from_logs(log_p: Any, log_q: Any, axis: int = -1) -> Any:
    """Kullback-Leibler divergence of two distributions given by their log-probabilities.

    Args:
        log_p: Log-probabilities of the first distribution, finite.
        log_q: Log-probabilities of the second, same shape.
        axis: Dimension of the outcomes.

    Returns:
        Divergence in nats, the shape without ``axis``.
    """
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=axis)


def softmax_divergence(student: Any, teacher: Any, axis: int = -1) -> Any:
    """Kullback-Leibler divergence of the student's softmax from the teacher's.

    Args:
        student: Scores of any shape; minus infinity is a probability of 0.
        teacher: Scores of the same shape.
        axis: Dimension of the softmax.

    Returns:
        Divergence in nats, the shape without ``axis``.
    """
    log_student, log_teacher = (ops.log_softmax(bounded(scores), axis=axis) for scores in (student, teacher))
    return kl_from_logs(log_teacher, log_student, axis)


def huber(difference: Any) -> Any:
    """The Huber function: half the square of a difference below 1, linear above.

    Args:
        difference: Any shape.

    Returns:
        Same shape.
    """
    size = ops.abs(difference)
    # min(|x|, 1) (|x| - min(|x|, 1) / 2) is both branches at once, without a square that could overflow
    short = ops.minimum(size, 1.0)
    return short * (size - 0.5 * short)
