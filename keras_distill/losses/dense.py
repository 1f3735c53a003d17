"""Losses for dense prediction: detectors' boxes, and pixels."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.dense import localization, pixel_relation
from keras_distill.losses.base import FormulaLoss
from keras_distill.schedules import Schedule

__all__ = ["LocalizationLoss", "PixelRelationLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class LocalizationLoss(FormulaLoss):
    r"""Divergence between the two models' distributions over the bins of a box's edges, averaged over edges and boxes.

    .. math:: \frac{T^2}{4 N} \sum_n \sum_e \sum_b p^t_{neb} (\log p^t_{neb} - \log p^s_{neb}), \qquad
        p = \mathrm{softmax}(z / T)

    For detectors that predict edges as distributions (generalized focal loss). Boxes without an object should not
    count: give them a sample weight of 0, or select the others first. See
    :func:`keras_distill.functional.localization`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        bins: Number of bins B where edges and bins share the last dimension, as in the output of a head:
            ``(N, H, W, 4 B)`` or ``(N, ..., 4 B)``. None where they have a dimension each.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with scores ``(N, ..., 4, B)`` of the bins of left, top, right
        and bottom edge, of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, or ``bins`` is less than 2.

    Example:
        >>> student = [[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]]
        >>> round(float(LocalizationLoss()(keras.ops.zeros((1, 4, 2)), student)), 4)
        0.4362

    References:
        Zheng et al. 2022 (LD), section 3, arXiv:2102.12252; deviation: the mean over the edges, where the paper adds
        the four. The authors' code has a temperature of 10, and takes the mean over the bins as well.
    """

    channels_must_match: ClassVar[bool] = False  # an adapter would mix the bins
    positions_must_match: ClassVar[bool] = False
    _formula = staticmethod(localization)

    def __init__(
        self,
        temperature: float | Schedule = 10.0,
        *,
        bins: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "localization_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
        if bins is not None:
            checks.integer("bins", bins)
            checks.at_least("bins", bins, 2)
        self._fix(bins=bins)


@keras.saving.register_keras_serializable(package="keras_distill")
class PixelRelationLoss(FormulaLoss):
    r"""Divergence between the two models' similarities of pixels, within and across the images of a batch.

    .. math:: \frac{1}{N^2 P} \sum_{i,j} \sum_{p} \mathrm{KL}(a^t_{ij,p} \| a^s_{ij,p}), \qquad
        a_{ij,p} = \mathrm{softmax}_q \left( \frac{f_{ip} \cdot f_{jq}}{T \, \|f_{ip}\| \, \|f_{jq}\|} \right)

    It needs no adapter: the channels may differ. For segmentation. Memory and time grow with the square of the
    number of pixels in the batch. See :func:`keras_distill.functional.pixel_relation`.

    It has no factor :math:`T^2`: at another temperature the loss keeps its scale and the gradient shrinks.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with features ``(N, H, W, C)`` or ``(N, L, C)`` of the teacher, then the student.

    Raises:
        TypeError: If the temperature is not a number or a schedule.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> loss = PixelRelationLoss(temperature=1.0)
        >>> round(float(loss([[[3.0], [4.0]]], [[[1.0, 0.0], [0.0, 2.0]]])), 4)
        0.1201

    References:
        Yang et al. 2022 (CIRKD), arXiv:2204.06986, the term of the mini-batch, without its memory bank of
        pixels and regions.
    """

    channels_must_match: ClassVar[bool] = False
    gives: ClassVar[str] = "batch"
    _formula = staticmethod(pixel_relation)

    def __init__(
        self,
        temperature: float | Schedule = 0.1,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "pixel_relation_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
