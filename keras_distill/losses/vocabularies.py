"""Losses between models whose vocabularies differ."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill.functional.vocabularies import universal_logit
from keras_distill.losses.base import LogitsLoss
from keras_distill.schedules import Schedule

__all__ = ["UniversalLogitLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class UniversalLogitLoss(LogitsLoss):
    r"""Wasserstein distance of sorted probabilities, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_i |p^s_{n(i)} - p^t_{n(i)}|, \qquad p = \mathrm{softmax}(z / T)

    Here :math:`p_{(i)}` is the i-th largest probability, and 0 beyond the last class. The two models may have different
    classes and different numbers of them. See :func:`keras_distill.functional.universal_logit`.

    The loss is not multiplied by :math:`T^2`: at a higher temperature its gradient is smaller.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar from 0 to 2 when called with logits ``(N, ..., D)`` of the teacher, then ``(N, ..., C)`` of the
        student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(UniversalLogitLoss()([[0.0, 4.0, 1.0, 1.0]], [[2.0, 0.0, 1.0]])), 4)
        0.4914

    References:
        Boizard et al. 2024 (ULD), arXiv:2402.12030.
    """

    channels_must_match: ClassVar[bool] = False
    _formula = staticmethod(universal_logit)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "universal_logit_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
