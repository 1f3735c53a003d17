"""The loss between factors: learned summaries of the two models' features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.factors import factor_transfer
from keras_distill.functional.features import feature_mse
from keras_distill.functional.inputs import prepare, prepare_number
from keras_distill.losses.base import DistillationLoss
from keras_distill.losses.networks import Network, built, check_ranks, wide_layer
from keras_distill.schedules import Schedule

__all__ = ["FactorTransferLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class FactorTransferLoss(DistillationLoss):
    r"""Difference of two learned factors of length one, plus the error with which the teacher's is turned back.

    .. math:: w_f \frac{1}{N D} \sum_n \sum_d \left| \frac{T(f^s_n)_d}{\|T(f^s_n)\|_2}
        - \frac{P(f^t_n)_d}{\|P(f^t_n)\|_2} \right|^p + w_r \, \mathrm{mean} \left( R(P(f^t)) - f^t \right)^2

    Three networks are learned, of three convolutions of width 3 each (dense layers for vectors) with leaky ReLUs: the
    translator T of the student's feature, the paraphraser P of the teacher's, and R, which restores the teacher's
    feature from its factor. P and R learn from the second part alone, without labels and without the student: no
    gradient of the first part reaches them. No adapter is needed. Inside a FeatureDistillation the networks are made,
    trained and saved as adapters are. See :func:`keras_distill.functional.factor_transfer`.

    The paper trains the paraphraser before the student. Here it learns alongside by default. For the paper's order let
    ``factor_weight`` be 0 at first: ``factor_weight=Step([0.0, 1.0], boundaries=[5])``. Both parts are multiplied by
    the weight of the term: with an optimizer that sees the scale, such as SGD, divide ``reconstruction_weight`` by it.

    Args:
        rate: Channels of a factor as a share of the teacher's channels, greater than 0.
        power: The exponent p of the differences, at least 1.
        factor_weight: Weight of the first part, 0 or greater, or a schedule.
        reconstruction_weight: Weight of the second part, 0 or greater, or a schedule. At 0 the paraphraser stays as it
            is.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, H, W, C)``, ``(N, L, C)`` or ``(N, C)`` of the teacher, then the
        student's at the same positions; C may differ.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = FactorTransferLoss(rate=0.5)
        >>> loss.build((None, 4, 4, 3), (None, 4, 4, 8))
        >>> [tuple(part.kernel.shape[2:]) for part in loss.layer.translator.parts]
        [(3, 3), (3, 4), (4, 4)]

    References:
        Kim et al. 2018, section 3, arXiv:1802.04977, with rate 0.5, power 1 and a weight of 500 on the last map before
        the classifier; deviations: the mean over a factor instead of the sum, as in the authors' code; the paraphraser
        is trained along with the student unless ``factor_weight`` has a schedule; no batch normalisation in the
        networks; tokens and vectors, by the same rule.
    """

    channels_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        *,
        rate: float = 0.5,
        power: float = 1.0,
        factor_weight: float | Schedule = 1.0,
        reconstruction_weight: float | Schedule = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "factor_transfer_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.positive("rate", rate)
        checks.at_least("power", power, 1)
        self._fix(rate=float(rate), power=float(power))
        self.factor_weight = self._setting("factor_weight", factor_weight, checks.non_negative)
        self.reconstruction_weight = self._setting("reconstruction_weight", reconstruction_weight, checks.non_negative)

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the three networks for features of these shapes, replacing earlier ones."""
        check_ranks(student, teacher)
        narrow, wide = student[-1], teacher[-1]
        factor = max(1, int(self.rate * (wide or 1)))
        self.layer = keras.layers.Layer(name="factors", dtype=self.dtype)
        self.layer.translator = self._network("translator", student, narrow, factor, factor)
        self.layer.paraphraser = self._network("paraphraser", teacher, wide, factor, factor)
        self.layer.restorer = self._network("restorer", (*teacher[:-1], factor), factor, wide, wide)
        self.layer.built = True

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        networks = built(self.layer)
        student, teacher = prepare(y_pred, y_true)
        factor = networks.paraphraser(teacher)
        distance = factor_transfer(networks.translator(student), factor, power=self.power)
        error = feature_mse(networks.restorer(factor), teacher)
        weights = [
            prepare_number(name, getattr(self, name), error, checks.non_negative)
            for name in ("factor_weight", "reconstruction_weight")
        ]
        return weights[0] * ops.cast(distance, error.dtype) + weights[1] * error

    def _network(self, name: str, shape: Sequence[int | None], *channels: int | None) -> Network:
        layers = [wide_layer(len(shape), wide, _leaky, self.dtype) for wide in channels]
        network = Network(layers, name=name, dtype=self.dtype)
        network.build(tuple(shape))
        return network


def _leaky(feature: Any) -> Any:
    return ops.maximum(feature, 0.1 * feature)  # TensorFlow's own rounds the slope to float32
