"""A temperature that is learned against the student."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.schedules import Cosine, Schedule, deserialized, first_value, serialized

__all__ = ["CurriculumTemperature"]


@keras.saving.register_keras_serializable(package="keras_distill")
class CurriculumTemperature(keras.layers.Layer):
    r"""Temperature that is learned to make the loss harder for the student, by gradient reversal.

    .. math:: T = T_{min} + (T_{max} - T_{min}) \, \sigma(\theta), \qquad
        \text{gradient of } \theta = -\lambda \frac{\partial L}{\partial \theta}

    One number is learned for all examples. It is trained by the model's optimizer, saved with the distillation model,
    and logged as ``<term>_temperature``. The reversal weight :math:`\lambda` grows from 0 to 1 over the first epochs,
    so that the task becomes harder little by little.

    Pass it as ``temperature=`` of SoftTargetLoss, SoftCrossEntropyLoss, DecoupledKDLoss, NormalizedKDLoss,
    WeightedSoftLabelLoss or DISTLoss in a LogitsDistillation or SequenceDistillation. Other losses refuse it. Each
    model learns its own.

    Args:
        minimum: Least temperature, greater than 0.
        maximum: Largest temperature, greater than ``minimum``.
        reversal_weight: The weight :math:`\lambda`, 0 or greater, a number or a schedule; ``None`` is
            ``Cosine(0.0, 1.0, duration=10, over="epochs")``.
        **kwargs: Settings of a layer.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> temperature = CurriculumTemperature()
        >>> round(float(ops.convert_to_numpy(temperature.value)), 4), temperature.reversal_weight
        (15.6212, 0.0)

    References:
        Li et al. 2023 (CTKD), sections 3.2 and 3.3, arXiv:2211.16231, the global temperature from 1 to 21, with the
        schedule over 10 epochs; :math:`\theta` begins at 1, as in the authors' code.
    """

    def __init__(
        self,
        minimum: float = 1.0,
        maximum: float = 21.0,
        *,
        reversal_weight: float | Schedule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"dtype": keras.backend.result_type(keras.config.floatx(), "float32"), **kwargs})
        checks.positive("minimum", minimum)
        checks.number("maximum", maximum)
        if not maximum > minimum:
            expected = "`maximum` to be greater than `minimum`"
            raise ValueError(checks.message(expected, f"{maximum!r} and {minimum!r}"))
        self.minimum, self.maximum = float(minimum), float(maximum)
        standard = Cosine(0.0, 1.0, duration=10, over="epochs")
        self.schedules: dict[str, Schedule] = {}
        chosen = standard if reversal_weight is None else reversal_weight
        self.reversal_weight = first_value("reversal_weight", chosen, checks.non_negative, self.schedules)
        self.theta = self.add_weight(name="theta", shape=(), initializer="ones")
        self.built = True

    @property
    def value(self) -> Any:
        """The temperature, a scalar."""
        return self.minimum + (self.maximum - self.minimum) * ops.sigmoid(ops.convert_to_tensor(self.theta))

    def call(self, reversal_weight: Any = None) -> Any:
        """The temperature, with a reversed gradient.

        Args:
            reversal_weight: A number or a variable; ``None`` is the layer's own number.

        Returns:
            A scalar.
        """
        value, weight = self.value, self.reversal_weight if reversal_weight is None else reversal_weight
        still = ops.stop_gradient(value)
        # exactly the value: the difference is 0, and its gradient is minus one
        return still + ops.cast(ops.convert_to_tensor(weight), value.dtype) * (still - value)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        weight = serialized(self.schedules.get("reversal_weight"), self.reversal_weight)
        own = {"minimum": self.minimum, "maximum": self.maximum, "reversal_weight": weight}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CurriculumTemperature:
        """The temperature that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    def __repr__(self) -> str:
        weight = self.schedules.get("reversal_weight", self.reversal_weight)
        return f"CurriculumTemperature(minimum={self.minimum}, maximum={self.maximum}, reversal_weight={weight!r})"
