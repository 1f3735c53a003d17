"""Losses on the relations between the examples, or the channels, of a batch."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.relations import (
    KERNELS,
    correlation_congruence,
    inter_channel_correlation,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    relational_distance_and_angle,
    similarity_preserving,
)
from keras_distill.losses.base import DistillationLoss, FormulaLoss
from keras_distill.schedules import Schedule

__all__ = [
    "CorrelationCongruenceLoss",
    "InterChannelCorrelationLoss",
    "ProbabilisticTransferLoss",
    "RelationalLoss",
    "SimilarityPreservingLoss",
]


@keras.saving.register_keras_serializable(package="keras_distill")
class SimilarityPreservingLoss(FormulaLoss):
    r"""Mean squared difference of the two models' similarities between the examples of a batch.

    .. math:: \frac{1}{N^2} \sum_{i,j} (\hat G^s_{ij} - \hat G^t_{ij})^2, \qquad G = F F^\top, \quad
        \hat G_i = G_i / \|G_i\|_2

    It needs no adapter, and the features may have any shapes. The usual weight is 3000. See
    :func:`keras_distill.functional.similarity_preserving`.

    Args:
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, ...)`` of the teacher, then the student.

    Example:
        >>> round(float(SimilarityPreservingLoss()([[3.0], [4.0]], [[1.0, 0.0], [0.0, 2.0]])), 4)
        0.3

    References:
        Tung and Mori 2019, equation 4, arXiv:1907.09682.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(similarity_preserving)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "similarity_preserving_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class RelationalLoss(DistillationLoss):
    r"""Weighted sum of the differences in distances and in angles between the examples of a batch.

    .. math:: w_d \frac{1}{N^2} \sum_{i,j} h\left( \frac{d^s_{ij}}{\mu^s} - \frac{d^t_{ij}}{\mu^t} \right)
        + w_a \frac{1}{N^3} \sum_{i,j,k} h(\cos^s_{ijk} - \cos^t_{ijk})

    h is the Huber function. It needs no adapter, and the features may have any shapes. Work grows with the third power
    of the batch unless ``angle_weight`` is 0. See :func:`keras_distill.functional.relational_distance` and
    :func:`keras_distill.functional.relational_angle`.

    Args:
        distance_weight: Factor of the distances, at least 0, a number or a schedule; 0 skips the work.
        angle_weight: Factor of the angles, at least 0, a number or a schedule; 0 skips the work.
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, ...)`` of the teacher, then the student.

    Raises:
        TypeError: If a weight is not a number.
        ValueError: If a weight is less than 0, or both are 0.

    Example:
        >>> loss = RelationalLoss(angle_weight=0.0)
        >>> round(float(loss([[0.0], [1.0], [2.0]], [[0.0], [1.0], [3.0]])), 4)
        0.3472

    References:
        Park et al. 2019, equations 5 to 10, arXiv:1904.05068, with weights of 25 and 50 for classification and of 1 and
        2 for metric learning; deviation, as in the authors' code: means where the paper has sums.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"

    def __init__(
        self,
        *,
        distance_weight: float | Schedule = 25.0,
        angle_weight: float | Schedule = 50.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "relational_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if distance_weight == angle_weight == 0:
            raise ValueError(checks.message("`distance_weight` or `angle_weight` to be greater than 0", "0 for both"))
        self.distance_weight = self._setting("distance_weight", distance_weight, checks.non_negative)
        self.angle_weight = self._setting("angle_weight", angle_weight, checks.non_negative)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value for the batch."""
        weights: list[Any] = [self.distance_weight, self.angle_weight]
        if all(isinstance(weight, float) and weight for weight in weights):
            distance, angle = relational_distance_and_angle(y_pred, y_true)
            return weights[0] * distance + weights[1] * angle
        total = 0.0
        for weight, formula in zip(weights, (relational_distance, relational_angle), strict=True):
            if isinstance(weight, float) and not weight:
                continue
            value = formula(y_pred, y_true)
            # the weight may be a variable that a schedule sets
            total = total + ops.cast(ops.convert_to_tensor(weight), value.dtype) * value
        return total


@keras.saving.register_keras_serializable(package="keras_distill")
class ProbabilisticTransferLoss(FormulaLoss):
    r"""Divergence between the two models' probabilities that examples of a batch are neighbours.

    .. math:: \frac{1}{N^2} \sum_{i,j} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}

    It needs no adapter, and the features may have any shapes. The values are small: the usual weight is 30000. See
    :func:`keras_distill.functional.probabilistic_transfer`.

    Args:
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, ...)`` of the teacher, then the student.

    Example:
        >>> round(float(ProbabilisticTransferLoss()([[3.0], [4.0]], [[1.0, 0.0], [0.0, 2.0]])), 4)
        0.0294

    References:
        Passalis and Tefas 2018, equations 3 to 7, arXiv:1803.10837; deviations, as in the authors' code: the mean over
        all pairs, an example with itself included.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(probabilistic_transfer)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "probabilistic_transfer_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class CorrelationCongruenceLoss(FormulaLoss):
    r"""Mean squared difference of the two models' Gaussian correlations between the examples of a batch.

    .. math:: \frac{1}{N^2} \sum_{i,j} (K^s_{ij} - K^t_{ij})^2

    With the default kernel it needs no adapter, and the features may have any shapes; ``kernel="neighbour"`` needs
    equal shapes. See :func:`keras_distill.functional.correlation_congruence`.

    Args:
        kernel: "gaussian" for the paper's form, "neighbour" for that of the published code.
        gamma: Inverse squared width of the Gaussian, greater than 0.
        order: Highest power of its Taylor series, at least 1.
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, ...)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = CorrelationCongruenceLoss()
        >>> round(float(loss([[3.0, 0.0], [4.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]])), 4)
        0.0532

    References:
        Peng et al. 2019, equations 6 to 10, arXiv:1904.01802. "neighbour": the authors' code as RepDistiller has it,
        there with a weight of 0.02.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(correlation_congruence)

    def __init__(
        self,
        *,
        kernel: str = "gaussian",
        gamma: float = 0.4,
        order: int = 2,
        reduction: str | None = "sum_over_batch_size",
        name: str = "correlation_congruence_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.one_of("kernel", kernel, KERNELS)
        checks.positive("gamma", gamma)
        checks.integer("order", order)
        checks.at_least("order", order, 1)
        self._fix(kernel=kernel, gamma=float(gamma), order=int(order))
        # Terms ask the instance: products of neighbouring differences exist for features of equal shape only.
        for attribute in ("channels_must_match", "positions_must_match"):
            setattr(self, attribute, kernel == "neighbour")


@keras.saving.register_keras_serializable(package="keras_distill")
class InterChannelCorrelationLoss(FormulaLoss):
    r"""Mean squared difference of the two models' correlations between the channels, averaged over the examples.

    .. math:: \frac{1}{N C^2} \sum_n \sum_{i,j} (\hat G^s_{nij} - \hat G^t_{nij})^2

    Both features need the same number of channels; the positions may differ. The authors' weight of 2.5 is 2.5 C here.
    See :func:`keras_distill.functional.inter_channel_correlation`.

    Args:
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with feature maps ``(N, H, W, C)`` of the teacher, then the student.

    Example:
        >>> loss = InterChannelCorrelationLoss()
        >>> round(float(loss([[[[3.0, 4.0]]]], [[[[1.0, 0.0], [0.0, 2.0]]]])), 4)
        0.3

    References:
        Liu et al. 2021, equations 2 to 4, arXiv:2202.03680; deviations: rows of length one, as in the authors' code,
        and the mean over examples and pairs of channels, as in equation 4, where that code divides by N C.
    """

    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "examples"
    _formula = staticmethod(inter_channel_correlation)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "inter_channel_correlation_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
