"""The base class of terms that have a loss object."""

from __future__ import annotations

import numbers
from typing import Any

import keras
import numpy as np

from distill_core.requires import Requires
from keras_distill import checks
from keras_distill.losses import DistillationLoss
from keras_distill.losses.temperature import CurriculumTemperature
from keras_distill.recording import Call
from keras_distill.recording.rows import IndexPlace, found_rows
from keras_distill.terms.base import DistillationTerm


class LossTerm(DistillationTerm):
    """A term with a loss object, whose temperature and scheduled settings can change during training.

    Args:
        loss: The loss.
        index: Where a batch's inputs keep the row of each example in the data set, for a loss that needs it: a key, an
            index, or a function of the inputs; None takes it from the features of a cache.
        **kwargs: Settings of :class:`DistillationTerm`.

    Attributes:
        loss: The loss, or the term's own copy of it if it has a temperature or schedules. A number that is assigned to
            one of its settings during training counts from the next step on.
        requires: The requirements of the loss.
        temperature: The loss's temperature, if it has one; a number can be assigned during training.
    """

    loss: keras.losses.Loss
    takes_curriculum = False  # whether the temperature of the loss may be learned
    curriculum: CurriculumTemperature | None = None

    def __init__(self, loss: keras.losses.Loss, *, index: IndexPlace | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.requires = Requires.of(loss)
        if index is not None and not self.requires.needs_index:
            expected = f"`index` to be None for {type(loss).__name__}, which needs no rows of the examples"
            raise ValueError(checks.message(expected, f"index={index!r}", "Leave it out."))
        self.index, self.trains_only = index, self.requires.needs_index
        self.needs_labels = self.requires.needs_labels
        self._has_temperature = _is_number(getattr(loss, "temperature", None))
        self._variable_settings: list[str] = []
        # any other loss may need its temperature as a Python number: a new temperature then needs a new trace
        temperature = getattr(loss, "temperature", None)
        self.curriculum = temperature if isinstance(temperature, CurriculumTemperature) else None
        if self.curriculum is not None and not self.takes_curriculum:
            expected = f"the temperature of {type(loss).__name__} to be a number or a schedule in a term on layers"
            raise ValueError(checks.message(expected, "a CurriculumTemperature", "Use a LogitsDistillation."))
        if isinstance(loss, DistillationLoss):
            self.schedules.update(loss.schedules)
            temperature = ["temperature"] if self._has_temperature else []
            self._variable_settings = list(dict.fromkeys([*temperature, *loss.schedules]))
        if self.curriculum is not None:
            self.schedules.update(self.curriculum.schedules)
            self._variable_settings.append("reversal_weight")
        self.loss = copied(loss) if self._variable_settings else loss
        if self.curriculum is not None:
            self.loss.reversal_weight = self.curriculum.reversal_weight
        self._working_loss = self.loss

    @property
    def temperature(self) -> float:
        """The loss's temperature; assign a number to change it from the next step on."""
        self._check_temperature()
        return float(self.loss.temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._check_temperature()
        self.set_setting("temperature", value)

    def with_rows(self, target: Any, student: Call, teacher: Call) -> Any:
        """The teacher's tensor, in a pair with the rows of the examples for a loss that needs them.

        Args:
            target: The tensor.
            student: The student's call, with the batch's inputs.
            teacher: The teacher's call, in which a cache keeps the rows.

        Returns:
            The tensor or the pair.

        Raises:
            ValueError: If the rows are not known, or not one integer for each example from 0 to the loss's ``size``.
        """
        if not self.requires.needs_index:
            return target
        return target, found_rows(self.index, student, teacher, self.loss.size, tuple(target.shape)[:1])

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        index = keras.saving.serialize_keras_object(self.index) if callable(self.index) else self.index
        return super().get_config() | ({} if index is None else {"index": index})

    def learned_numbers(self) -> dict[str, Any]:
        """The learned temperature, to log."""
        return {} if self.curriculum is None else {f"{self.name}_temperature": self.curriculum.value}

    def numbers(self) -> dict[str, float]:
        """The weight, and the settings of the loss that can change without a new trace."""
        return {**super().numbers(), **{name: float(getattr(self.loss, name)) for name in self._variable_settings}}

    def traced_settings(self) -> tuple[Any, ...]:
        """Also the settings of the loss that have no variable, and its parts whose weight is 0."""
        fixed = self._has_temperature and "temperature" not in self._variable_settings
        constants = tuple(map(_hashable, self._constants().values()))
        temperature = self.loss.temperature if fixed else None
        return (*super().traced_settings(), temperature, self._parts_of_weight_0(), constants)

    def loss_of(self, student: Call) -> keras.losses.Loss:
        """The loss with the owner's numbers, without the parts whose weight is 0.

        Args:
            student: The student's call.

        Returns:
            The loss.
        """
        parts = self._parts_of_weight_0() if student.decided else ()
        if not parts and self._working_loss is self.loss:
            return self.loss
        loss = copied(self._working_loss)
        for name, value in (self._constants() | dict.fromkeys(parts, 0.0)).items():
            setattr(loss, name, value)
        return loss

    def with_numbers(self, learned: Any, student: Call) -> Any:
        """A built copy of the loss, as one pair of layers has it, with the owner's numbers.

        Args:
            learned: The copy.
            student: The student's call.

        Returns:
            Another copy, with the same parameters.
        """
        loss, numbers = copied(learned), self.loss_of(student)
        for name in (*self._variable_settings, *self._constants()):
            setattr(loss, name, getattr(numbers, name))
        return loss

    def _constants(self) -> dict[str, Any]:
        """The settings of the loss that a traced graph contains as constants, as they are set now."""
        names = self.loss.setting_names if isinstance(self.loss, DistillationLoss) else ()
        others = {*self._variable_settings, "temperature"}
        return {name: getattr(self.loss, name) for name in names if name not in others}

    def _parts_of_weight_0(self) -> tuple[str, ...]:
        return tuple(name for name in self._variable_settings if getattr(self.loss, name) == 0)

    def take_numbers(self) -> None:
        """Let the loss of this copy compute with the owner's variables."""
        if self._variable_settings and self.state is not None:
            self._working_loss = copied(self.loss)
            for name in self._variable_settings:
                setattr(self._working_loss, name, self.state.variables_by_name[name])
            if self.curriculum is not None:
                self._working_loss.temperature = self.curriculum  # the owner's own

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, loss={self.loss!r})"

    def _store(self, name: str, value: float) -> None:
        if name == "weight":
            super()._store(name, value)
        else:
            setattr(self.loss, name, value)

    def _check_temperature(self) -> None:
        if not self._has_temperature:
            raise AttributeError(f"The loss {type(self.loss).__name__} of term {self.name!r} has no temperature.")


def copied(loss: keras.losses.Loss) -> keras.losses.Loss:
    """A shallow copy of a loss.

    Args:
        loss: The loss.

    Returns:
        Another object of the same class.
    """
    copy = object.__new__(type(loss))  # copy.copy would save and load it, which fails for unregistered functions
    copy.__dict__.update(loss.__dict__)
    return copy


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    """A setting as part of a key: lists and arrays of numbers, which can be assigned too, as tuples."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
