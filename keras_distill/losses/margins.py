"""The loss that leaves alone what a ReLU cuts off, with margins from the teacher's batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from distill_core.margins import margins_of
from keras_distill import checks
from keras_distill.functional.margins import margin_relu_distance
from keras_distill.losses.base import DistillationLoss

__all__ = ["MarginReLULoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class MarginReLULoss(DistillationLoss):
    r"""Squared difference from the teacher's response, except where both are cut off by a ReLU.

    .. math:: \frac{1}{N D} \sum_n \sum_d \begin{cases} 0 & f^s_{nd} \le t_{nd} \le 0 \\
        (f^s_{nd} - t_{nd})^2 & \text{else} \end{cases}, \qquad t_{nd} = \max(f^t_{nd}, m_{c(d)})

    Take both features before the ReLU: the layers that a FeatureDistillation names are then batch normalisations. The
    margin :math:`m_c` of a channel is the mean of its negative responses. The batch normalisation's scale and shift
    give it, so it is known before the training. See :func:`keras_distill.functional.margin_relu_distance`.

    Args:
        margins: The margin of each channel, at most 0. ``None`` takes them from the teacher's layer that the term
            names, which must be a batch normalisation; the model's file keeps them.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features of equal shape, ``(N, H, W, C)``, ``(N, L, C)`` or ``(N, C)``, of the
        teacher, then the student.

    Raises:
        ValueError: If a margin is greater than 0, or none is known when the loss is called.

    Example:
        >>> loss = MarginReLULoss(margins=(-1.0, -1.0, -1.0))
        >>> round(float(loss([[1.5, -1.0, -4.0]], [[0.5, -3.0, 2.0]])), 4)
        3.3333

    References:
        Heo et al. 2019 ("overhaul"), section 3, arXiv:1904.01866; deviations: the mean instead of the sum over the
        numbers; the exact mean of the negative responses also for channels that are hardly ever negative, where
        published code takes three deviations. The paper's connector is a 1x1 convolution with a batch normalisation:
        pass it as the term's adapter.
    """

    reads_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        margins: Sequence[float] | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "margin_relu_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if margins is not None:
            margins = tuple(float(margin) for margin in margins)
            if not margins or max(margins) > 0:
                raise ValueError(checks.message("`margins` to be numbers that are at most 0", f"margins={margins}"))
        self._fix(margins=margins)
        self.reads_teacher = margins is None  # type: ignore[misc]  # given margins serve any teachers

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make room for the margins that come from the teacher, or from a file."""
        if self.margins is None:
            self.layer = keras.layers.Layer(name="margins", dtype=self.dtype, trainable=False)
            self.layer.margins = self.layer.add_weight(
                name="margins", shape=(teacher[-1],), dtype=self.dtype, trainable=False, initializer="zeros"
            )
            self.layer.built = True

    def read_teacher(self, layer_of: Callable[[str | None], keras.layers.Layer]) -> None:
        """Take the margins from the tapped layer, if none are set."""
        if self.margins is not None or self.layer is None:
            return
        layer = layer_of(None)
        if not hasattr(layer, "moving_mean"):
            remedy = "Name the batch normalisation before the ReLU, or pass margins=[one number for each channel]."
            raise ValueError(
                checks.message("the teacher's layer to be a batch normalisation", f"a {type(layer).__name__}", remedy)
            )
        channels = layer.moving_mean.shape[0]
        scales = [1.0] * channels if layer.gamma is None else ops.convert_to_numpy(layer.gamma).tolist()
        shifts = [0.0] * channels if layer.beta is None else ops.convert_to_numpy(layer.beta).tolist()
        self.layer.margins.assign(margins_of(scales, shifts))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        margins = self.margins if self.layer is None else self.layer.margins
        if margins is None:
            expected = "`margins` to be given where no term reads them from the teacher"
            raise ValueError(checks.message(expected, "margins=None", "Pass them, or use a FeatureDistillation."))
        return margin_relu_distance(y_pred, y_true, margins=margins, per_position=True)
