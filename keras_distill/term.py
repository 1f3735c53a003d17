"""The base class of the terms, and of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops  # noqa: F401 - the example uses it

from keras_distill import backends, checks
from keras_distill.taps import Call, Tap


class DistillationTerm(keras.layers.Layer):
    """A loss at a place, with a weight: the base class of the terms, and of a user's own.

    A subclass implements :meth:`compute`; it names the layers that it reads in ``student_taps`` and ``teacher_taps``,
    and makes what depends on the features' shapes in :meth:`build_from_calls`. Its weights are trained along with the
    student's, saved with the distillation model, and absent from the student's own file.

    Args:
        weight: Factor of the term in the total loss, 0 or greater; kept in a variable, which may be set while training.
            0 skips the term's work in training, if it is there at first or by a schedule (see :attr:`may_rest`).
        name: Name in logs and files, distinct among the terms.
        use_sample_weight: Whether the batch's sample weights count in the term. False where a weight of 0 only says
            that an example has no label: the task loss then leaves it out, and the term learns from it.

    Attributes:
        student_taps: Layers of the student that the term reads.
        teacher_taps: Layers of the teacher that the term reads.
        needs_labels: Whether :meth:`compute` is given the batch's labels.
        weight_is_scheduled: Whether a :class:`DistillationScheduler` changes the weight.

    Raises:
        ValueError: If ``weight`` is negative or not finite, or ``name`` is empty, taken by the library or has a
            separator in it.
        TypeError: If ``weight`` is not a number.

    Example:
        >>> class MeanGap(DistillationTerm):
        ...     def compute(self, student, teacher, labels=None, sample_weight=None):
        ...         return ops.abs(ops.mean(student.output) - ops.mean(teacher.output))
        >>> term = MeanGap(weight=0.5, name="gap")
        >>> float(term.compute(Call(ops.ones((2, 3))), Call(3.0 * ops.ones((2, 3)))))
        2.0
    """

    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    needs_labels: bool = False
    weight_is_scheduled: bool = False

    def __init__(self, *, weight: float = 1.0, name: str, use_sample_weight: bool = True, **kwargs: Any) -> None:
        checks.non_negative("weight", weight)
        checks.boolean("use_sample_weight", use_sample_weight)
        if not isinstance(name, (str, type(None))):
            raise TypeError(checks.message("`name` to be a string", f"name={name!r}"))
        if not name or name in ("task", "distillation"):  # the log has a task_loss and a distillation_loss of its own
            raise ValueError(checks.message("`name` to be neither empty, 'task' nor 'distillation'", f"name={name!r}"))
        if "/" in name or "." in name:  # Keras separates layers by the one, torch by the other
            raise ValueError(checks.message("`name` to hold neither '/' nor '.'", f"name={name!r}", "Use '_'."))
        super().__init__(name=name, **kwargs)
        self._settings: list[keras.Variable] = []
        self._weight = self._setting("weight", weight)
        self.use_sample_weight = use_sample_weight

    @property
    def weight(self) -> keras.Variable:
        """Factor of the term in the total loss, a scalar variable; a number may be assigned to it."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        checks.non_negative("weight", value)
        self._weight.assign(value)
        self._weight.exact = float(value)

    @property
    def may_rest(self) -> bool:
        """Whether a step of training may leave the term out while its weight is 0.

        A step that is traced keeps a branch for it, which costs a little: only where the weight is 0 now or follows a
        schedule, and not where the term has a state of its own, such as a layer of batch normalisation in its adapter.
        """
        settings = {id(variable) for variable in self._settings}
        if any(id(variable) not in settings for variable in self.non_trainable_variables):
            return False
        return self.weight_is_scheduled or getattr(self._weight, "exact", None) == 0

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make what depends on the features' shapes, once, before the first use.

        Args:
            student: A call of the student whose tensors may be symbolic: only their shapes count.
            teacher: The teacher's call with the same input.
        """
        self.built = True

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight.

        Args:
            student: The student's call.
            teacher: The teacher's call with the same input.
            labels: The batch's labels, where ``needs_labels``.
            sample_weight: The batch's sample weights, or None.

        Returns:
            A scalar; under ``tf.distribute`` divided by the number of replicas, as Keras' own losses are.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to implement `compute`.")

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        weight = backends.as_float(self._weight)
        kept = {"weight": weight, "use_sample_weight": self.use_sample_weight, "trainable": self.trainable}
        return {"name": self.name, **kept}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        return cls(**keras.saving.deserialize_keras_object(config))

    def _setting(self, name: str, value: float) -> keras.Variable:
        """A setting that a schedule may change without a new trace."""
        initializer = keras.initializers.Constant(float(value))
        variable = self.add_weight(
            name=name, shape=(), dtype="float32", trainable=False, autocast=False, initializer=initializer
        )
        self._settings.append(variable)
        variable.exact = float(value)  # float32 has no 1/3: what the user wrote is what a file must say
        return variable
