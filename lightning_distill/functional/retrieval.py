"""Formulas on the scores of a query's candidates: student first, one value per query, no gradient into the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare, reduced, rows_mask
from lightning_distill.functional.kernels import softmax_divergence

__all__ = ["listwise_kl", "margin_mse"]

_SCORES = ("student_scores", "teacher_scores")


def margin_mse(
    student_scores: Tensor, teacher_scores: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of the two models' margins between the positive candidate and the negative ones.

    .. math:: \frac{1}{K - 1} \sum_{i=1}^{K-1} \left( (s^s_0 - s^s_i) - (s^t_0 - s^t_i) \right)^2

    Only margins are compared: the two models' scores may differ by a number for each query.

    Args:
        student_scores: Scores of each query's K candidates, the positive one first, shape ``(N, K)``, K of 2 or more.
        teacher_scores: The teacher's scores for the same candidates, same shape.
        mask: True where a query counts, shape ``(N,)``; None where all count.
        reduction: ``"none"`` for one value per query, ``"mean"`` for their mean.

    Returns:
        Mean squared difference, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors.
        ValueError: If the shapes differ, are not ``(N, K)``, or there are fewer than two candidates.

    Example:
        >>> margin_mse(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 4.0, 6.0]]))
        tensor([4.5000])

    References:
        Hofstaetter et al. 2020, arXiv:2010.02666, with one negative candidate; deviation: the mean over
        several, as in published code.
    """
    student, teacher, counts = _prepare_scores(student_scores, teacher_scores, mask)
    apart = student - teacher
    return reduced((apart[:, :1] - apart[:, 1:]).square().mean(dim=1), counts, reduction)


def listwise_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence between the two models' softmaxes over the candidates of a query.

    .. math:: T_s^2 \sum_i p^t_i (\log p^t_i - \log p^s_i), \qquad
        p^s = \mathrm{softmax}(s^s / T_s), \quad p^t = \mathrm{softmax}(s^t / T_t)

    The scores of a dense retriever and of a cross-encoder differ in size: each model has a temperature of its own. A
    candidate with a score of minus infinity in both models is left out.

    Args:
        student_scores: Scores of each query's K candidates, shape ``(N, K)``, K of 2 or more.
        teacher_scores: The teacher's scores for the same candidates, same shape.
        student_temperature: Softening of the student's distribution, greater than 0.
        teacher_temperature: Softening of the teacher's distribution, greater than 0.
        mask: True where a query counts, shape ``(N,)``; None where all count.
        reduction: ``"none"`` for one value per query, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T_s^2`, shape ``(N,)``.

    Raises:
        TypeError: If the scores are not floating point tensors, or a temperature is not a number.
        ValueError: If the shapes differ, are not ``(N, K)``, there are fewer than two candidates, or a temperature is
            not greater than 0.

    Example:
        >>> listwise_kl(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 4.0, 6.0]]), teacher_temperature=3.0)
        tensor([0.2403])

    References:
        Lin, Yang and Lin 2020, arXiv:2010.11386; deviation: two temperatures and the factor :math:`T_s^2`,
        as in published code.
    """
    checks.positive("student_temperature", student_temperature)
    checks.positive("teacher_temperature", teacher_temperature)
    student, teacher, counts = _prepare_scores(student_scores, teacher_scores, mask)
    values = softmax_divergence(student / student_temperature, teacher / teacher_temperature, dim=1)
    return reduced(values, counts, reduction) * student_temperature**2


def _prepare_scores(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both models' scores, zeros where a query does not count, and the mask of the queries."""
    student, teacher = prepare(student_scores, teacher_scores, _SCORES)
    checks.same_shape(student, teacher, names=_SCORES, remedy="Both models must score the same candidates.")
    if student.ndim != 2 or student.shape[1] < 2:
        expected = "`student_scores` to have a row for each query with 2 candidates or more, shape (N, K)"
        remedy = "Reshape the scores of all pairs: scores.view(queries, candidates)."
        raise ValueError(checks.message(expected, f"shape {tuple(student.shape)}", remedy))
    if mask is None:
        return student, teacher, None
    counts = rows_mask(mask, tuple(student.shape[:1]))
    student, teacher = (torch.where(counts[:, None], scores, 0.0) for scores in (student, teacher))
    return student, teacher, counts
