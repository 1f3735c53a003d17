"""A Keras model that has a teacher without tracking it: Keras does not count, train or save its weights."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_distill import backends, checks, compat
from keras_distill.step import DistillStep
from keras_distill.targets import DistillTargets, stored_targets
from keras_distill.whole_steps import ModelOfWholeSteps


@keras.saving.register_keras_serializable(package="keras_distill")
class ModelWithTeacher(ModelOfWholeSteps):
    """Base of :class:`keras_distill.DistillModel`, which hides the teacher from Keras' tracking.

    Attributes:
        step: The step that holds the teacher.
        save_teacher: Whether files of the model contain the teacher.
    """

    step: DistillStep
    save_teacher: bool
    built: bool
    optimizer: Any
    train_function: Any
    test_function: Any

    @property
    def teacher(self) -> Any:
        """The teacher, or a list of several; assign another one to continue training with it."""
        return self.step.teacher

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        strategy = getattr(self, "distribute_strategy", None)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            self.step.teacher = teacher
        self.built = self.built or self.step.built

    @property
    def teacher_weights(self) -> Any:
        """The weights of several teachers: numbers, ``"entropy"``, or None; assign numbers to change them."""
        mix = self.step.ensemble.mix
        return "entropy" if mix.by_entropy else mix.weights and list(mix.weights)

    @teacher_weights.setter
    def teacher_weights(self, weights: Any) -> None:
        self.step.ensemble.mix.assign(weights)

    def teacher_targets(self, inputs: Any, labels: Any = None) -> DistillTargets:
        """Targets with the teacher's outputs for a batch, so that the teacher runs once instead of in every epoch.

        Use it on each batch of a data set: ``data.map(lambda x, y: (x, model.teacher_targets(x, y))).cache()``.

        Args:
            inputs: The teacher's inputs for the batch.
            labels: The batch's labels, or None.

        Returns:
            Labels, and the teacher's output and features.

        Raises:
            ValueError: If the model does not have exactly one teacher, or it is an :class:`EMATeacher`, a
                :class:`SelfTeacher` or a cache.
        """
        ensemble = self.step.ensemble
        if ensemble.depends_on_student:
            expected = "a teacher that does not change, for stored outputs"
            raise ValueError(checks.message(expected, f"{self.teacher!r}", "Train with the live teacher."))
        if ensemble.size != 1:
            received = f"{ensemble.size} teachers" if ensemble.size else "teacher=None"
            remedy = "Make the targets of each teacher separately." if ensemble.size else "Set `model.teacher`."
            raise ValueError(checks.message("one teacher", received, remedy))
        if ensemble.cache is not None:
            raise ValueError(checks.message("a teacher that runs", "a cache", "Use cache.attach((x, y))."))
        taps = [tap for term in self.step.terms for tap in term.teacher_taps]
        return stored_targets(labels, self.step.teachers[0].answer(inputs), taps)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Keras, except that the teacher does not become a layer of this model."""
        if name in ("teacher", "teacher_weights"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """All attributes, without the teacher unless it is saved: Keras saves the listed ones."""
        return [name for name in super().__dir__() if name != "teacher" or self.save_teacher]

    def begin_average(self) -> None:
        """Let each :class:`EMATeacher` begin with the student's present weights, if no batch was trained on since."""
        for average in self.step.averages:
            average.begin(0 if self.optimizer is None else compat.raw_iterations(self.optimizer)[0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """On torch, where Keras calls it in each step: clear the gradients of all weights.

        torch knows the weights of a Keras model by their paths, which two adapters may share.
        """
        backends.clear_gradients(self.trainable_variables)

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """Variables without gradient; on JAX with the teacher's, since a step on JAX can only read listed variables."""
        own: list[keras.Variable] = super().non_trainable_variables
        step: DistillStep | None = self.__dict__.get("step")  # Keras reads this before `step` is set
        if keras.backend.backend() != "jax" or step is None:
            return own
        known = {id(variable) for variable in [*own, *super().trainable_variables]}
        teachers = [variable for live in step.teachers for variable in live.model.variables]
        return own + [variable for variable in teachers if id(variable) not in known]
