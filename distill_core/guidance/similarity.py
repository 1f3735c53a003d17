"""Similarity of layers: linear CKA over minibatches, with the unbiased estimator of HSIC."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FEWEST = 4  # examples in a batch: the estimator divides by n - 3


class MinibatchCKA:
    r"""Linear CKA of every layer of one network with every layer of another, batch by batch.

    .. math:: \mathrm{CKA}_{ij} = \frac{\sum_b w_b \mathrm{HSIC}_1(K_i^b, L_j^b)}
        {\sqrt{\sum_b w_b \mathrm{HSIC}_1(K_i^b, K_i^b)} \sqrt{\sum_b w_b \mathrm{HSIC}_1(L_j^b, L_j^b)}}

    The unbiased estimate of HSIC for n examples is

    .. math:: \mathrm{HSIC}_1(K, L) = \frac{1}{n (n - 3)} \sum_{i \ne j} \tilde K_{ij} \tilde L_{ij}

    with Gram matrices that are centred without their diagonals, which is equal to the usual formula with three sums. It
    keeps one number for each pair of layers, whatever the number of batches.

    Args:
        student_layers: Names of the student's layers, for messages.
        teacher_layers: Names of the teacher's layers.

    Example:
        >>> gram = np.outer([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0])[None]
        >>> cka = MinibatchCKA(["a"], ["b"])
        >>> cka.add(gram, 9 * gram)
        >>> float(cka.matrix().round(6)[0, 0])
        1.0

    References:
        Nguyen et al. (2020). Do Wide and Deep Networks Learn the Same Things? arXiv:2010.15327, equations 2 and 3.
        There all batches have one size and one weight; here a batch counts by its number of examples. Szekely and
        Rizzo (2014), arXiv:1310.2926: the centred matrices.
    """

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str]) -> None:
        self._names = {"student": list(student_layers), "teacher": list(teacher_layers)}
        students, teachers = len(student_layers), len(teacher_layers)
        self._both = np.zeros((students, teachers))
        self._own = {"student": np.zeros(students), "teacher": np.zeros(teachers)}
        self.examples = self.batches = 0

    def add(self, student: Array, teacher: Array, weight: float | None = None) -> None:
        """Add a batch.

        Args:
            student: Gram matrices of the student's layers, shape ``(S, n, n)``.
            teacher: Gram matrices of the teacher's layers, shape ``(T, n, n)``.
            weight: Weight of the batch; ``None`` is its number of examples n.

        Raises:
            ValueError: If the batch has too few examples, or a matrix holds a number that is not finite.
        """
        size = student.shape[-1]
        check_size(size)
        weight = float(size) if weight is None else weight
        vectors = {}
        for who, grams in (("student", student), ("teacher", teacher)):
            for name, gram in zip(self._names[who], grams, strict=True):
                if not np.isfinite(gram).all():
                    raise ValueError(
                        f"Expected the {who}'s layers to return finite numbers, but got NaN or infinity from {name!r}."
                        " Check the network's weights and inputs."
                    )
            vectors[who] = _centred(grams)
            self._own[who] += weight / (size * (size - 3)) * (vectors[who] ** 2).sum(1)
        self._both += weight / (size * (size - 3)) * vectors["student"] @ vectors["teacher"].T
        self.examples, self.batches = self.examples + size, self.batches + 1

    def varies(self, who: str) -> NDArray[np.bool_]:
        """Whether the layers of the student or the teacher differ between examples, so that they have a similarity."""
        return self._own[who] > 0

    def matrix(self) -> Array:
        """The similarities, shape ``(S, T)``; NaN for layers that are the same for all examples.

        Estimates may be a little below 0 or, on very few examples, above 1.
        """
        norms = np.sqrt(np.outer(self._own["student"], self._own["teacher"]))
        return np.divide(self._both, norms, out=np.full_like(norms, np.nan), where=norms > 0)


def _centred(grams: Array) -> Array:
    """Matrices with diagonals of 0 whose rows sum to 0, as vectors ``(L, n * n)``."""
    size = grams.shape[-1]
    apart = 1.0 - np.eye(size)
    grams = grams * apart
    rows = grams.sum(-1, keepdims=True) / (size - 2)
    whole = grams.sum((-2, -1), keepdims=True) / ((size - 1) * (size - 2))
    centred: Array = (grams - rows - rows.swapaxes(-2, -1) + whole) * apart
    return centred.reshape(len(grams), -1)


def check_size(size: int) -> None:
    """Check that a batch has enough examples.

    Args:
        size: Number of examples.

    Raises:
        ValueError: If there are too few for the estimate.

    Example:
        >>> check_size(4)
    """
    if size < FEWEST:
        raise ValueError(
            f"Expected every batch to have at least {FEWEST} examples, but got one with {size}. Pass larger batches"
            " (with drop_last=True, if the last one is smaller): the estimate of similarity needs them."
        )
