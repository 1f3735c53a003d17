"""Formulas that several losses share: divergences of log-probabilities and of scores, the Huber function."""

from __future__ import annotations

from typing import Any

from keras import ops

# Two scores of minus infinity have no difference; the softmax of this one is 0 as well.
LEAST_SCORE = -1e30


def bounded(scores: Any) -> Any:
    """Scores of which none is minus infinity: the softmax of the least finite score is 0 as well.

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
    """Half the square of a difference below 1, and linear above.

    Args:
        difference: Any shape.

    Returns:
        Same shape.
    """
    size = ops.abs(difference)
    # min(|x|, 1) (|x| - min(|x|, 1) / 2) is both branches in one: no branch whose square could overflow
    short = ops.minimum(size, 1.0)
    return short * (size - 0.5 * short)
