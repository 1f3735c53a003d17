"""The launcher's built-in training, with ``compile`` and ``fit``."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.launcher import conf
from keras_distill.model import DistillModel
from keras_distill.terms import LogitsDistillation


@keras.saving.register_keras_serializable(package="keras_distill")
class StudentAlone(DistillModel):
    """A student that trains on its labels alone: a teacher without weight never runs.

    Args:
        student: The model to train.
        task_weight: Factor of the compiled loss, 0 or greater.

    Example:
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> StudentAlone(student, 0.5).teacher is None
        True
    """

    def __init__(self, student: keras.Model, task_weight: float) -> None:
        super().__init__(
            student,
            terms=LogitsDistillation(weight=0.0),
            task_weight=task_weight,
            evaluate_distillation=False,
            track_agreement=False,
            name="student_alone",
        )


def optimizer_of(settings: conf.Optimizer | None) -> Any:
    """The configured optimizer.

    Args:
        settings: The optimizer's section, if there is one.

    Returns:
        A new optimizer; AdamW where there is no section.

    Example:
        >>> optimizer_of(conf.Optimizer(SGD={"learning_rate": 0.5, "momentum": 0.75})).momentum
        0.75
    """
    if settings is None:
        return keras.optimizers.AdamW()
    name, values = next(iter(settings.model_dump(exclude_none=True).items()))
    values["weight_decay"] = values.get("weight_decay") or None  # Keras takes 0 for a decay of its own
    if name == "AdamW" and settings.AdamW is not None and settings.AdamW.weight_decay is None:
        del values["weight_decay"]  # its own default
    return getattr(keras.optimizers, name)(**values)
