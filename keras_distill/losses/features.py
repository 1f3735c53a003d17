"""Losses on one feature of each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal

import keras

from keras_distill import checks
from keras_distill.functional.features import (
    attention_transfer,
    channel_wise_kl,
    feature_cosine,
    feature_kl,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
)
from keras_distill.losses.base import DistillationLoss, FormulaLoss
from keras_distill.schedules import Schedule

__all__ = ["AttentionTransferLoss", "ChannelWiseLoss", "FeatureDistance"]

DISTANCES: Final[dict[str, Callable[..., Any]]] = {
    "mse": feature_mse,
    "l1": feature_l1,
    "smooth_l1": feature_smooth_l1,
    "cosine": feature_cosine,
    "kl": feature_kl,
}


@keras.saving.register_keras_serializable(package="keras_distill")
class FeatureDistance(DistillationLoss):
    r"""One of the plain distances between two features of equal shape, averaged over examples and positions.

    .. math:: \frac{1}{N} \sum_n D(f^s_n, f^t_n)

    The strings of a FeatureDistillation stand for these losses: "mse", "l1", "smooth_l1", "cosine" and "kl". See the
    function ``feature_<kind>`` in :mod:`keras_distill.functional`.

    Args:
        kind: Which distance.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss; ``None`` is ``"feature_<kind>"``.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with the features ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If ``kind`` is not a string.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> float(FeatureDistance("l1")([[1.0, 4.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 3.0]]))
        1.25

    References:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, in RepDistiller with a weight of 100; Sanh et al. 2019
        (DistilBERT), arXiv:1910.01108, in the authors' code with a weight of 1 beside 5 on the soft targets.
    """

    def __init__(
        self,
        kind: Literal["mse", "l1", "smooth_l1", "cosine", "kl"] = "mse",
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        checks.one_of("kind", kind, DISTANCES)
        super().__init__(name=name or f"feature_{kind}", reduction=reduction, dtype=dtype)
        self._fix(kind=kind)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        return DISTANCES[self.kind](y_pred, y_true, per_position=True)


@keras.saving.register_keras_serializable(package="keras_distill")
class AttentionTransferLoss(FormulaLoss):
    r"""Mean squared difference of the normalised maps of attention, averaged over the examples.

    .. math:: \frac{1}{N P} \sum_n \left\| \frac{Q^s_n}{\|Q^s_n\|_2} - \frac{Q^t_n}{\|Q^t_n\|_2} \right\|_2^2, \qquad
        Q_{ni} = \frac{1}{C} \sum_c |f_{n,c,i}|^p

    It needs no adapter, because the channels are averaged out. The values are small: the usual weight is 1000. See
    :func:`keras_distill.functional.attention_transfer`.

    Args:
        p: Power of the activations, at least 1; larger values stress the strongest positions.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with feature maps ``(N, H, W, C)`` of the teacher, then the student; C may differ.

    Raises:
        TypeError: If ``p`` is not a number.
        ValueError: If ``p`` is less than 1.

    Example:
        >>> round(float(AttentionTransferLoss()([[[[1.0, 1.0], [0.0, 0.0]]]], [[[[1.0], [2.0]]]])), 4)
        0.7575

    References:
        Zagoruyko and Komodakis 2017, equation 2, arXiv:1612.03928; deviation: the mean of the squared differences
        over the positions, as in the authors' code, where the equation has half the norm.
    """

    channels_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "examples"
    _formula = staticmethod(attention_transfer)

    def __init__(
        self,
        *,
        p: float = 2.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "attention_transfer_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.at_least("p", p, 1)
        self._fix(p=float(p))


@keras.saving.register_keras_serializable(package="keras_distill")
class ChannelWiseLoss(FormulaLoss):
    r"""Divergence between the softmaxes over the positions of each channel, averaged over channels and examples.

    .. math:: \frac{T^2}{N C} \sum_n \sum_c \sum_i q^t_{nci} (\log q^t_{nci} - \log q^s_{nci}), \qquad
        q_{nci} = \frac{\exp(f_{nci} / T)}{\sum_j \exp(f_{ncj} / T)}

    The factor :math:`T^2` keeps the gradient's size when the temperature changes. Made for dense prediction, on maps of
    features or of logits. See
    :func:`keras_distill.functional.channel_wise_kl`.

    Args:
        temperature: Softening of both distributions over the positions, greater than 0; a number or a schedule.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with maps ``(N, H, W, C)`` of the teacher, then the student.

    Raises:
        TypeError: If the temperature is not a number.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> teacher = [[[2.0, 4.0], [1.0, 0.0], [0.0, 1.0]]]
        >>> student = [[[0.0, 1.0], [1.0, 1.0], [3.0, 0.0]]]
        >>> round(float(ChannelWiseLoss(temperature=2.0)(teacher, student)), 4)
        1.5985

    References:
        Shu et al. 2021, equations 4 and 5, arXiv:2011.13256; on maps of logits the authors' code has a temperature of 4
        and a weight of 3.
    """

    gives: ClassVar[str] = "examples"
    _formula = staticmethod(channel_wise_kl)

    def __init__(
        self,
        temperature: float | Schedule = 4.0,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "channel_wise_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
