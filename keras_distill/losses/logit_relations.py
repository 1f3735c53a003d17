"""Losses on how rows and columns of the models' probabilities relate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_number
from keras_distill.functional.logit_relations import (
    inter_class_relation,
    intra_class_relation,
    multi_level_logits,
)
from keras_distill.losses.base import LogitsLoss
from keras_distill.losses.temperature import CurriculumTemperature
from keras_distill.schedules import Schedule

__all__ = ["DISTLoss", "MultiLevelLogitLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class DISTLoss(LogitsLoss):
    r"""One minus the correlation of the two models' probabilities, over the classes and over the examples.

    .. math:: \frac{T^2 \beta}{N} \sum_n (1 - \rho(p^s_n, p^t_n))
        + \frac{T^2 \gamma}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c})), \qquad p = \mathrm{softmax}(z / T)

    It keeps relations rather than exact values, which helps if the teacher is much stronger than the student. See
    :func:`keras_distill.functional.inter_class_relation` and :func:`keras_distill.functional.intra_class_relation`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes. A class with scores of minus infinity
    still counts as a class, with probability 0.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        inter_weight: Weight :math:`\beta` of the relations between the classes of an example, 0 or greater; a
            number or a schedule.
        intra_weight: Weight :math:`\gamma` of the relations between the examples of a class, 0 or greater; a
            number or a schedule.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the teacher, then the student; the whole batch is compared.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or a weight is negative.

    Example:
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> round(float(DISTLoss()(teacher, student)), 4)
        1.2769

    References:
        Huang et al. 2022 (DIST), equations 8 and 9, arXiv:2205.10536, with weights of 2 for ImageNet (temperature 1)
        and CIFAR-100 (temperature 4), and of 1 for detection and segmentation.
    """

    class_scores: ClassVar[bool] = True
    learns_temperature: ClassVar[bool] = True
    gives: ClassVar[str] = "batch"

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 1.0,
        *,
        inter_weight: float | Schedule = 1.0,
        intra_weight: float | Schedule = 1.0,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "dist_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
        self.inter_weight = self._setting("inter_weight", inter_weight, checks.non_negative)
        self.intra_weight = self._setting("intra_weight", intra_weight, checks.non_negative)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Loss of the batch, a scalar."""
        settings: dict[str, Any] = {"temperature": self._number("temperature"), "from_logits": self.from_logits}
        inter = ops.mean(inter_class_relation(y_pred, y_true, **settings))
        intra = intra_class_relation(y_pred, y_true, **settings)
        weights = [
            prepare_number(name, getattr(self, name), intra, checks.non_negative)
            for name in ("inter_weight", "intra_weight")
        ]
        return weights[0] * inter + weights[1] * intra


@keras.saving.register_keras_serializable(package="keras_distill")
class MultiLevelLogitLoss(LogitsLoss):
    r"""Divergence of each example, of the batch and of the classes, averaged over several temperatures.

    .. math:: \frac{1}{K} \sum_T \left( \frac{T^2}{N} \sum_n \mathrm{KL}(p^t_n \| p^s_n)
        + \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2 + \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2 \right)

    Several temperatures cover the teacher's first choices and its faint preferences together. See
    :func:`keras_distill.functional.multi_level_logits`.

    The factor :math:`T^2` is on the divergence, not on the products.

    Args:
        temperatures: The K temperatures, each greater than 0.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the teacher, then the student; the whole batch is compared.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``temperatures`` is empty, or one is not greater than 0.

    Example:
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> round(float(MultiLevelLogitLoss()(teacher, student)), 4)
        0.8134

    References:
        Jin, Wang and Lin 2023, section 3, CVPR; deviations as in the function. The authors' code has a weight of 9 for
        the sum over the five temperatures, which is 45 for their mean.
    """

    class_scores: ClassVar[bool] = True
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(multi_level_logits)

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "multi_level_logit_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        checks.positives("temperatures", temperatures)
        self._fix(temperatures=tuple(float(temperature) for temperature in temperatures))
