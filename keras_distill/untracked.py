"""A Keras model with a teacher that Keras does not track: neither counted, nor trained, nor saved."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.step import DistillStep


@keras.saving.register_keras_serializable(package="keras_distill")
class ModelWithTeacher(keras.Model):
    """The part of :class:`keras_distill.DistillModel` that keeps the teacher out of Keras' sight.

    Attributes:
        step: The step that holds the teacher.
        save_teacher: Whether files of the model hold the teacher too.
    """

    step: DistillStep
    save_teacher: bool
    train_function: Any
    test_function: Any

    @property
    def teacher(self) -> Any:
        """The teacher, or the list of several; another may be assigned, with which training then goes on."""
        return self.step.teacher

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self.step.teacher = teacher

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Keras, but for the teacher, which must not become a layer of this model."""
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Every attribute but the teacher: Keras saves what is listed here."""
        return [name for name in super().__dir__() if name != "teacher" or self.save_teacher]

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """Variables that no gradient changes; on JAX the teacher's among them, since its steps see no others."""
        own: list[keras.Variable] = super().non_trainable_variables
        step: DistillStep | None = self.__dict__.get("step")  # Keras asks before it exists
        if keras.backend.backend() != "jax" or step is None:
            return own
        known = {id(variable) for variable in [*own, *super().trainable_variables]}
        teachers = [variable for live in step.teachers for variable in live.model.variables]
        return own + [variable for variable in teachers if id(variable) not in known]
