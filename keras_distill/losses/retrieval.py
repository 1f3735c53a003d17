"""Losses on the scores that retrievers give a query's candidates."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill.functional.retrieval import listwise_kl, margin_mse
from keras_distill.losses.base import FormulaLoss
from keras_distill.schedules import Schedule

__all__ = ["ListwiseKLLoss", "MarginMSELoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class MarginMSELoss(FormulaLoss):
    r"""Mean squared difference of the two models' margins between positive and negative candidates.

    .. math:: \frac{1}{N (K - 1)} \sum_n \sum_{i=1}^{K-1}
        \left( (s^s_{n0} - s^s_{ni}) - (s^t_{n0} - s^t_{ni}) \right)^2

    For retrievers and rankers: the models return scores of each query's candidates, the positive one first. See
    :func:`keras_distill.functional.margin_mse`.

    Args:
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with scores ``(N, K)`` of the teacher, then the student.

    Example:
        >>> float(MarginMSELoss()([[9.0, 4.0, 6.0]], [[3.0, 1.0, 0.0]]))
        4.5

    References:
        Hofstaetter et al. 2020, arXiv:2010.02666, where it is the only loss; deviation: the mean over several negative
        candidates, as in published code.
    """

    channels_must_match: ClassVar[bool] = False  # a score is compared with that of the same candidate, or not at all
    positions_must_match: ClassVar[bool] = False
    _formula = staticmethod(margin_mse)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "margin_mse_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class ListwiseKLLoss(FormulaLoss):
    r"""Divergence between the two models' softmaxes over a query's candidates, averaged over the queries.

    .. math:: \frac{T_s^2}{N} \sum_n \sum_i p^t_{ni} (\log p^t_{ni} - \log p^s_{ni}), \qquad
        p^s = \mathrm{softmax}(s^s / T_s), \quad p^t = \mathrm{softmax}(s^t / T_t)

    For retrievers and rankers: the models return scores of each query's candidates, in the same order. See
    :func:`keras_distill.functional.listwise_kl`.

    The factor :math:`T_s^2` keeps the gradient's size when the student's temperature changes.

    Args:
        student_temperature: Softening of the student's distribution, greater than 0; a number or a schedule.
        teacher_temperature: Softening of the teacher's distribution, greater than 0; a number or a schedule.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T_s^2`, when called with scores ``(N, K)`` of the teacher, then the student.

    Raises:
        TypeError: If a temperature is not a number or a schedule.
        ValueError: If a temperature is not greater than 0.

    Example:
        >>> loss = ListwiseKLLoss(teacher_temperature=3.0)
        >>> round(float(loss([[9.0, 4.0, 6.0]], [[3.0, 1.0, 0.0]])), 4)
        0.2403

    References:
        Lin, Yang and Lin 2020, arXiv:2010.11386; deviation: two temperatures and the factor :math:`T_s^2`, as in
        published code.
    """

    channels_must_match: ClassVar[bool] = False  # a score is compared with that of the same candidate, or not at all
    positions_must_match: ClassVar[bool] = False
    _formula = staticmethod(listwise_kl)

    def __init__(
        self,
        *,
        student_temperature: float | Schedule = 1.0,
        teacher_temperature: float | Schedule = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "listwise_kl_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.student_temperature = self._setting("student_temperature", student_temperature)
        self.teacher_temperature = self._setting("teacher_temperature", teacher_temperature)
