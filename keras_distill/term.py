"""The base classes of the terms, and of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops  # noqa: F401 - the example uses it

from keras_distill import checks
from keras_distill.schedules import Schedule, add_setting, deserialized, first_value, serialized, set_setting
from keras_distill.taps import Call, Tap


class DistillationTerm(keras.layers.Layer):
    """A loss at a place, with a weight: the base class of the terms, and of a user's own.

    A subclass implements :meth:`compute`; it names the layers that it reads in ``student_taps`` and ``teacher_taps``,
    and makes what depends on the features' shapes in :meth:`build_from_calls`. Its weights are trained along with the
    student's, saved with the distillation model, and absent from the student's own file.

    Args:
        weight: Factor of the term in the total loss, 0 or greater, a number or a schedule; kept in a variable, which
            may be set while training. 0 skips the term's work in training, if it is there at first or by a schedule
            (see :attr:`may_rest`).
        name: Name in logs and files, distinct among the terms.
        use_sample_weight: Whether the batch's sample weights count in the term. False where a weight of 0 only says
            that an example has no label: the task loss then leaves it out, and the term learns from it.

    Attributes:
        student_taps: Layers of the student that the term reads.
        teacher_taps: Layers of the teacher that the term reads.
        needs_labels: Whether :meth:`compute` is given the batch's labels.
        schedules: The schedules of the weight and of the loss's settings, by name; ``fit`` follows them.
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

    def __init__(
        self, *, weight: float | Schedule = 1.0, name: str, use_sample_weight: bool = True, **kwargs: Any
    ) -> None:
        schedules: dict[str, Schedule] = {}
        weight = first_value("weight", weight, checks.non_negative, schedules)
        checks.boolean("use_sample_weight", use_sample_weight)
        if not isinstance(name, (str, type(None))):
            raise TypeError(checks.message("`name` to be a string", f"name={name!r}"))
        if not name or name in ("task", "distillation"):  # the log has a task_loss and a distillation_loss of its own
            raise ValueError(checks.message("`name` to be neither empty, 'task' nor 'distillation'", f"name={name!r}"))
        if "/" in name or "." in name:  # Keras separates layers by the one, torch by the other
            raise ValueError(checks.message("`name` to hold neither '/' nor '.'", f"name={name!r}", "Use '_'."))
        super().__init__(name=name, **kwargs)
        self.schedules = schedules
        self._settings: dict[str, keras.Variable] = {}
        self._settings["weight"] = add_setting(self, "weight", weight)
        self.use_sample_weight = use_sample_weight

    @property
    def weight(self) -> keras.Variable:
        """Factor of the term in the total loss, a scalar variable; a number may be assigned to it."""
        return self._settings["weight"]

    @weight.setter
    def weight(self, value: float) -> None:
        set_setting("weight", self.weight, value)

    @property
    def may_rest(self) -> bool:
        """Whether a step of training may leave the term out while its weight is 0.

        A step that is traced keeps a branch for it, which costs a little: only where the weight is 0 now or follows a
        schedule, and not where the term has a state of its own, such as a layer of batch normalisation in its adapter.
        """
        settings = {id(variable) for variable in self._settings.values()}
        if any(id(variable) not in settings for variable in self.non_trainable_variables):
            return False
        return self.weight_is_scheduled or "weight" in self.schedules or getattr(self.weight, "exact", None) == 0

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
        kept = {
            "weight": serialized(self.schedules.get("weight"), self.weight),
            "use_sample_weight": self.use_sample_weight,
            "trainable": self.trainable,
        }
        return {"name": self.name, **kept}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    def set_setting(self, name: str, value: float) -> None:
        """Set the weight, or a setting of the loss, for the steps to come.

        Args:
            name: Name of the setting.
            value: A number: 0 or greater for a weight, greater than 0 for a temperature.

        Raises:
            ValueError: If the number is none that the setting may have.
        """
        set_setting(name, self._settings[name], value)


class LossTerm(DistillationTerm):
    """A term with a loss object, whose temperature and scheduled settings become variables of the term.

    Args:
        loss: The loss.
        **kwargs: Settings of every term.

    Attributes:
        loss: A copy of the loss where it has such settings: another term may have been given the same one.
    """

    loss: keras.losses.Loss

    def __init__(self, loss: keras.losses.Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schedules.update(getattr(loss, "schedules", {}))
        warm = isinstance(getattr(loss, "temperature", None), (int, float))
        names = dict.fromkeys([*(["temperature"] if warm else []), *getattr(loss, "schedules", {})])
        self.loss = copied(loss) if names else loss
        for name in names:
            self._settings[name] = add_setting(self, name, getattr(loss, name))
            setattr(self.loss, name, self._settings[name])
        self.needs_labels = getattr(loss, "needs_labels", False)

    @property
    def temperature(self) -> keras.Variable:
        """The loss's temperature, a scalar variable; a number may be assigned to it."""
        if "temperature" not in self._settings:
            raise AttributeError(f"The loss {type(self.loss).__name__} of term {self.name!r} has no temperature.")
        return self._settings["temperature"]

    @temperature.setter
    def temperature(self, value: float) -> None:
        set_setting("temperature", self.temperature, value)


def copied(loss: keras.losses.Loss) -> keras.losses.Loss:
    """A copy of a loss that shares its settings.

    Args:
        loss: The loss.

    Returns:
        Another object of its class.
    """
    twin = object.__new__(type(loss))  # copy.copy would save and load it, which a function not registered does not bear
    twin.__dict__.update(loss.__dict__)
    return twin
