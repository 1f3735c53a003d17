"""Formulas on the scores of a query's candidates: student first, one value per query, no gradient into the teacher."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_number
from keras_distill.functional.primitives import softmax_divergence

__all__ = ["listwise_kl", "margin_mse"]

_SCORES = ("student_scores", "teacher_scores")


def margin_mse(student_scores: Any, teacher_scores: Any) -> Any:
    r"""Mean squared difference of the two models' margins between the positive candidate and the negative ones.

    .. math:: \frac{1}{K - 1} \sum_{i=1}^{K-1} \left( (s^s_0 - s^s_i) - (s^t_0 - s^t_i) \right)^2

    Only margins are compared: the two models' scores may differ by a number for each query.

    Args:
        student_scores: Scores of each query's K candidates, the positive one first, shape ``(N, K)``, K of 2 or more.
        teacher_scores: The teacher's scores for the same candidates, same shape.

    Returns:
        Mean squared difference, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors.
        ValueError: If the shapes differ, are not ``(N, K)``, or there are fewer than two candidates.

    Example:
        >>> float(margin_mse([[3.0, 1.0, 0.0]], [[9.0, 4.0, 6.0]])[0])
        4.5

    References:
        Hofstaetter et al. 2020, arXiv:2010.02666, with one negative candidate; deviation: the mean over
        several, as in published code.
    """
    student, teacher = _prepare_scores(student_scores, teacher_scores)
    apart = student - teacher
    return ops.mean(ops.square(apart[:, :1] - apart[:, 1:]), axis=1)


def listwise_kl(
    student_scores: Any, teacher_scores: Any, *, student_temperature: Any = 1.0, teacher_temperature: Any = 1.0
) -> Any:
    r"""Kullback-Leibler divergence between the two models' softmaxes over the candidates of a query.

    .. math:: T_s^2 \sum_i p^t_i (\log p^t_i - \log p^s_i), \qquad
        p^s = \mathrm{softmax}(s^s / T_s), \quad p^t = \mathrm{softmax}(s^t / T_t)

    The scores of a dense retriever and of a cross-encoder differ in size: each model has a temperature of its own. A
    candidate with a score of minus infinity in both models is left out.

    Args:
        student_scores: Scores of each query's K candidates, shape ``(N, K)``, K of 2 or more.
        teacher_scores: The teacher's scores for the same candidates, same shape.
        student_temperature: Softening of the student's distribution, greater than 0; a scalar variable may be changed
            while training.
        teacher_temperature: Softening of the teacher's distribution, likewise.

    Returns:
        Divergence in nats times :math:`T_s^2`, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors, or a temperature is not a number.
        ValueError: If the shapes differ, are not ``(N, K)``, there are fewer than two candidates, or a temperature is
            not greater than 0.

    Example:
        >>> value = listwise_kl([[3.0, 1.0, 0.0]], [[9.0, 4.0, 6.0]], teacher_temperature=3.0)
        >>> round(float(value[0]), 4)
        0.2403

    References:
        Lin, Yang and Lin 2020, arXiv:2010.11386; deviation: two temperatures and the factor :math:`T_s^2`,
        as in published code.
    """
    student, teacher = _prepare_scores(student_scores, teacher_scores)
    student_temperature = prepare_number("student_temperature", student_temperature, student, checks.positive)
    teacher_temperature = prepare_number("teacher_temperature", teacher_temperature, student, checks.positive)
    values = softmax_divergence(student / student_temperature, teacher / teacher_temperature)
    return values * student_temperature**2


def _prepare_scores(student_scores: Any, teacher_scores: Any) -> tuple[Any, Any]:
    student, teacher = prepare(student_scores, teacher_scores, _SCORES)
    checks.same_shape(student, teacher, names=_SCORES, remedy="Both models must score the same candidates.")
    shape = tuple(student.shape)
    if len(shape) != 2 or (shape[1] is not None and shape[1] < 2):
        expected = "`student_scores` to have a row for each query with 2 candidates or more, shape (N, K)"
        remedy = "Reshape the scores of all pairs: keras.ops.reshape(scores, (queries, candidates))."
        raise ValueError(checks.message(expected, f"shape {shape}", remedy))
    return student, teacher
