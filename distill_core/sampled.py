"""Random draws of classes: an unbiased and sparse estimate of a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from distill_core.columns import Array, Codec, Column
from distill_core.packed import IndexPacking

NOTHING: Final = -1e4  # the logarithm of probability 0, in numbers that have no infinity
_BLOCK: Final = 2**22  # numbers that are drawn from at a time
_STEP: Final = 1 / 16  # in nats, of the levels of the stored probabilities
_ZERO: Final = 255  # the level of probability 0


class SampledCodec(Codec):
    r"""K distinct classes drawn from each row's distribution, with importance weights: an unbiased estimate of it.

    Class c is drawn with probability :math:`\pi_c = \min(1, p_c / \tau)`, where :math:`\tau` makes these sum to K, and
    stored with the probability :math:`p_c / \pi_c`: likely classes are always drawn and exact, others stand for all
    that are like them. The mean of the estimates over the draws is p. Their probabilities sum to 1.

    A class index takes ``ceil(log2 C)`` bits, and a probability 8 bits in steps of 1/16 nat, rounded up or down at
    random so that the mean stays the same. The likeliest class comes first; its probability is what is left by the
    others.

    Args:
        shape: Shape of one row, ``(..., C)``.
        draws: How many classes K are drawn, 2 to C - 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> codec, logits = SampledCodec((5,), 3), np.log(np.float32([[0.05, 0.6, 0.05, 0.25, 0.05]]))
        >>> draws = [codec.decode(codec.encode(logits, (seed,))) for seed in range(4000)]
        >>> estimates = np.zeros((4000, 5))
        >>> for estimate, (indices, logs, _) in zip(estimates, draws):
        ...     estimate[indices[0]] = np.exp(logs[0])
        >>> estimates.mean(0).round(2), int((estimates > 0).sum(1).max())
        (array([0.05, 0.6 , 0.05, 0.25, 0.05]), 3)

    References:
        Anshumann et al. (2025). Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, arXiv:2503.16870;
        deviation: the paper draws with replacement and stores counts; distinct draws with a threshold have less
        variance at the same size.
    """

    def __init__(self, shape: tuple[int, ...], draws: int) -> None:
        *outer, classes = shape
        if type(draws) is not int or not 2 <= draws < classes:
            raise ValueError(
                f"Expected `sampled` to be 2 to {classes - 1}, fewer than the classes, but got sampled={draws!r}."
            )
        self.draws, self.classes = draws, classes
        self._indices = IndexPacking(tuple(outer), classes, draws)
        self.columns = {"values": Column((*outer, draws - 1), "uint8"), **self._indices.columns}
        self._probabilities = np.exp(-_STEP * np.arange(_ZERO + 1, dtype="float32"))
        self._probabilities[_ZERO] = 0.0

    def encode(self, values: Array, seed: Sequence[int] = ()) -> dict[str, Array]:
        """The drawn classes, and the levels of their probabilities.

        Args:
            values: Logits, shape ``(N, ..., C)``.
            seed: Seed of the draws.

        Returns:
            The stored arrays.

        Raises:
            ValueError: If a logit is not finite.
        """
        values, generator = np.asarray(values), np.random.default_rng([0, *seed])
        rows = values.reshape(-1, self.classes)
        drawn, levels = np.empty((len(rows), self.draws), "int64"), np.empty((len(rows), self.draws - 1), "uint8")
        size = max(1, _BLOCK // self.classes)
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            shifted, total = log_softmax(rows[block])
            drawn[block], weights = self._draw(np.exp(shifted - total, dtype="float64"), generator)
            levels[block] = _rounded(weights[:, 1:], generator)
        outer = values.shape[:-1]
        return {
            "values": levels.reshape(*outer, -1),
            **self._indices.pack(drawn.reshape(*outer, -1)),
        }

    def decode(self, stored: dict[str, Array]) -> tuple[Array, Array, Array]:
        """The drawn classes, the logarithms of their probabilities, and that of all other classes, which is 0.

        Args:
            stored: The stored arrays of N rows.

        Returns:
            Class indices, int64, and log-probabilities, float32, both ``(N, ..., K)``; the logarithm of probability 0,
            ``(N, ..., 1)``, a large negative number.

        Raises:
            ValueError: If an index is too large.
        """
        indices = self._indices.unpack(stored)
        probabilities = np.empty(indices.shape, "float32")
        probabilities[..., 1:] = self._probabilities[np.asarray(stored["values"])]
        probabilities[..., 0] = 1.0 - probabilities[..., 1:].sum(-1)
        known = probabilities > 0
        logs = np.log(probabilities, out=np.full(indices.shape, NOTHING, "float32"), where=known)
        return indices, logs, np.full((*indices.shape[:-1], 1), NOTHING, "float32")

    def _draw(self, p: Array, generator: np.random.Generator) -> tuple[Array, Array]:
        """The drawn classes of each row, the likeliest first, and their probabilities, both ``(N, K)``."""
        k = self.draws
        top = np.argpartition(p, -k, axis=-1)[:, -k:]
        top = np.take_along_axis(top, np.argsort(-np.take_along_axis(p, top, -1), axis=-1, kind="stable"), -1)
        largest = np.take_along_axis(p, top, -1)
        np.put_along_axis(p, top, 0.0, -1)
        # the mass without the m likeliest, for m = 0 to K - 1: sums of positive numbers lose no digits
        rest = p.sum(-1, keepdims=True) + np.cumsum(largest[:, ::-1], -1)[:, ::-1]
        thresholds = rest / (k - np.arange(k))
        certain = np.argmax(largest <= thresholds, -1)  # the number of classes that are always drawn
        drawn, weights = top.copy(), largest.copy()
        offsets = generator.random(len(p))
        for row, number in enumerate(certain):
            threshold = thresholds[row, number]
            p[row, top[row, number:]] = largest[row, number:]
            ends = p[row].cumsum()
            points = (offsets[row] + np.arange(k - number)) * (ends[-1] / (k - number))
            places = ends.searchsorted(points, side="right")
            # by rounding a class may be drawn twice, and where all others have probability 0, none is
            if threshold > 0 and places[-1] < self.classes and (np.diff(places) > 0).all():
                drawn[row, number:], weights[row, number:] = places, threshold
        # a class that is always drawn, else any: all weights are the same
        first = np.argmax(weights, -1)[:, None]
        for array in (drawn, weights):
            head = np.take_along_axis(array, first, -1)
            np.put_along_axis(array, first, array[:, :1].copy(), -1)
            array[:, :1] = head
        return drawn, weights


def _rounded(probabilities: Array, generator: np.random.Generator) -> Array:
    """Levels of probabilities, rounded up or down at random so that their mean is the probability."""
    with np.errstate(divide="ignore"):
        position = -np.log(probabilities) / _STEP
    upper = np.floor(position).clip(0, _ZERO - 1)  # the level of the next larger probability
    high = np.exp(-_STEP * upper)
    low = np.where(upper + 1 < _ZERO, np.exp(-_STEP * (upper + 1)), 0.0)
    takes_low = generator.random(probabilities.shape) * (high - low) >= probabilities - low
    levels: Array = (upper + takes_low).astype("uint8")
    return levels


def log_softmax(values: Array) -> tuple[Array, Array]:
    """Logits minus the largest of their row, and the logarithm of the sum of their exponentials.

    Args:
        values: Logits, shape ``(N, ..., C)``.

    Returns:
        Two arrays, ``(N, ..., C)`` float32 and ``(N, ..., 1)`` float64, whose difference is the log-probabilities.

    Raises:
        ValueError: If a logit is not finite.
    """
    logits = np.asarray(values, dtype="float32")
    if not np.isfinite(logits).all():
        raise ValueError(
            "Expected the teacher's outputs to be finite, but some are not. Check the teacher for NaN and infinity."
        )
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1, keepdims=True, dtype="float64"))
    return shifted, total


def check_logits(values: Array) -> None:
    """Check that outputs are not probabilities, whose logarithms would be stored as if they were those of logits.

    Args:
        values: The outputs of some samples, shape ``(N, ..., C)``.

    Raises:
        ValueError: If every row is positive and sums to 1, which does not happen to logits by chance.
    """
    if values.size and (values >= 0).all() and (np.abs(values.sum(-1) - 1) < 1e-4).all():
        raise ValueError(
            "Expected the teacher's outputs to be logits, but got probabilities: every row sums to 1. Leave out the"
            " last softmax, or store their logarithms."
        )
