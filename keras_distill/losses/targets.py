"""Losses on logits as targets, class by class or in view of the right class, which the labels name."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.targets import binary_soft_target, decoupled_kd, normalized_kd, weighted_soft_labels
from keras_distill.losses.base import DistillationLoss
from keras_distill.schedules import Schedule


@keras.saving.register_keras_serializable(package="keras_distill")
class LabelledLoss(DistillationLoss):
    """Base of the losses that know the right class: ``y_true`` is the pair of the teacher's logits and the labels."""

    needs_labels: ClassVar[bool] = True

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of a batch, a scalar unless ``reduction`` is None."""
        if not isinstance(y_true, (tuple, list)) or len(y_true) != 2 or y_true[1] is None:
            got = "a pair without labels" if isinstance(y_true, (tuple, list)) else f"a {type(y_true).__name__}"
            remedy = f"{type(self).__name__} needs the batch's labels; a term of DistillModel hands them over."
            raise ValueError(checks.message("`y_true` to be the pair (teacher_logits, labels)", got, remedy))
        return super().__call__(y_true, y_pred, sample_weight)


@keras.saving.register_keras_serializable(package="keras_distill")
class DecoupledKDLoss(LabelledLoss):
    r"""Two divergences, on the target class and among the others, averaged over the examples.

    .. math:: \frac{T^2}{N} \sum_n a \, \mathrm{KL}(b^t_n \| b^s_n) + b \, \mathrm{KL}(q^t_n \| q^s_n), \qquad
        b = (p_y, 1 - p_y), \quad q_c = p_c / (1 - p_y), \quad p = \mathrm{softmax}(z / T)

    What the teacher knows about the other classes counts even where it is sure. See
    :func:`keras_distill.functional.decoupled_kd`.

    Args:
        target_weight: Weight of the divergence between target and the rest, 0 or greater; a number or a schedule.
        nontarget_weight: Weight of the divergence among the other classes, 0 or greater; a number or a schedule.
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models give logits; if False they give probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with the pair of the teacher's logits ``(N, ..., C)`` and labels ``(N, ...)``,
        then with the student's logits.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or a weight is negative.

    Example:
        >>> round(float(DecoupledKDLoss()(([[4.0, 1.0, 0.0]], [0]), [[2.0, 0.0, 1.0]])), 4)
        4.4776

    References:
        Zhao et al. 2022, equation 7, arXiv:2203.08679. The authors' code has a target weight of 1 and, by teacher,
        non-target weights of 2 to 8 for CIFAR-100 (temperature 4) and 0.5 to 2 for ImageNet (temperature 1).
    """

    def __init__(
        self,
        target_weight: float | Schedule = 1.0,
        nontarget_weight: float | Schedule = 8.0,
        temperature: float | Schedule = 4.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "decoupled_kd_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.boolean("from_logits", from_logits)
        self.target_weight = self._setting("target_weight", target_weight, checks.non_negative)
        self.nontarget_weight = self._setting("nontarget_weight", nontarget_weight, checks.non_negative)
        self.temperature = self._setting("temperature", temperature)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits."""
        teacher, labels = y_true
        return decoupled_kd(
            y_pred,
            teacher,
            labels,
            target_weight=self.target_weight,
            nontarget_weight=self.nontarget_weight,
            temperature=self.temperature,
            from_logits=self.from_logits,
        )

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
        }


@keras.saving.register_keras_serializable(package="keras_distill")
class NormalizedKDLoss(LabelledLoss):
    r"""Cross entropies on the target class and among the others, averaged over the examples.

    .. math:: -\frac{1}{N} \sum_n p^t_{ny} \log p^s_{ny} + \gamma T^2 \sum_{c \ne y} q^t_{nc} \log q^s_{nc}, \qquad
        p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}_{c \ne y}(z / T)

    Both models' probabilities of the other classes add up to 1 before they are compared. See
    :func:`keras_distill.functional.normalized_kd`.

    Args:
        nontarget_weight: Weight of the cross entropy among the other classes, 0 or greater; a number or a schedule.
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models give logits; if False they give probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with the pair of the teacher's logits ``(N, ..., C)`` and labels ``(N, ...)``,
        then with the student's logits.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or the weight is negative.

    Example:
        >>> round(float(NormalizedKDLoss()(([[4.0, 1.0, 0.0]], [0]), [[2.0, 0.0, 1.0]])), 4)
        1.9481

    References:
        Yang et al. 2023, section 3.1, arXiv:2303.13005. The authors' code has a weight of 1.5 at temperature 1 by
        default and 3.5 at temperature 3 for CIFAR-100.
    """

    def __init__(
        self,
        nontarget_weight: float | Schedule = 1.5,
        temperature: float | Schedule = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "normalized_kd_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.boolean("from_logits", from_logits)
        self.nontarget_weight = self._setting("nontarget_weight", nontarget_weight, checks.non_negative)
        self.temperature = self._setting("temperature", temperature)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits."""
        teacher, labels = y_true
        return normalized_kd(
            y_pred,
            teacher,
            labels,
            nontarget_weight=self.nontarget_weight,
            temperature=self.temperature,
            from_logits=self.from_logits,
        )

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
        }


@keras.saving.register_keras_serializable(package="keras_distill")
class WeightedSoftLabelLoss(LabelledLoss):
    r"""Cross entropy under the soft targets, weighted by example and averaged over the examples.

    .. math:: -\frac{T^2}{N} \sum_n \left(1 - \exp\left(-\frac{L^s_n}{L^t_n}\right)\right)
        \sum_c p^t_{nc} \log p^s_{nc}, \qquad L = -\log \mathrm{softmax}(z)_y, \quad p = \mathrm{softmax}(z / T)

    An example on which the student already does better than the teacher counts little. See
    :func:`keras_distill.functional.weighted_soft_labels`.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models give logits; if False they give probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with the pair of the teacher's logits ``(N, ..., C)`` and labels ``(N, ...)``,
        then with the student's logits.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(WeightedSoftLabelLoss()(([[4.0, 1.0, 0.0]], [0]), [[2.0, 0.0, 1.0]])), 3)
        3.57

    References:
        Zhou et al. 2021, equations 13 and 14, arXiv:2102.00650; the authors weight the term by 2.5 on ImageNet
        (temperature 2) and by 2.25 on CIFAR-100 (temperature 4).
    """

    def __init__(
        self,
        temperature: float | Schedule = 2.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "weighted_soft_label_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.boolean("from_logits", from_logits)
        self.temperature = self._setting("temperature", temperature)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits."""
        teacher, labels = y_true
        return weighted_soft_labels(y_pred, teacher, labels, temperature=self.temperature, from_logits=self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
        }


@keras.saving.register_keras_serializable(package="keras_distill")
class BinarySoftTargetLoss(DistillationLoss):
    r"""Binary cross entropy of each class under the teacher's soft targets, averaged over classes and examples.

    .. math:: -\frac{T^2}{N C} \sum_n \sum_c s^t_{nc} \log s^s_{nc} + (1 - s^t_{nc}) \log (1 - s^s_{nc}), \qquad
        s = \sigma(z / T)

    For models with several labels per example, or a single score. See
    :func:`keras_distill.functional.binary_soft_target`.

    Args:
        temperature: Softening of both models' answers, greater than 0; a number or a schedule.
        from_logits: Whether the models give logits; if False they give probabilities of a sigmoid, and z is the
            logarithm of their odds.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(BinarySoftTargetLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.5564

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; deviation: a sigmoid for each class instead of one
        softmax over the classes, for which no weight is given.
    """

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_soft_target_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.boolean("from_logits", from_logits)
        self.temperature = self._setting("temperature", temperature)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits."""
        return binary_soft_target(y_pred, y_true, temperature=self.temperature, from_logits=self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
        }
