"""Noise contrastive estimation between embeddings and remembered ones: student first, one value per example."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, reduced, rows_mask
from lightning_distill.functional.primitives import product, unit

__all__ = ["contrastive_representation"]


def contrastive_representation(
    student: Tensor,
    teacher: Tensor,
    *,
    student_entries: Tensor,
    teacher_entries: Tensor,
    size: int,
    normalizers: tuple[float, float] = (1.0, 1.0),
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Binary cross entropy of telling an example's own remembered embedding from those of other examples.

    .. math:: \sum_{(u, v)} \left( - \log h(u, v_0) - \sum_{k=1}^{K} \log (1 - h(u, v_k)) \right), \qquad
        h(u, v) = \frac{p}{p + K / M}, \quad p = \frac{1}{Z} \exp \left( \frac{u \cdot v}{T} \right)

    The sum is over two pairs: the student's embedding u with entries v of the teacher's memory, and the teacher's
    embedding with entries of the student's. The embeddings are divided by their lengths; the entries are used as they
    are. Both embeddings have a gradient, since the teacher's is the output of a learned map; the entries have none.

    Args:
        student: The student's embeddings, shape ``(N, D)``.
        teacher: The teacher's embeddings of the same examples, same shape.
        student_entries: For each example its own remembered embedding of the student, then those of K other examples,
            of length 1, shape ``(N, K + 1, D)``.
        teacher_entries: The same of the teacher, same shape.
        size: Number M of examples in the data set, at least 2.
        normalizers: The two constants Z, greater than 0: of the student's embedding, then of the teacher's.
        temperature: The temperature T, greater than 0.
        mask: True where an example counts, shape ``(N,)``; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats, shape ``(N,)``, summed over the K negatives.

    Raises:
        TypeError: If a tensor is not floating point, or a setting is not a number.
        ValueError: If the shapes do not fit, or a setting is out of its range.

    Example:
        >>> entries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> settings = {"student_entries": entries, "teacher_entries": entries, "size": 2, "temperature": 1.0}
        >>> contrastive_representation(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), **settings)
        tensor([3.5349])

    References:
        Tian et al. 2020 (CRD), equations 18 and 19, arXiv:1910.10699, where Z is 1. The authors' code has the constant
        Z of Wu et al. 2018, arXiv:1805.01978, and adds 1e-7 to the denominators.
    """
    checks.positive("temperature", temperature)
    checks.integer("size", size)
    checks.at_least("size", size, 2)
    for number in normalizers:
        checks.positive("normalizers", number)
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    checks.same_shape(student, teacher, remedy="Map both features to embeddings of one width.")
    if student.ndim != 2:
        raise ValueError(checks.message("embeddings of shape (N, D)", f"shape {tuple(student.shape)}"))
    for name, entries in (("student_entries", student_entries), ("teacher_entries", teacher_entries)):
        checks.floating(name, entries)
        fits = entries.ndim == 3 and (entries.shape[0], entries.shape[2]) == tuple(student.shape)
        if not fits or entries.shape[1] < 2:
            expected = f"`{name}` to hold an example's own entry and those of others, shape (N, K + 1, D)"
            raise ValueError(checks.message(expected, f"shape {tuple(entries.shape)}"))
    counts = None if mask is None else rows_mask(mask, tuple(student.shape[:1]))
    log_normalizers = [math.log(number) for number in normalizers]
    of_student = noise_contrast(
        contrast_scores(student, teacher_entries, temperature, counts), log_normalizers[0], size
    )
    of_teacher = noise_contrast(
        contrast_scores(teacher, student_entries, temperature, counts), log_normalizers[1], size
    )
    return reduced(of_student + of_teacher, counts, reduction)


def contrast_scores(embedding: Tensor, entries: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
    """Products of embeddings of length 1 with remembered ones, divided by the temperature.

    Args:
        embedding: Shape ``(N, D)``.
        entries: Shape ``(N, K + 1, D)``; they get no gradient.
        temperature: Greater than 0.
        counts: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        Shape ``(N, K + 1)``, in float32 or better; 0 for examples that do not count.
    """
    dtype = torch.promote_types(torch.promote_types(embedding.dtype, entries.dtype), torch.float32)
    embedding = embedding.to(dtype) if counts is None else torch.where(counts[:, None], embedding.to(dtype), 0.0)
    return product(entries.detach().to(dtype), unit(embedding, 1)[:, :, None])[:, :, 0] / temperature


def noise_contrast(scores: Tensor, log_normalizer: Tensor | float, size: int) -> Tensor:
    """Binary cross entropy of the first score being the example's own and the others being noise.

    Args:
        scores: The result of :func:`contrast_scores`.
        log_normalizer: Logarithm of the constant Z, a scalar.
        size: Number of examples in the data set.

    Returns:
        Shape ``(N,)``.
    """
    # log p - log (K / M), the logits of h
    logits = scores - log_normalizer - math.log((scores.shape[1] - 1) / size)
    return F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(dim=1)


def log_partitions(scores: Tensor, size: int) -> Tensor:
    """Logarithm of Z as each example estimates it: the mean of its exponentials times the number of examples.

    Args:
        scores: The result of :func:`contrast_scores`.
        size: Number of examples in the data set.

    Returns:
        Shape ``(N,)``, without a gradient.
    """
    return scores.detach().logsumexp(dim=1) - math.log(scores.shape[1]) + math.log(size)


def log_mean(logarithms: Tensor, counts: Tensor | None = None) -> Tensor:
    """Logarithm of the mean of numbers that are given as logarithms.

    Args:
        logarithms: Shape ``(N, ...)``.
        counts: True where a number counts, shape ``(N,)``; None where all count.

    Returns:
        The logarithms without the first dimension; minus infinity where none counts.
    """
    number = torch.tensor(len(logarithms), device=logarithms.device)
    if counts is not None:
        others = (~counts).view(-1, *[1] * (logarithms.ndim - 1))
        logarithms, number = logarithms.masked_fill(others, -torch.inf), counts.sum()
    return logarithms.logsumexp(dim=0) - number.clamp(min=1).log()


def other_rows(index: Tensor, count: int, size: int, key: Tensor) -> Tensor:
    """For each row of the data a number of other rows, drawn at random with replacement.

    The draw is a function of the key, the same on every device: it needs no generator, whose state would have to be
    saved.

    Args:
        index: The rows, int64, shape ``(N,)``.
        count: How many others each row gets.
        size: Number of rows of the data, at least 2.
        key: An int64 scalar on the device of the rows.

    Returns:
        Rows, int64, shape ``(N, count)``.
    """
    places = torch.arange(len(index) * count, device=index.device).view(len(index), count)
    steps = 1 + (scattered(scattered(key) + places) & _POSITIVE) % (size - 1)
    return (index[:, None] + steps) % size


# The constants of SplitMix64 (Steele, Lea and Flood 2014), as signed numbers of 64 bits.
_STRIDE, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_POSITIVE = 2**63 - 1


def scattered(numbers: Tensor) -> Tensor:
    """A hash of each int64 number, such that the hashes of successive numbers look random."""
    mixed = numbers * _STRIDE
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # the bits that the sign is copied into are taken away again
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return mixed
