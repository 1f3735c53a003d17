"""Callbacks for ``DistillModel.fit``."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.schedules import Linear, Progress, Schedule  # noqa: F401 - the example uses Linear
from keras_distill.targets import EpochData

_PARAMETERS = ("weight", "temperature", "task_weight")


class _Following(keras.callbacks.Callback):
    """A callback that knows how far the training has come."""

    _epoch = _seen = 0
    _accumulated = 1

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note where the epoch begins."""
        self._epoch = epoch
        self._seen, self._accumulated = compat.raw_iterations(self.model.optimizer)

    def _progress(self, batch: int) -> Progress:
        batches = self.params.get("steps") or math.inf  # in the first epoch of a generator nobody knows them
        fraction = (self._epoch + min(batch / batches, 1.0)) / self.params["epochs"]
        return Progress((self._seen + batch) // self._accumulated, self._epoch, fraction)


class ScheduleFollower(_Following):
    """Sets the weights and temperatures that are given as schedules; ``DistillModel.fit`` adds it.

    Each number is set before each batch (or each of ``steps_per_execution``), and written into the logs under the name
    of the setting: ``task_weight``, ``<term>_weight``, ``<term>_temperature`` and so on.

    Args:
        model: The model that is trained.

    Attributes:
        values: The numbers set last, by the names that logs give them; empty before the first epoch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._held, self.values = steps_of(model), dict[str, float]()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the epoch's numbers."""
        super().on_epoch_begin(epoch, logs)
        self._follow(0)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the numbers of the batch."""
        self._follow(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the numbers into the logs."""
        if logs is not None:
            logs.update(self.values)

    def _follow(self, batch: int) -> None:
        progress = self._progress(batch)
        for label, schedule, assign in self._held:
            value = schedule.at(progress)
            assign(value)
            self.values[label] = value


class DistillationScheduler(_Following):
    """A schedule for a term's weight or temperature, or for the weight of the task loss.

    The value lives in a variable, so that a change costs no new trace, and it is written into the logs. A function of
    the epoch sets it at the start of each; a :class:`keras_distill.schedules.Schedule` over steps or the fraction of
    the training sets it before each batch (or each of ``steps_per_execution``). A training that is resumed, with
    ``initial_epoch`` and the optimizer of ``load_model``, goes on where it was.

    Args:
        parameter: ``"weight"`` or ``"temperature"`` of a term, or ``"task_weight"``.
        schedule: A schedule, such as ``schedules.Linear(8.0, 1.0)``; or a function that is called with the epoch, from
            0, and, if it takes a second argument, the value until then, and returns the new value.
        term: Name of the term; needed where several terms have the parameter.
        verbose: 1 prints a line for each epoch.

    Raises:
        TypeError: If ``schedule`` cannot be called.
        ValueError: If there is no such parameter, or, when training begins, no such term.

    Example:
        >>> DistillationScheduler("temperature", lambda epoch: max(1.0, 8.0 - epoch)).schedule(5)
        3.0
        >>> halving = DistillationScheduler("weight", Linear(1.0, 0.5, duration=100, over="steps"), term="logits")
    """

    def __init__(self, parameter: str, schedule: Any, term: str | None = None, verbose: int = 0) -> None:
        super().__init__()
        checks.one_of("parameter", parameter, _PARAMETERS)
        if not isinstance(schedule, Schedule) and not callable(schedule):
            expected = "`schedule` to be a schedule or a function of the epoch"
            raise TypeError(checks.message(expected, f"schedule={schedule!r}"))
        self.parameter, self.schedule, self.term, self.verbose = parameter, schedule, term, verbose
        self._takes_value = not isinstance(schedule, Schedule) and _positional(schedule) >= 2
        self._owner: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find what is to be scheduled."""
        self._owner = self._find_owner()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the epoch's value."""
        if isinstance(self.schedule, Schedule):
            super().on_epoch_begin(epoch, logs)
            self._set_along(0)
        else:
            arguments = (epoch, self._value()) if self._takes_value else (epoch,)
            setattr(self._owner, self.parameter, float(self.schedule(*arguments)))
        if self.verbose:
            keras.utils.io_utils.print_msg(f"\nEpoch {epoch + 1}: {self._log_name()} is {self._value():.4g}.")

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the value of a schedule that runs over steps or the fraction of the training."""
        if isinstance(self.schedule, Schedule) and self.schedule.over != "epochs":
            self._set_along(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write the epoch's value into the logs."""
        if logs is not None:
            logs[self._log_name()] = self._value()

    def _set_along(self, batch: int) -> None:
        setattr(self._owner, self.parameter, self.schedule.at(self._progress(batch)))

    def _value(self) -> float:
        return float(getattr(self._owner, self.parameter))

    def _log_name(self) -> str:
        return self.parameter if self.parameter == "task_weight" else f"{self._owner.name}_{self.parameter}"

    def _find_owner(self) -> Any:
        terms = getattr(self.model, "terms", None)
        if terms is None:
            raise ValueError(checks.message("the model to be a DistillModel", f"a {type(self.model).__name__}"))
        if self.parameter == "task_weight":
            self._check_free(self.model.schedules)
            return self.model
        fitting = [term for term in terms if self.term in (None, term.name) and hasattr(term, self.parameter)]
        if len(fitting) == 1:
            self._check_free(fitting[0].schedules)
            return fitting[0]
        names = [term.name for term in terms]
        expected = f"`term` to name the one term whose {self.parameter} is scheduled"
        raise ValueError(checks.message(expected, f"term={self.term!r}, of the terms {names}"))

    def _check_free(self, schedules: Mapping[str, Schedule]) -> None:
        """Raise if the setting has a schedule already, which would overwrite the values of this one."""
        if self.parameter in schedules:
            expected = f"`{self.parameter}` to have one schedule"
            received = f"{schedules[self.parameter]!r} and a DistillationScheduler"
            raise ValueError(checks.message(expected, received, "Give the term a number, or leave this callback out."))


class StudentCheckpoint(keras.callbacks.ModelCheckpoint):
    """``keras.callbacks.ModelCheckpoint`` that writes the student alone.

    The file is a plain Keras model: it loads where this package is not installed.

    Args:
        filepath: Path of the file, as for ``ModelCheckpoint``.
        monitor: Key of the logs that ``save_best_only`` compares, ``"val_loss"`` if not given.
        mode: ``"min"``, ``"max"`` or ``"auto"``, which knows the keys of ``DistillModel`` too.
        **kwargs: The other settings of ``ModelCheckpoint``.

    Example:
        >>> StudentCheckpoint("student.keras", monitor="val_teacher_agreement", save_best_only=True).mode
        'max'
    """

    def __init__(self, filepath: str, monitor: str = "val_loss", mode: str = "auto", **kwargs: Any) -> None:
        if mode == "auto" and monitor.endswith("_loss"):
            mode = "min"
        elif mode == "auto" and monitor.endswith("_agreement"):
            mode = "max"
        super().__init__(filepath, monitor=monitor, mode=mode, **kwargs)

    def set_model(self, model: Any) -> None:
        """Take the student out of the model that trains it."""
        self._trained = model
        super().set_model(getattr(model, "student", model))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keep the student, if it is better."""
        known = logs or {}
        validated = any(key.startswith("val_") for key in known)  # not in every epoch with validation_freq=2
        missing = self.monitor not in known and (validated or not self.monitor.startswith("val_"))
        if self.save_best_only and missing:
            remedy = checks.closest(self.monitor, known)
            raise ValueError(checks.message("`monitor` to be a key of the logs", f"monitor={self.monitor!r}", remedy))
        super().on_epoch_end(epoch, logs)

    def _set_monitor_op(self) -> None:
        """The student is not compiled: what its metrics want is known to the model that trains it."""
        student = self.model
        super().set_model(self._trained)
        super()._set_monitor_op()
        super().set_model(student)


class SetEpoch(keras.callbacks.Callback):
    """Sets ``data.epoch`` in training, and 0 after it: data that is evaluated does not change.

    Args:
        data: The data.
    """

    def __init__(self, data: EpochData) -> None:
        super().__init__()
        self._data = data

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Before the first batch, also of a training that goes on from a later epoch."""
        self._data.epoch = epoch

    def on_train_end(self, logs: Any = None) -> None:
        """Leave the data as it was."""
        self._data.epoch = 0


def steps_of(model: Any) -> list[tuple[str, Schedule, Callable[[float], None]]]:
    """A model's scheduled settings: their names in the logs, their schedules, and functions that set them.

    Args:
        model: A DistillModel.
    """
    held = [(name, schedule, functools.partial(model.follow, name)) for name, schedule in model.schedules.items()]
    return held + [
        (f"{term.name}_{name}", schedule, functools.partial(term.follow, name))
        for term in model.terms
        for name, schedule in term.schedules.items()
    ]


def fit_callbacks(model: Any, data: Any) -> list[keras.callbacks.Callback]:
    """The callbacks that ``fit`` adds: one to follow schedules, one to set the epoch of data, where there are any.

    Args:
        model: The model that is trained.
        data: What ``fit`` is given.
    """
    followers: list[keras.callbacks.Callback] = [ScheduleFollower(model)] if steps_of(model) else []
    return [*followers, SetEpoch(data)] if isinstance(data, EpochData) else followers


def with_callbacks(fit: Callable[..., Any], own: Sequence[keras.callbacks.Callback], given: Mapping[str, Any]) -> Any:
    """What ``fit`` returns, with callbacks of ours before the caller's, who thereby see what ours write into the logs.

    Args:
        fit: The method of Keras.
        own: Our callbacks.
        given: What it is given, by name.

    Returns:
        The history.
    """
    callbacks = given.get("callbacks")
    if not own:
        return fit(**given)
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return fit(**{**given, "callbacks": [*own, *keras.tree.flatten([] if callbacks is None else callbacks)]})
    for one in own:  # a list that is given as a CallbackList has been told of its model and its epochs already
        one.set_model(callbacks.model)
        one.set_params({"epochs": given.get("epochs", 1), **(callbacks.params or {})})
    theirs = callbacks.callbacks
    callbacks.callbacks = [*own, *theirs]
    try:
        return fit(**given)
    finally:
        callbacks.callbacks = theirs


def _positional(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)
