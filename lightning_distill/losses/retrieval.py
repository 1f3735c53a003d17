"""Losses on the scores that retrievers give a query's candidates."""

from __future__ import annotations

from typing import ClassVar

from lightning_distill.functional.retrieval import listwise_kl, margin_mse
from lightning_distill.losses.base import FormulaLoss
from lightning_distill.schedules import Schedule

__all__ = ["ListwiseKLLoss", "MarginMSELoss"]


class MarginMSELoss(FormulaLoss):
    r"""Mean squared difference of the two models' margins between positive and negative candidates.

    .. math:: \frac{1}{N (K - 1)} \sum_n \sum_{i=1}^{K-1}
        \left( (s^s_{n0} - s^s_{ni}) - (s^t_{n0} - s^t_{ni}) \right)^2

    For retrievers and rankers: the models return scores of each query's candidates, the positive one first. See
    :func:`lightning_distill.functional.margin_mse`.

    Returns:
        A scalar when called with scores ``(N, K)`` of the student, then the teacher.

    Example:
        >>> import torch
        >>> MarginMSELoss()(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 4.0, 6.0]]))
        tensor(4.5000)

    References:
        Hofstaetter et al. 2020, arXiv:2010.02666, where it is the only loss; deviation: the mean over several negative
        candidates, as in published code.
    """

    channels_must_match: ClassVar[bool] = False  # a score is compared with that of the same candidate, or not at all
    positions_must_match: ClassVar[bool] = False
    _formula = staticmethod(margin_mse)


class ListwiseKLLoss(FormulaLoss):
    r"""Divergence between the two models' softmaxes over a query's candidates, averaged over the queries.

    .. math:: \frac{T_s^2}{N} \sum_n \sum_i p^t_{ni} (\log p^t_{ni} - \log p^s_{ni}), \qquad
        p^s = \mathrm{softmax}(s^s / T_s), \quad p^t = \mathrm{softmax}(s^t / T_t)

    For retrievers and rankers: the models return scores of each query's candidates, in the same order. See
    :func:`lightning_distill.functional.listwise_kl`.

    The factor :math:`T_s^2` keeps the gradient's size when the student's temperature changes.

    Args:
        student_temperature: Softening of the student's distribution, greater than 0; a number or a schedule.
        teacher_temperature: Softening of the teacher's distribution, greater than 0; a number or a schedule.

    Returns:
        A scalar, in nats times :math:`T_s^2`, when called with scores ``(N, K)`` of the student, then the teacher.

    Raises:
        TypeError: If a temperature is not a number or a schedule.
        ValueError: If a temperature is not greater than 0.

    Example:
        >>> import torch
        >>> loss = ListwiseKLLoss(teacher_temperature=3.0)
        >>> loss(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 4.0, 6.0]]))
        tensor(0.2403)

    References:
        Lin, Yang and Lin 2020, arXiv:2010.11386; deviation: two temperatures and the factor :math:`T_s^2`, as in
        published code.
    """

    channels_must_match: ClassVar[bool] = False  # a score is compared with that of the same candidate, or not at all
    positions_must_match: ClassVar[bool] = False
    _formula = staticmethod(listwise_kl)

    def __init__(
        self, *, student_temperature: float | Schedule = 1.0, teacher_temperature: float | Schedule = 1.0
    ) -> None:
        super().__init__()
        self.student_temperature = self._setting("student_temperature", student_temperature)
        self.teacher_temperature = self._setting("teacher_temperature", teacher_temperature)
