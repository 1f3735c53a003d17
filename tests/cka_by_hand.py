"""Minibatch CKA by the formulas of its paper, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hsic(first: Array, second: Array) -> float:
    """Equation 3 of arXiv:2010.15327, with its three sums."""
    n = len(first)
    k, m = first @ first.T, second @ second.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    vector = np.ones(n)
    middle = (vector @ k @ vector) * (vector @ m @ vector) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (vector @ k @ m @ vector)) / (n * (n - 3)))


def cka_by_hand(student: list[Array], teacher: list[Array], weights: list[float]) -> float:
    """Equation 2, with a weight for each batch."""
    batches = list(zip(student, teacher, strict=True))

    def mean(values: list[float]) -> float:
        return float(np.dot(weights, values) / np.sum(weights))

    both = mean([hsic(s, t) for s, t in batches])
    own = mean([hsic(s, s) for s, _ in batches]), mean([hsic(t, t) for _, t in batches])
    return both / np.sqrt(own[0] * own[1])
