"""Formulas on transformers' attention: student first, one value per example, no gradient into the teacher."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.chunks import by_examples
from lightning_distill.functional.inputs import Reduction, prepare, rows_mask
from lightning_distill.functional.kernels import softmax_divergence
from lightning_distill.functional.primitives import LEAST_SCORE, gram
from lightning_distill.functional.vectors import (
    mean_of_counted,
    over_examples,
    per_example,
    positions_mask,
    without,
)

__all__ = ["attention_kl", "attention_mse", "attention_relation"]

_MASKED = -100.0
_LEAST_PROBABILITY = 1e-6


def attention_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of the two models' attention scores, where masked ones count as zero.

    .. math:: \frac{1}{A L^2} \sum_{a,i,j} (m(S^s_{aij}) - m(S^t_{aij}))^2, \qquad
        m(x) = 0 \text{ if } x \le -100 \text{ else } x

    Scores, before the softmax, teach faster than probabilities do.

    Args:
        student: The student's scores, shape ``(N, A, L, L)`` for A heads.
        teacher: The teacher's scores, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Mean squared difference, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> attention_mse(torch.tensor([[[[1.0, -1e4]]]]), torch.tensor([[[[4.0, -1e4]]]]))
        tensor([4.5000])

    References:
        Jiao et al. 2020 (TinyBERT), equation 7, arXiv:1909.10351; the mask is that of the authors' code.
    """
    student, teacher, queries, keys = _scores(student, teacher, mask)
    student, teacher = (scores.masked_fill(scores <= _MASKED, 0.0) for scores in (student, teacher))
    if queries is None:
        return over_examples(per_example((student - teacher).square()), None, reduction)
    pairs = queries if keys is None else queries & keys
    values = mean_of_counted((student - teacher).square(), pairs.expand_as(student))
    return over_examples(values, queries, reduction)


def attention_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    from_scores: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's from the teacher's attention, averaged over heads and queries.

    .. math:: \frac{1}{A L} \sum_{a,i} \sum_j p^t_{aij} (\log p^t_{aij} - \log p^s_{aij})

    It compares where each query looks. Scores of minus infinity are allowed. Below a probability of 1e-6 the logarithm
    is replaced by its tangent, so that a probability of 0 has a gradient.

    Args:
        student: The student's scores before the softmax, or probabilities, shape ``(N, A, L, L)``, keys last.
        teacher: The teacher's, same shape.
        from_scores: Whether the tensors hold scores; False for probabilities, which Hugging Face models return.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If the tensors do not hold floating point numbers, or ``from_scores`` is not a bool.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> attention_kl(torch.tensor([[[[0.0, 1.0, 3.0]]]]), torch.tensor([[[[2.0, 1.0, 0.0]]]]))
        tensor([1.8226])

    References:
        Sun et al. 2020 (MobileBERT), equation 3, arXiv:2004.02984.
    """
    checks.boolean("from_scores", from_scores)
    student, teacher, queries, keys = _scores(student, teacher, mask)
    if from_scores:
        if keys is not None:  # a key of probability 0 in both models
            student, teacher = (torch.where(keys, scores, LEAST_SCORE) for scores in (student, teacher))
        values = softmax_divergence(student, teacher, dim=-1)
    else:
        logarithms = [_log(probabilities) for probabilities in (student, teacher)]
        values = (teacher * (logarithms[1] - logarithms[0])).sum(dim=-1)
    return _over_queries(values, queries, reduction)


def attention_relation(
    student: Tensor, teacher: Tensor, *, relation_heads: int, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Divergence of the two models' relations between the tokens, by queries, keys or values.

    .. math:: \frac{1}{A L} \sum_{a,i} \mathrm{KL}(R^t_{ai} \,\|\, R^s_{ai}), \qquad
        R_a = \mathrm{softmax}(X_a X_a^\top / \sqrt{d})

    X are the queries, the keys or the values, whose H numbers are split again into A relation heads of size d = H / A.
    The models' widths and numbers of heads may differ.

    Args:
        student: The student's vectors, shape ``(N, L, H_s)``, or ``(N, L, heads, d)`` with the heads side by side.
        teacher: The teacher's vectors, shape ``(N, L, H_t)`` or ``(N, L, heads, d)``.
        relation_heads: Number A of relation heads, a divisor of both widths.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If the tensors do not hold floating point numbers, or ``relation_heads`` is not an int.
        ValueError: If the tokens differ, or a width is not a multiple of ``relation_heads``.

    Example:
        >>> import torch
        >>> attention_relation(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0], [1.0]]]), relation_heads=1)
        tensor([0.0890])

    References:
        Wang et al. 2021 (MiniLMv2), equations 5 to 8, arXiv:2012.15828.
    """
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    student, teacher = (vectors.flatten(2) if vectors.ndim == 4 else vectors for vectors in (student, teacher))
    _check_shapes_and_heads(student, teacher, relation_heads)
    student, teacher = prepare(student, teacher)
    positions = positions_mask(mask, student)
    relations = functools.partial(_relations, relation_heads)
    vectors = [without(feature, positions) for feature in (student, teacher)]
    if positions is not None:
        vectors.append(positions)
    values = by_examples(relations, vectors, example_size=relation_heads * student.shape[1] ** 2)
    return over_examples(values, positions, reduction)


def check_heads(relation_heads: int) -> None:
    """Check that a number of relation heads is an int of at least 1.

    Args:
        relation_heads: The user's value.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1.
    """
    checks.integer("relation_heads", relation_heads)
    checks.at_least("relation_heads", relation_heads, 1)


def _check_shapes_and_heads(student: Tensor, teacher: Tensor, relation_heads: int) -> None:
    check_heads(relation_heads)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        expected = "`student` and `teacher` to have the shapes (N, L, H_s) and (N, L, H_t)"
        raise ValueError(checks.message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}"))
    for width in (student.shape[2], teacher.shape[2]):
        if width % relation_heads:
            raise ValueError(checks.message(f"`relation_heads` to divide the width {width}", f"{relation_heads=}"))


def _relations(relation_heads: int, student: Tensor, teacher: Tensor, positions: Tensor | None = None) -> Tensor:
    scores = []
    for vectors in (student, teacher):
        heads = vectors.reshape(*vectors.shape[:2], relation_heads, -1).transpose(1, 2)
        relation = gram(heads).div_(math.sqrt(heads.shape[3]))
        scores.append(relation if positions is None else torch.where(positions[:, None, None], relation, LEAST_SCORE))
    values = softmax_divergence(scores[0], scores[1], dim=-1)
    queries = None if positions is None else positions[:, None, :]
    return _over_queries(values, queries, "none")


def _scores(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both models' attention with zeros where it does not count, and which queries and keys do: (N, 1, L, 1), ..."""
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher)
    if mask is None:
        return student, teacher, None, None
    queries = rows_mask(mask, (student.shape[0], student.shape[-2]))[:, None, :, None]
    # Self-attention: a position that does not count as a query is padding as a key too.
    keys = queries.mT if mask.ndim == 2 and student.shape[-2] == student.shape[-1] else None
    pairs = queries if keys is None else queries & keys
    student, teacher = (torch.where(pairs, scores, 0.0) for scores in (student, teacher))
    return student, teacher, queries, keys


def _over_queries(values: Tensor, queries: Tensor | None, reduction: Reduction) -> Tensor:
    """Means over heads and the queries that count, of values of the shape (N, A, L)."""
    if queries is None:
        return over_examples(per_example(values), None, reduction)
    queries = queries.flatten(1)[:, None].expand_as(values)
    return over_examples(mean_of_counted(values, queries), queries, reduction)


def _log(probabilities: Tensor) -> Tensor:
    tangent = math.log(_LEAST_PROBABILITY) + (probabilities / _LEAST_PROBABILITY - 1)
    bounded = probabilities.clamp(min=_LEAST_PROBABILITY)
    return torch.where(probabilities < _LEAST_PROBABILITY, tangent, bounded.log())
