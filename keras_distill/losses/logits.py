"""Losses on the two models' logits."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.logits import hard_target, logit_mse, soft_cross_entropy, soft_target_kl
from keras_distill.losses.base import LogitsLoss
from keras_distill.losses.temperature import CurriculumTemperature
from keras_distill.schedules import Schedule

__all__ = ["HardTargetLoss", "LogitMSELoss", "SoftCrossEntropyLoss", "SoftTargetLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class SoftTargetLoss(LogitsLoss):
    r"""Divergence of the student's softened probabilities from the teacher's soft targets, averaged over the examples.

    .. math:: \frac{T^2}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc}), \qquad p = \mathrm{softmax}(z / T)

    The loss most people mean by knowledge distillation. See :func:`keras_distill.functional.soft_target_kl`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        standardize: Whether each row of logits is z-scored first.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> loss = SoftTargetLoss(temperature=2.0)
        >>> round(float(loss([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.5694

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; RepDistiller has a temperature of 4, a weight of
        0.9 and 0.1 for the task on CIFAR-100. Standardisation: Sun et al. 2024, section 4.3, arXiv:2403.01427; the
        authors' code runs it at temperature 2 with a weight of 9 on CIFAR-100.
    """

    merges_classes: ClassVar[bool] = True
    linear_in_teacher: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    learns_temperature: ClassVar[bool] = True
    _formula = staticmethod(soft_target_kl)

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 4.0,
        *,
        standardize: bool = False,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "soft_target_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        checks.boolean("standardize", standardize)
        self.temperature = self._setting("temperature", temperature)
        self._fix(standardize=standardize)


@keras.saving.register_keras_serializable(package="keras_distill")
class SoftCrossEntropyLoss(LogitsLoss):
    r"""Cross entropy under the teacher's soft targets, averaged over the examples.

    .. math:: -\frac{T^2}{N} \sum_n \sum_c p^t_{nc} \log p^s_{nc}, \qquad p = \mathrm{softmax}(z / T)

    The gradient of SoftTargetLoss at the same temperature; the value ends at the teacher's entropy instead of 0.
    See :func:`keras_distill.functional.soft_cross_entropy`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(SoftCrossEntropyLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.518

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; weights as for the divergence.
    """

    merges_classes: ClassVar[bool] = True
    linear_in_teacher: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    learns_temperature: ClassVar[bool] = True
    _formula = staticmethod(soft_cross_entropy)

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "soft_cross_entropy_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)


@keras.saving.register_keras_serializable(package="keras_distill")
class HardTargetLoss(LogitsLoss):
    r"""Cross entropy of the student's probabilities with the teacher's decision, averaged over the examples.

    .. math:: -\frac{1}{N} \sum_n \log p^s_{n k_n}, \qquad k_n = \arg\max_c z^t_{nc}, \quad p = \mathrm{softmax}(z)

    The teacher's most likely class is taken as a label. For a student with a distillation head, such as DeiT's, pass
    the loss to a FeatureDistillation between that head and the teacher's last layer, with ``adapter=None``. See
    :func:`keras_distill.functional.hard_target`.

    Args:
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If ``from_logits`` is not a bool.

    Example:
        >>> round(float(HardTargetLoss()([[1.0, 4.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        2.4076

    References:
        Touvron et al. 2021 (DeiT), equation 3, arXiv:2012.12877, with a weight of 0.5 and 0.5 for the task loss.
    """

    class_scores: ClassVar[bool] = True
    _formula = staticmethod(hard_target)

    def __init__(
        self,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "hard_target_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class LogitMSELoss(LogitsLoss):
    r"""Mean squared difference of the logits, averaged over the examples.

    .. math:: \frac{1}{N C} \sum_n \sum_c (z^s_{nc} - z^t_{nc})^2

    It needs no temperature and fits a single score too. See :func:`keras_distill.functional.logit_mse`.

    Args:
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If ``from_logits`` is not a bool.

    Example:
        >>> float(LogitMSELoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]]))
        2.0

    References:
        Ba and Caruana 2014, section 2.2, arXiv:1312.6184, where it is the only loss; deviation: the mean over the
        classes, without the factor 1/2.
    """

    _formula = staticmethod(logit_mse)

    def __init__(
        self,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "logit_mse_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
