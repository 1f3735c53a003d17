"""Compiled models that are used again with other weights, so that TensorFlow traces their step once for all seeds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_distill.callbacks import scheduled_settings
from keras_distill.model import DistillModel


@dataclass(frozen=True)
class Compiled:
    """A model that has been compiled, and its optimizer at the start.

    Args:
        student: The student.
        model: The model that is trained: the student, or a DistillModel of it.
        optimizer: The initial values of the optimizer's variables.
    """

    student: keras.Model
    model: keras.Model
    optimizer: list[Any]

    def started(self, fresh: keras.Model) -> bool:
        """Set the model to the state of a fresh one, and the optimizer to its start.

        Args:
            fresh: A model of the same kind that has not been trained.

        Returns:
            Whether the two have variables of the same shapes; otherwise nothing is changed.
        """
        own, others = _state_of(self.model), _state_of(fresh)
        if [variable.shape for variable in own] != [variable.shape for variable in others]:
            return False
        for variable, other in zip(own, others, strict=True):
            variable.assign(other)
        for variable, value in zip(self.model.optimizer.variables, self.optimizer, strict=True):
            variable.assign(value)
        return True


@dataclass
class CompiledModels:
    """The compiled models of a comparison by method and number of steps. Other processes get none of them."""

    kept: dict[Hashable, Compiled] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return CompiledModels, ()

    def keep(self, key: Hashable, student: keras.Model, model: keras.Model) -> None:
        """Keep a compiled model before its training, unless more than its variables changes in a training.

        Args:
            key: The method and the number of steps.
            student: The student.
            model: The model that is trained.
        """
        if not model.optimizer.built or (isinstance(model, DistillModel) and _changes_itself(model)):
            return
        values = [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
        self.kept[key] = Compiled(student, model, values)


def _state_of(model: keras.Model) -> list[Any]:
    """The variables without those of the metrics, which each epoch sets to 0."""
    return [*model.trainable_variables, *model.non_trainable_variables]


def _changes_itself(model: DistillModel) -> bool:
    """Whether a training changes more of a model than its variables."""
    step = model.step
    follows = bool(step.averages) or bool(scheduled_settings(model))
    return follows or any(term.measuring for term in step.terms)
