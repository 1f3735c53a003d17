"""A term with a loss object, the base of the library's own terms."""

from __future__ import annotations

import numbers
from typing import Any

import keras

from distill_core.requires import Requires
from keras_distill.losses import DistillationLoss
from keras_distill.recording import Call
from keras_distill.terms.base import DistillationTerm


class LossTerm(DistillationTerm):
    """A term with a loss object, whose temperature and scheduled settings may change while training.

    Args:
        loss: The loss.
        **kwargs: Settings of every term.

    Attributes:
        loss: The term's own copy of the loss, which another term may have been given too.
        requires: What the loss needs.
    """

    loss: keras.losses.Loss

    def __init__(self, loss: keras.losses.Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.requires = Requires.of(loss)
        self.needs_labels = self.requires.needs_labels
        own = isinstance(loss, DistillationLoss)
        self.schedules.update(getattr(loss, "schedules", {}) if own else {})
        self._has_temperature = _is_number(getattr(loss, "temperature", None))
        # a user's own loss may need its temperature as a number: for it another one takes another trace
        warm = ["temperature"] if own and self._has_temperature else []
        self._variable_settings = list(dict.fromkeys([*warm, *(loss.schedules if own else ())]))
        self.loss = copied(loss) if self._variable_settings else loss
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

    def numbers(self) -> dict[str, float]:
        """The weight, and the settings of the loss that may change without a new trace."""
        return {**super().numbers(), **{name: float(getattr(self.loss, name)) for name in self._variable_settings}}

    def traced_settings(self) -> tuple[Any, ...]:
        """Name, whether it is trained, the temperature of a user's own loss, and parts of a loss whose weight is 0."""
        fixed = self._has_temperature and "temperature" not in self._variable_settings
        return (*super().traced_settings(), self.loss.temperature if fixed else None, self._parts_of_weight_0())

    def loss_of(self, student: Call) -> keras.losses.Loss:
        """The loss that computes with the owner's numbers, without the parts whose weight is 0.

        Args:
            student: The student's call.

        Returns:
            The loss.
        """
        skipped = self._parts_of_weight_0() if student.decided else ()
        if not skipped:
            return self._working_loss
        loss = copied(self._working_loss)
        for name in skipped:
            setattr(loss, name, 0.0)
        return loss

    def _parts_of_weight_0(self) -> tuple[str, ...]:
        return tuple(name for name in self._variable_settings if getattr(self.loss, name) == 0)

    def take_numbers(self) -> None:
        """Let the loss of this copy compute with the owner's variables."""
        if self._variable_settings and self.state is not None:
            self._working_loss = copied(self.loss)
            for name in self._variable_settings:
                setattr(self._working_loss, name, self.state.variables_by_name[name])

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
    """A copy of a loss that shares its settings.

    Args:
        loss: The loss.

    Returns:
        Another object of its class.
    """
    twin = object.__new__(type(loss))  # copy.copy would save and load it, which fails for unregistered functions
    twin.__dict__.update(loss.__dict__)
    return twin


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
