"""The launcher's built-in training, with ``compile`` and ``fit``."""

from __future__ import annotations

from typing import Any

import keras

from distill_core.launcher import conf
from keras_distill.teachers import chosen_inputs
from keras_distill.whole_steps import ModelOfWholeSteps


@keras.saving.register_keras_serializable(package="keras_distill")
class StudentAlone(ModelOfWholeSteps):
    """A model that trains a student on its labels alone; the student itself is not compiled.

    Args:
        student: The model to train.

    Example:
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> tuple(StudentAlone(student)(keras.ops.ones((2, 4))).shape)
        (2, 3)
    """

    def __init__(self, student: keras.Model, **kwargs: Any) -> None:
        super().__init__(dtype=student.dtype_policy, autocast=False, **kwargs)
        self.student = student

    def build(self, input_shape: Any) -> None:
        """No-op: the student builds itself."""
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's output."""
        return self.student(chosen_inputs(self.student, inputs), training=training)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {"student": keras.saving.serialize_keras_object(self.student), "name": self.name}


def optimizer_of(settings: conf.Optimizer | None) -> Any:
    """The configured optimizer.

    Args:
        settings: The optimizer's section, or None.

    Returns:
        A new optimizer; AdamW if ``settings`` is None.

    Example:
        >>> optimizer_of(conf.Optimizer(SGD={"learning_rate": 0.5, "momentum": 0.75})).momentum
        0.75
    """
    if settings is None:
        return keras.optimizers.AdamW()
    name, values = conf.only_setting(settings)
    values["weight_decay"] = values.get("weight_decay") or None  # Keras would still run the update for a decay of 0
    if name == "AdamW" and settings.AdamW is not None and settings.AdamW.weight_decay is None:
        del values["weight_decay"]  # its own default
    return getattr(keras.optimizers, name)(**values)
