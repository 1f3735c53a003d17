"""Losses on features that are normalised first."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.normalized import (
    centered_kernel_alignment,
    feature_map_transfer,
    neuron_selectivity,
    normalized_mse,
    pearson_feature,
)
from keras_distill.losses.base import FormulaLoss

__all__ = ["CKALoss", "FeatureMapTransferLoss", "NeuronSelectivityLoss", "PatientLoss", "PearsonFeatureLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class PearsonFeatureLoss(FormulaLoss):
    r"""Half the mean squared difference of the z-scores of the channels, over the examples and positions of a batch.

    .. math:: \frac{1}{2 M} \sum_{n,i,c} (\hat f^s_{nic} - \hat f^t_{nic})^2, \qquad
        \hat f_{nic} = \frac{f_{nic} - \mu_c}{\sigma_c + 10^{-6}}

    The student copies where a channel is strong, but not its mean and size. This suits a teacher of another
    architecture. See :func:`keras_distill.functional.pearson_feature`.

    Args:
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)`` of the teacher, then the
        student.

    Example:
        >>> round(float(PearsonFeatureLoss()([[0.0], [4.0], [2.0]], [[0.0], [1.0], [2.0]])), 4)
        0.3333

    References:
        Cao et al. 2022 (PKD), section 3, arXiv:2207.02039; its weight depends on the detector.
    """

    gives: ClassVar[str] = "batch"
    _formula = staticmethod(pearson_feature)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "pearson_feature_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class NeuronSelectivityLoss(FormulaLoss):
    r"""Squared maximum mean discrepancy of the channels' maps, averaged over the examples.

    .. math:: \overline{k(s_i, s_j)} + \overline{k(t_i, t_j)} - 2 \overline{k(s_i, t_j)}, \qquad
        k(a, b) = \left(\frac{a \cdot b}{\|a\| \|b\|}\right)^2

    The bars are means over pairs of channels. It needs no adapter. The usual weight is 50. See
    :func:`keras_distill.functional.neuron_selectivity`.

    Args:
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with feature maps ``(N, H, W, C)`` of the teacher, then the student; C may differ.

    Example:
        >>> round(float(NeuronSelectivityLoss()([[[[1.0, 2.0], [0.0, 0.0]]]], [[[[3.0], [4.0]]]])), 4)
        1.28

    References:
        Huang and Wang 2017, section 4, arXiv:1707.01219, with the polynomial kernel of d = 2 and c = 0; deviation:
        without the factor 1/2 that the paper gives its term.
    """

    channels_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "examples"
    _formula = staticmethod(neuron_selectivity)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "neuron_selectivity_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class CKALoss(FormulaLoss):
    r"""One minus the linear centred kernel alignment (CKA) of the two models' features of a batch.

    .. math:: 1 - \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    X and Y are the features, one row per example, with centred columns. It needs no adapter, and the features may have
    any shapes. See :func:`keras_distill.functional.centered_kernel_alignment`.

    Args:
        reduction: As for every Keras loss, but without effect: the loss is one number for the whole batch.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar from 0 to 1 when called with features ``(N, ...)`` of the teacher, then the student.

    Example:
        >>> round(float(CKALoss()([[1.0], [0.0], [4.0]], [[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])), 4)
        0.9343

    References:
        Kornblith et al. 2019, equation 4, arXiv:1905.00414; with the biased estimate of HSIC. There it is a measure and
        not a loss, so the paper gives no weight.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(centered_kernel_alignment)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "cka_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_distill")
class PatientLoss(FormulaLoss):
    r"""Mean squared difference of channel vectors of length one, averaged over examples and positions.

    .. math:: \frac{1}{N C} \sum_{n,c} \left( \frac{f^s_{nc}}{\|f^s_n\|_2} - \frac{f^t_{nc}}{\|f^t_n\|_2} \right)^2

    Meant for the first token's hidden state of several layers: make the tap select the token. The usual weight is 10
    to 1000. See :func:`keras_distill.functional.normalized_mse`.

    Args:
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)`` of the teacher, then the
        student.

    Example:
        >>> round(float(PatientLoss()([[2.0, 0.0], [0.0, 5.0]], [[3.0, 4.0], [1.0, 0.0]])), 4)
        0.7

    References:
        Sun et al. 2019 (Patient KD), equation 7, arXiv:1908.09355; deviation: the mean over the channels, as in the
        authors' code, where the equation has the sum.
    """

    _formula = staticmethod(normalized_mse)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "patient_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        return self._values(y_pred, y_true, per_position=True)


@keras.saving.register_keras_serializable(package="keras_distill")
class FeatureMapTransferLoss(FormulaLoss):
    r"""Mean squared difference after a layer normalisation without weights, averaged over examples and positions.

    .. math:: \frac{1}{N C} \sum_{n,c} (\hat f^s_{nc} - \hat f^t_{nc})^2, \qquad
        \hat f_{nc} = \frac{f_{nc} - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}}

    For the hidden states of transformers, layer by layer. See :func:`keras_distill.functional.feature_map_transfer`.

    Args:
        eps: Added to the variance, at least 0.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)`` of the teacher, then the
        student.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``eps`` is less than 0.

    Example:
        >>> round(float(FeatureMapTransferLoss()([[0.0, 4.0, 2.0]], [[1.0, 2.0, 3.0]])), 4)
        1.0

    References:
        Sun et al. 2020 (MobileBERT), section 3.5 and equation 2, arXiv:2004.02984: the discrepancy of the normalised
        feature maps, not that of their statistics; deviation: a vector that is constant up to rounding becomes zero.
        The paper gives no weight.
    """

    _formula = staticmethod(feature_map_transfer)

    def __init__(
        self,
        *,
        eps: float = 1e-12,
        reduction: str | None = "sum_over_batch_size",
        name: str = "feature_map_transfer_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.non_negative("eps", eps)
        self._fix(eps=float(eps))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        return self._values(y_pred, y_true, per_position=True)
