"""Formulas on transformers' attention: student first, one value per example, no gradient into the teacher."""

from __future__ import annotations

import functools
import math
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_equal
from keras_distill.functional.primitives import softmax_divergence
from keras_distill.functional.vectors import by_rows, flattened, gram, per_example

__all__ = ["attention_kl", "attention_mse", "attention_relation"]

_MASKED = -100.0
_LEAST_PROBABILITY = 1e-6


def attention_mse(student: Any, teacher: Any) -> Any:
    r"""Mean squared difference of the two models' attention scores, where masked ones count as zero.

    .. math:: \frac{1}{A L^2} \sum_{a,i,j} (m(S^s_{aij}) - m(S^t_{aij}))^2, \qquad
        m(x) = 0 \text{ if } x \le -100 \text{ else } x

    Scores, before the softmax, teach faster than probabilities do.

    Args:
        student: The student's scores, shape ``(N, A, L, L)`` for A heads.
        teacher: The teacher's scores, same shape.

    Returns:
        Mean squared difference, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors.
        ValueError: If the shapes differ.

    Example:
        >>> float(attention_mse([[[[1.0, -1e4]]]], [[[[4.0, -1e4]]]])[0])
        4.5

    References:
        Jiao et al. 2020 (TinyBERT), equation 7, arXiv:1909.10351; the mask is that of the authors' code.
    """
    student, teacher = prepare_equal(student, teacher)
    student, teacher = (ops.where(scores > _MASKED, scores, ops.zeros_like(scores)) for scores in (student, teacher))
    return per_example(ops.square(student - teacher))


def attention_kl(student: Any, teacher: Any, *, from_scores: bool = True) -> Any:
    r"""Kullback-Leibler divergence of the student's from the teacher's attention, averaged over heads and queries.

    .. math:: \frac{1}{A L} \sum_{a,i} \sum_j p^t_{aij} (\log p^t_{aij} - \log p^s_{aij})

    It compares where each query looks. Scores of minus infinity are allowed. Below a probability of 1e-6 the logarithm
    is replaced by its tangent, so that a probability of 0 has a gradient.

    Args:
        student: The student's scores before the softmax, or probabilities, shape ``(N, A, L, L)``, keys last.
        teacher: The teacher's, same shape.
        from_scores: Whether the tensors hold scores; False for probabilities, which Keras' ``MultiHeadAttention``
            returns.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If the tensors do not hold floating point numbers, or ``from_scores`` is not a bool.
        ValueError: If the shapes differ.

    Example:
        >>> round(float(attention_kl([[[[0.0, 1.0, 3.0]]]], [[[[2.0, 1.0, 0.0]]]])[0]), 4)
        1.8226

    References:
        Sun et al. 2020 (MobileBERT), equation 3, arXiv:2004.02984.
    """
    checks.boolean("from_scores", from_scores)
    student, teacher = prepare_equal(student, teacher)
    if from_scores:
        return per_example(softmax_divergence(student, teacher))
    logarithms = [_log(probabilities) for probabilities in (student, teacher)]
    return per_example(ops.sum(teacher * (logarithms[1] - logarithms[0]), axis=-1))


def attention_relation(student: Any, teacher: Any, *, relation_heads: int) -> Any:
    r"""Divergence of the two models' relations between the tokens, by queries, keys or values.

    .. math:: \frac{1}{A L} \sum_{a,i} \mathrm{KL}(R^t_{ai} \,\|\, R^s_{ai}), \qquad
        R_a = \mathrm{softmax}(X_a X_a^\top / \sqrt{d})

    X are the queries, the keys or the values, whose H numbers are split again into A relation heads of size d = H / A.
    The models' widths and numbers of heads may differ.

    Args:
        student: The student's vectors, shape ``(N, L, H_s)``, or ``(N, L, heads, d)`` with H_s = heads d.
        teacher: The teacher's vectors, shape ``(N, L, H_t)`` or ``(N, L, heads, d)``.
        relation_heads: Number A of relation heads, a divisor of both widths.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If the tensors do not hold floating point numbers, or ``relation_heads`` is not an int.
        ValueError: If the tokens differ, or a width is not a multiple of ``relation_heads``.

    Example:
        >>> round(float(attention_relation([[[1.0], [0.0]]], [[[2.0], [1.0]]], relation_heads=1)[0]), 4)
        0.089

    References:
        Wang et al. 2021 (MiniLMv2), equations 5 to 8, arXiv:2012.15828.
    """
    check_heads(relation_heads)
    student, teacher = prepare(student, teacher)
    student, teacher = _joined_heads(student), _joined_heads(teacher)
    student_shape, teacher_shape = tuple(student.shape), tuple(teacher.shape)
    if len(student_shape) != 3 or len(teacher_shape) != 3 or checks.shapes_differ(student_shape[:2], teacher_shape[:2]):
        expected = "`student` and `teacher` to have the shapes (N, L, H_s) and (N, L, H_t), or (N, L, heads, d)"
        raise ValueError(checks.message(expected, f"{student_shape} and {teacher_shape}"))
    for width in (student_shape[2], teacher_shape[2]):
        if width % relation_heads:
            raise ValueError(checks.message(f"`relation_heads` to divide the width {width}", f"{relation_heads=}"))
    relations = functools.partial(_relations, relation_heads)
    return by_rows(relations, (student, teacher), row_size=relation_heads * ops.shape(student)[1] ** 2)


def check_heads(relation_heads: int) -> None:
    """Check the number of relation heads.

    Args:
        relation_heads: The user's value.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1.
    """
    checks.integer("relation_heads", relation_heads)
    checks.at_least("relation_heads", relation_heads, 1)


def _joined_heads(vectors: Any) -> Any:
    """Vectors (N, L, H), also of the (N, L, heads, d) that Keras' attention layers make."""
    return flattened(vectors, 2) if len(vectors.shape) == 4 else vectors


def _relations(relation_heads: int, student: Any, teacher: Any) -> Any:
    scores = []
    for vectors in (student, teacher):
        size = vectors.shape[2] // relation_heads
        heads = ops.reshape(vectors, (*ops.shape(vectors)[:2], relation_heads, size))
        scores.append(gram(ops.transpose(heads, (0, 2, 1, 3))) / math.sqrt(size))
    return per_example(softmax_divergence(scores[0], scores[1]))


def _log(probabilities: Any) -> Any:
    tangent = math.log(_LEAST_PROBABILITY) + (probabilities / _LEAST_PROBABILITY - 1)
    bounded = ops.maximum(probabilities, _LEAST_PROBABILITY)
    return ops.where(probabilities < _LEAST_PROBABILITY, tangent, ops.log(bounded))
