"""Losses with parameters of their own, which are trained along with the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.learned import log_sum_distance, masked_generative, variational_information
from keras_distill.losses.base import DistillationLoss

__all__ = ["MaskedGenerativeLoss", "SimpleRecipeLoss", "VariationalInformationLoss"]

_CONVOLUTIONS: Final[dict[int, Any]] = {3: keras.layers.Conv1D, 4: keras.layers.Conv2D, 5: keras.layers.Conv3D}
_SMALLEST_VARIANCE = 1e-5


@keras.saving.register_keras_serializable(package="keras_distill")
class VariationalInformationLoss(DistillationLoss):
    r"""Negative log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts.

    .. math:: \frac{1}{N D} \sum_n \sum_d \frac{1}{2} \left( \frac{(\mu(f^s_n)_d - f^t_{nd})^2}{\sigma_{c(d)}^2}
        + \log \sigma_{c(d)}^2 \right), \qquad \sigma_c^2 = \log(1 + e^{\rho_c}) + 10^{-5}

    The mean :math:`\mu` is learned, and so is the variance of each channel. The mean is three 1x1 convolutions (linear
    maps at every position) without bias, as wide as the teacher's feature, with a ReLU between them. It maps the
    student's channels to the teacher's: no adapter is needed. Inside a FeatureDistillation the parameters are made,
    trained and saved as adapters are. See :func:`keras_distill.functional.variational_information`.

    Args:
        initial_variance: Variance of every channel at first, 1e-4 or greater.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar in nats, which may be negative, when called with features ``(N, ..., C)`` of the teacher, then the
        student's at the same positions; C may differ.

    Raises:
        TypeError: If ``initial_variance`` is not a number.
        ValueError: If ``initial_variance`` is less than 1e-4.

    Example:
        >>> loss = VariationalInformationLoss(initial_variance=2.0)
        >>> loss.build((None, 3), (None, 2))
        >>> round(float(loss([[1.0, 3.0]], [[0.0, 0.0, 0.0]])), 4)
        1.5966

    References:
        Ahn et al. 2019, equations 5 and 6, arXiv:1904.05835; deviation: the mean instead of the sum over channels and
        positions, as in published code, which has a weight of 1.
    """

    channels_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    def __init__(
        self,
        *,
        initial_variance: float = 5.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "variational_information_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.at_least("initial_variance", initial_variance, 1e-4)
        self._fix(initial_variance=float(initial_variance))

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the mean and the variances for features of these shapes, replacing earlier ones."""
        _check_ranks(student, teacher)
        wide, kinds = teacher[-1], ("relu", "relu", None)
        layers = [keras.layers.Dense(wide, kind, use_bias=False, dtype=self.dtype) for kind in kinds]
        self.layer = _Network(layers, name="mean", dtype=self.dtype)
        excess = self.initial_variance - _SMALLEST_VARIANCE
        # the inverse of softplus, in the form that neither overflows nor cancels
        rho = keras.initializers.Constant(excess + math.log(-math.expm1(-excess)))
        self.layer.rho = self.layer.add_weight(name="rho", shape=(wide,), dtype=self.dtype, initializer=rho)
        self.layer.build(tuple(student))

    @property
    def variance(self) -> Any:
        """Variance of each channel of the teacher, shape ``(C,)``."""
        return ops.softplus(built(self.layer).rho) + _SMALLEST_VARIANCE

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        mean = built(self.layer)
        return variational_information(y_pred, y_true, mean=mean, variance=self.variance, per_position=True)


@keras.saving.register_keras_serializable(package="keras_distill")
class MaskedGenerativeLoss(DistillationLoss):
    r"""Squared error of the teacher's feature as generated from the part of the student's that a random mask keeps.

    .. math:: \frac{1}{N} \sum_n \sum_d \left( G(m_n \odot f^s_n)_d - f^t_{nd} \right)^2

    The generator G is learned: two convolutions of width 3 with a ReLU between them, over height and width for maps and
    over the sequence for tokens; for vectors two linear maps. Inside a FeatureDistillation its parameters are made,
    trained and saved as adapters are, and where the channels differ the term's adapter makes them equal before the
    mask. The mask is drawn as dropout is: from a generator of its own, which follows ``keras.utils.set_random_seed``,
    and not while a DistillModel is evaluated. The sum makes values large: the paper's weights are 7e-5 and smaller.
    See :func:`keras_distill.functional.masked_generative`.

    Args:
        mask_ratio: Share of the feature that is hidden, at least 0 and less than 1.
        mask: ``"spatial"`` hides all channels at a position (published for dense prediction), ``"channel"`` hides all
            positions of a channel (published for classification).
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, H, W, C)``, ``(N, L, C)`` or ``(N, C)`` of the teacher, then the
        student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``mask_ratio`` is out of range or ``mask`` is unknown.

    Example:
        >>> loss = MaskedGenerativeLoss(mask_ratio=0.5, mask="channel")
        >>> loss.build((None, 3, 3, 4), (None, 3, 3, 4))
        >>> [tuple(variable.shape) for variable in loss.layer.trainable_variables]
        [(3, 3, 4, 4), (4,), (3, 3, 4, 4), (4,)]

    References:
        Yang et al. 2022, section 3, arXiv:2205.01529, for maps; deviation: tokens and vectors, by the same rule. The
        authors' code hides 0.15 of the channels for ImageNet (weight 7e-5); of the positions 0.75 for segmentation,
        0.65 for one-stage (both 2e-5) and 0.45 for two-stage detectors (5e-7).
    """

    learned: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        mask: Literal["spatial", "channel"] = "spatial",
        reduction: str | None = "sum_over_batch_size",
        name: str = "masked_generative_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.fraction("mask_ratio", mask_ratio)
        checks.one_of("mask", mask, ("spatial", "channel"))
        self._fix(mask_ratio=float(mask_ratio), mask=mask)

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the generator for features of these shapes, replacing an earlier one."""
        _check_ranks(student, teacher)
        if self.mask == "spatial" and len(student) < 3:
            expected = "the student's feature to have positions for mask='spatial'"
            raise ValueError(checks.message(expected, f"shape {tuple(student)}", "Pass mask='channel'."))
        layers = [_wide_layer(len(teacher), teacher[-1], kind, self.dtype) for kind in ("relu", None)]
        self.layer = _Network(layers, name="generator", dtype=self.dtype)
        if self.mask_ratio > 0:
            self.layer.seed_generator = keras.random.SeedGenerator()
            self.layer.seed_state = self.layer.seed_generator.state  # a weight too, which files keep
        self.layer.build(tuple(student))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        generator = built(self.layer)
        return masked_generative(y_pred, y_true, generator=generator, mask=self._drawn(y_pred))

    def _drawn(self, student: Any) -> Any:
        """A mask for a batch, 1 where the feature stays."""
        if self.mask_ratio == 0 or self.training is False:
            return None
        *outer, channels = ops.shape(student)
        shape = (outer[0], *[1] * (len(outer) - 1), channels) if self.mask == "channel" else (*outer, 1)
        drawn = keras.random.uniform(shape, dtype="float32", seed=built(self.layer).seed_generator)
        return drawn >= self.mask_ratio


@keras.saving.register_keras_serializable(package="keras_distill")
class SimpleRecipeLoss(DistillationLoss):
    r"""Logarithm of the summed powers of the differences between two batch-normalised features, one projected.

    .. math:: \log \sum_n \sum_c |\hat z^s_{nc} - \hat z^t_{nc}|^a, \qquad
        z^s_n = W \bar f^s_n, \quad z^t_n = \bar f^t_n, \quad
        \hat z_{nc} = \frac{z_{nc} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

    The projection W is learned: one linear map without a bias, from the student's channels to the teacher's, after an
    average over the positions. No adapter is needed, and the positions may differ. Inside a FeatureDistillation the
    projection is made, trained and saved as adapters are. The statistics are those of the batch: the value grows with
    the logarithm of its size, may be negative, and is 0 for a batch of one example. See
    :func:`keras_distill.functional.log_sum_distance`.

    Args:
        power: The exponent a of the differences, at least 1; may be set while training.
        eps: Added to the variances, greater than 0.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, H, W, C_s)``, ``(N, L, C_s)`` or ``(N, C_s)`` of the teacher, then the
        student's of the same examples.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = SimpleRecipeLoss()
        >>> loss.build((None, 4, 4, 8), (None, 16))
        >>> [tuple(variable.shape) for variable in loss.layer.trainable_variables]
        [(8, 16)]

    References:
        Miles and Mikolajczyk 2023 (SRD), section 3, arXiv:2303.11098, with power 4, on the last feature before the
        classifier, with a weight of 2 beside a divergence of the logits; deviation: 0 in the place of the logarithm
        of 0. The authors' projection has a bias, which the normalisation removes.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    gives: ClassVar[str] = "batch"

    def __init__(
        self,
        *,
        power: float = 4.0,
        eps: float = 1e-4,
        reduction: str | None = "sum_over_batch_size",
        name: str = "simple_recipe_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.at_least("power", power, 1)
        checks.positive("eps", eps)
        self._fix(power=float(power), eps=float(eps))

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the projection for features of these shapes, replacing an earlier one."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        projection = keras.layers.Dense(teacher[-1], use_bias=False, dtype=self.dtype)
        self.layer = _Network([projection], name="projection", dtype=self.dtype)
        self.layer.build((student[0], student[-1]))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """A scalar."""
        return log_sum_distance(y_pred, y_true, projection=built(self.layer), power=self.power, eps=self.eps)


class _Network(keras.layers.Layer):
    """Layers one after the other."""

    def __init__(self, layers: Sequence[keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = list(layers)
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)
            shape = part.compute_output_shape(shape)
        self.built = True

    def call(self, feature: Any) -> Any:
        for part in self.parts:
            feature = part(feature)
        return feature


def _wide_layer(rank: int, channels: int | None, activation: str | None, dtype: Any) -> keras.layers.Layer:
    """A convolution of width 3; for vectors, which have no positions, a dense layer."""
    if rank == 2:
        return keras.layers.Dense(channels, activation, dtype=dtype)
    settings = {"padding": "same", "data_format": "channels_last", "activation": activation, "dtype": dtype}
    return _CONVOLUTIONS[rank](channels, 3, **settings)


def _check_ranks(student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
    if len(student) != len(teacher) or not 2 <= len(student) <= 5:
        expected = "`student` and `teacher` to have the same number of dimensions, 2 to 5"
        received = f"{tuple(student)} and {tuple(teacher)}"
        raise ValueError(checks.message(expected, received, "Pass adapter=<a layer>."))


def built(layer: Any) -> Any:
    """The layer of a learned loss.

    Raises:
        ValueError: If it was not made yet.
    """
    if layer is None:
        remedy = "Call loss.build(student.shape, teacher.shape) once, or use the loss in a FeatureDistillation."
        raise ValueError(checks.message("the loss to be built before it is called", "no parameters", remedy))
    return layer
