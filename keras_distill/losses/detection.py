"""Losses for detectors: the scores of boxes, and feature maps with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.detection import focal_global, quality_focal
from keras_distill.functional.vectors import flattened
from keras_distill.losses.base import DistillationLoss, LogitsLoss
from keras_distill.losses.networks import built
from keras_distill.schedules import Schedule

__all__ = ["FocalGlobalLoss", "QualityFocalLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class QualityFocalLoss(LogitsLoss):
    r"""Binary cross entropy of each class under the teacher's scores, weighed by the distance between the scores.

    .. math:: -\frac{1}{N C} \sum_n \sum_c |s^s_{nc} - s^t_{nc}|^\beta
        \left( s^t_{nc} \log s^s_{nc} + (1 - s^t_{nc}) \log (1 - s^s_{nc}) \right), \qquad s = \sigma(z)

    For detectors that answer each class with yes or no at very many places. See
    :func:`keras_distill.functional.quality_focal`.

    Args:
        power: The exponent :math:`\beta` of the distance, at least 1; a number or a schedule.
        from_logits: Whether the models return logits; if False they return probabilities of a sigmoid, and z is the
            logarithm of their odds.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar in nats when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``power`` is less than 1.

    Example:
        >>> round(float(QualityFocalLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.1215

    References:
        Wang et al. 2023 (CrossKD), arXiv:2306.11369, the term on the class scores, with a power of 1.
    """

    class_scores: ClassVar[bool] = True
    _formula = staticmethod(quality_focal)

    def __init__(
        self,
        *,
        power: float | Schedule = 1.0,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "quality_focal_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.power = self._setting("power", power, lambda name, value: checks.at_least(name, value, 1))


@keras.saving.register_keras_serializable(package="keras_distill")
class FocalGlobalLoss(DistillationLoss):
    r"""Differences of two feature maps inside and outside of boxes, where the teacher looks, and of their contexts.

    .. math:: \frac{1}{N} \sum_n \Big[ \sum_{p,c} (\alpha w_p + \beta b_p) A^t_p C^t_c (f^s_{pc} - f^t_{pc})^2
        + \gamma \Big( \sum_p |A^s_p - A^t_p| + \sum_c |C^s_c - C^t_c| \Big)
        + \lambda \sum_{p,c} \left( G^s(f^s) - G^t(f^t) \right)_{pc}^2 \Big]

    Objects and background are weighed apart, and both by the teacher's attention :math:`A^t`, :math:`C^t` over
    positions and channels. The contexts G are learned: each adds to a map what it reads from all its positions. Inside
    a FeatureDistillation with ``boxes=...`` they are made, trained and saved as adapters are. In a loop of your own
    :meth:`build` makes them, in ``loss.layer``. See :func:`keras_distill.functional.focal_global`.

    Args:
        temperature: Softening of both attentions, greater than 0; a number or a schedule.
        foreground_weight: The factor :math:`\alpha` of the positions in boxes, a number or a schedule.
        background_weight: The factor :math:`\beta` of the positions outside.
        attention_weight: The factor :math:`\gamma` of the attentions.
        context_weight: The factor :math:`\lambda` of the contexts.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with the pair of the teacher's map ``(N, H, W, C)`` and the weights of
        :func:`keras_distill.functional.foreground_weights`, shape ``(N, H, W)``, then the student's map.

    Raises:
        TypeError: If a setting is not a number or a schedule.
        ValueError: If the temperature is not greater than 0, or a weight is negative.

    Example:
        >>> loss = FocalGlobalLoss(foreground_weight=1.0, attention_weight=0.0, context_weight=0.0)
        >>> loss.build((None, 1, 2, 1), (None, 1, 2, 1))
        >>> teacher, foreground = ops.array([[[[3.0], [0.0]]]]), ops.array([[[1.0, 0.0]]])
        >>> round(float(loss((teacher, foreground), [[[[1.0], [2.0]]]])), 4)
        7.9802

    References:
        Yang et al. 2022 (FGD), arXiv:2111.11837; the defaults are those of its code for RetinaNet. For two-stage
        detectors it has 5e-5, 2.5e-5, 5e-5 and 5e-7.
    """

    learned: ClassVar[bool] = True
    needs_boxes: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        temperature: float | Schedule = 0.5,
        *,
        foreground_weight: float | Schedule = 1e-3,
        background_weight: float | Schedule = 5e-4,
        attention_weight: float | Schedule = 1e-3,
        context_weight: float | Schedule = 5e-6,
        reduction: str | None = "sum_over_batch_size",
        name: str = "focal_global_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)
        self.foreground_weight = self._setting("foreground_weight", foreground_weight, checks.non_negative)
        self.background_weight = self._setting("background_weight", background_weight, checks.non_negative)
        self.attention_weight = self._setting("attention_weight", attention_weight, checks.non_negative)
        self.context_weight = self._setting("context_weight", context_weight, checks.non_negative)

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make both contexts for maps of these shapes, replacing earlier ones."""
        if len(student) != 4 or len(teacher) != 4:
            expected = "`student` and `teacher` to be maps (N, H, W, C)"
            raise ValueError(checks.message(expected, f"shapes {tuple(student)} and {tuple(teacher)}"))
        self.layer = _Contexts(student[-1], teacher[-1], name="contexts", dtype=self.dtype)
        self.layer.build(None)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of a batch, a scalar unless ``reduction`` is None."""
        if not isinstance(y_true, (tuple, list)) or len(y_true) != 2:
            remedy = "Make the weights with keras_distill.functional.foreground_weights."
            expected = "`y_true` to be the pair (teacher_map, foreground_weights)"
            raise ValueError(checks.message(expected, f"a {type(y_true).__name__}", remedy))
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        teacher, foreground = y_true
        contexts = built(self.layer)
        return focal_global(
            y_pred,
            teacher,
            foreground,
            student_context=contexts.student_context,
            teacher_context=contexts.teacher_context,
            **{name: getattr(self, name) for name in self._numbers},
        )


class _Contexts(keras.layers.Layer):
    """The contexts of both models."""

    def __init__(self, student: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.student_context = _Context(student, name="student_context", dtype=self.dtype_policy)
        self.teacher_context = _Context(teacher, name="teacher_context", dtype=self.dtype_policy)

    def build(self, shape: Any) -> None:
        self.student_context.build(None)
        self.teacher_context.build(None)
        self.built = True


class _Context(keras.layers.Layer):
    """Adds to a map what is read from all its positions: attention, a narrow layer, normalisation, a wide layer."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, dtype = channels, self.dtype_policy
        self.narrow = max(channels // 2, 1)
        self.attention, self.reduce = keras.layers.Dense(1, dtype=dtype), keras.layers.Dense(self.narrow, dtype=dtype)
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype)
        self.expand = keras.layers.Dense(channels, kernel_initializer="zeros", dtype=dtype)  # at first nothing is added

    def build(self, shape: Any) -> None:
        self.attention.build((None, self.channels))
        self.reduce.build((None, self.channels))
        self.norm.build((None, self.narrow))
        self.expand.build((None, self.narrow))
        self.built = True

    def call(self, feature: Any) -> Any:
        rows = flattened(feature, 1, 3)
        read = ops.sum(ops.softmax(self.attention(rows), axis=1) * rows, axis=1)
        return feature + self.expand(ops.relu(self.norm(self.reduce(read))))[:, None, None, :]
