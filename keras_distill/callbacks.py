"""Callbacks for ``DistillModel.fit``."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from distill_core.terminal import write_line
from keras_distill import checks, compat
from keras_distill.schedules import Balanced, Linear, Progress, Schedule  # noqa: F401 - the example uses Linear
from keras_distill.targets import EpochData

_PARAMETERS = ("weight", "temperature", "task_weight", "decay")


class _Following(keras.callbacks.Callback):
    """Base of callbacks that need the progress of the training."""

    _epoch = 0
    _accumulated = 1
    _seen: int | None = None  # batches before the epoch
    _length: int | None = None  # batches of the epoch before it

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Forget the data of an earlier training."""
        self._seen = self._length = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Store the epoch and the number of batches before it."""
        seen, self._accumulated = compat.raw_iterations(self.model.optimizer)
        self._length = None if self._seen is None else seen - self._seen
        self._epoch, self._seen = epoch, seen

    def _progress(self, batch: int) -> Progress:
        # Keras does not know the length of some data: they are taken to be as long as in the epoch before
        batches = self.params.get("steps") or self._length or math.inf
        fraction = (self._epoch + min(batch / batches, 1.0)) / self.params["epochs"]
        return Progress(((self._seen or 0) + batch) // self._accumulated, self._epoch, fraction)


class ScheduleFollower(_Following):
    """Sets the weights and temperatures that have a schedule; ``DistillModel.fit`` adds it.

    It sets each number before each batch (or before each ``steps_per_execution`` batches), and writes it into the logs
    under the name of the setting: ``task_weight``, ``<term>_weight``, ``<term>_temperature`` and so on.

    Args:
        model: The model that is trained.

    Attributes:
        values: The numbers that were set last, by their names in the logs; empty before the first epoch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._scheduled, self.values = scheduled_settings(model), dict[str, float]()

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
            balanced = [term for term in self.model.terms if isinstance(term.schedules.get("weight"), Balanced)]
            logs.update({f"{term.name}_weight": term.weight for term in balanced})

    def _follow(self, batch: int) -> None:
        progress = self._progress(batch)
        for label, schedule, assign in self._scheduled:
            value = schedule.at(progress)
            assign(value)
            self.values[label] = value


class DistillationScheduler(_Following):
    """A schedule for a term's weight or temperature, or for the weight of the task loss.

    A variable holds the value, so that a change needs no new trace, and the logs show it. A function sets the value at
    the start of each epoch; a :class:`keras_distill.schedules.Schedule` over steps or the fraction of the training sets
    it before each batch (or before each ``steps_per_execution`` batches). A resumed training, with ``initial_epoch``
    and the optimizer from ``load_model``, continues the schedule.

    Args:
        parameter: ``"weight"`` or ``"temperature"`` of a term, ``"task_weight"``, or ``"decay"`` of an
            :class:`EMATeacher`.
        schedule: A schedule, such as ``schedules.Linear(8.0, 1.0)``; or a function that returns the new value. It is
            called with the epoch, counted from 0, and, if it takes a second argument, the current value.
        term: Name of the term; required if several terms have the parameter.
        verbose: 1 prints a line for each epoch.

    Raises:
        TypeError: If ``schedule`` cannot be called.
        ValueError: If ``parameter`` is unknown; when training begins, if ``term`` does not name one term that has the
            parameter, or the parameter has a schedule already.

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
        """Find the term or the model that has the parameter."""
        super().on_train_begin(logs)
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
            write_line(sys.stdout, f"Epoch {epoch + 1}: {self._log_name()} is {self._value():.4g}.")

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
        if self.parameter == "decay":
            return next(f"{name}_decay" for name in self.model.step.named_averages())
        if self.parameter == "task_weight":
            return self.parameter
        return f"{self._owner.name}_{self.parameter}"

    def _find_owner(self) -> Any:
        terms = getattr(self.model, "terms", None)
        if terms is None:
            raise ValueError(checks.message("the model to be a DistillModel", f"a {type(self.model).__name__}"))
        if self.parameter == "task_weight":
            self._check_free(self.model.schedules)
            return self.model
        if self.parameter == "decay":
            averages = self.model.step.averages
            if len(averages) != 1:
                received = f"{len(averages)} of them" if averages else "another teacher"
                remedy = "Pass each a schedule of its own, EMATeacher(decay=<schedule>)." if averages else ""
                raise ValueError(checks.message("an EMATeacher, whose `decay` is scheduled", received, remedy))
            self._check_free(averages[0].schedules)
            return averages[0]
        fitting = [term for term in terms if self.term in (None, term.name) and hasattr(term, self.parameter)]
        if len(fitting) == 1:
            self._check_free(fitting[0].schedules)
            return fitting[0]
        names = [term.name for term in terms]
        expected = f"`term` to name the one term whose {self.parameter} is scheduled"
        raise ValueError(checks.message(expected, f"term={self.term!r}, of the terms {names}"))

    def _check_free(self, schedules: Mapping[str, Schedule]) -> None:
        """Check that the setting does not have a schedule, which would overwrite the values of this callback.

        Raises:
            ValueError: If it has one.
        """
        if self.parameter in schedules:
            expected = f"`{self.parameter}` to have one schedule"
            received = f"{schedules[self.parameter]!r} and a DistillationScheduler"
            raise ValueError(checks.message(expected, received, "Pass a number instead, or remove this callback."))


class StudentCheckpoint(keras.callbacks.ModelCheckpoint):
    """``keras.callbacks.ModelCheckpoint`` that saves the student alone.

    The file is a plain Keras model, which loads without this package.

    Args:
        filepath: Path of the file, as for ``ModelCheckpoint``.
        monitor: Key of the logs that ``save_best_only`` compares.
        mode: ``"min"``, ``"max"`` or ``"auto"``, which also works for the keys of ``DistillModel``.
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
        self._trained: Any = None
        super().__init__(filepath, monitor=monitor, mode=mode, **kwargs)

    @property
    def model(self) -> Any:
        """The student, with its present weights: on JAX a running step holds them for the model that trains it."""
        if hasattr(self._trained, "jax_state_sync"):
            self._trained.jax_state_sync()
        return super().model

    def set_model(self, model: Any) -> None:
        """Use the student of the model that trains it."""
        self._trained = model
        super().set_model(getattr(model, "student", model))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save the student; with ``save_best_only`` only if it is better.

        Raises:
            ValueError: With ``save_best_only``, if ``monitor`` is not a key of the logs.
        """
        known = logs or {}
        validated = any(key.startswith("val_") for key in known)  # not in every epoch with validation_freq=2
        missing = self.monitor not in known and (validated or not self.monitor.startswith("val_"))
        if self.save_best_only and missing:
            remedy = checks.closest(self.monitor, known)
            raise ValueError(checks.message("`monitor` to be a key of the logs", f"monitor={self.monitor!r}", remedy))
        super().on_epoch_end(epoch, logs)

    def _set_monitor_op(self) -> None:
        """Find the mode from the metrics of the model that trains the student, which itself is not compiled."""
        student = self.model
        super().set_model(self._trained)
        super()._set_monitor_op()
        super().set_model(student)


class SetEpoch(keras.callbacks.Callback):
    """Sets ``data.epoch`` during training, and to 0 after it, so that an evaluation always gets the same data.

    With ``steps_per_epoch`` below the length of the data Keras reads them once in several epochs. They count as one, so
    that no example comes twice in a pass: Keras may have read batches of the next epoch ahead.

    Args:
        data: The data.
    """

    def __init__(self, data: EpochData) -> None:
        super().__init__()
        self._data = data
        self._first: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget an earlier training."""
        self._first, self._data.in_fit = None, True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the epoch before its first batch, also in a resumed training."""
        self._first = epoch if self._first is None else self._first
        epochs_of_pass = -(-len(self._data) // (self.params.get("steps") or len(self._data)))
        # Keras reads the data from their start in the first epoch, also if it is in the middle of a pass
        self._data.epoch = self._first // epochs_of_pass + (epoch - self._first) // epochs_of_pass

    def on_train_end(self, logs: Any = None) -> None:
        """Set the epoch back to 0."""
        self._data.end_fit()


def scheduled_settings(model: Any) -> list[tuple[str, Schedule, Callable[[float], None]]]:
    """The scheduled settings of a model and its terms.

    Args:
        model: A DistillModel.

    Returns:
        For each setting its name in the logs, its schedule, and a function that sets it.
    """
    owners: list[tuple[str, Any]] = [("", model), ("", model.step.ensemble.mix)]
    owners += [(f"{name}_", average) for name, average in model.step.named_averages().items()]
    own = [
        (f"{prefix}{name}", schedule, functools.partial(owner.follow, name))
        for prefix, owner in owners
        for name, schedule in owner.schedules.items()
    ]
    return own + [
        (f"{term.name}_{name}", schedule, functools.partial(term.follow, name))
        for term in model.terms
        for name, schedule in term.schedules.items()
    ]


def fit_callbacks(model: Any, data: Any) -> list[keras.callbacks.Callback]:
    """The callbacks that ``fit`` adds: one for schedules and one for data that depends on the epoch, as needed.

    Args:
        model: The model that is trained.
        data: The ``x`` argument of ``fit``.

    Returns:
        The callbacks.
    """
    followers: list[keras.callbacks.Callback] = [ScheduleFollower(model)] if scheduled_settings(model) else []
    return [*followers, SetEpoch(data)] if isinstance(data, EpochData) else followers


def with_callbacks(
    fit: Callable[..., Any], own: Sequence[keras.callbacks.Callback], arguments: Mapping[str, Any]
) -> Any:
    """Call ``fit`` with the model's callbacks first, so that the user's callbacks can read the values they log.

    Args:
        fit: The method of Keras.
        own: The model's callbacks.
        arguments: The arguments of ``fit``, by name.

    Returns:
        The history.
    """
    callbacks = arguments.get("callbacks")
    if not own:
        return fit(**arguments)
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return fit(**{**arguments, "callbacks": [*own, *keras.tree.flatten([] if callbacks is None else callbacks)]})
    for callback in own:  # Keras sets the model and the parameters only for the callbacks of a plain list
        callback.set_model(callbacks.model)
        known = {"epochs": arguments.get("epochs", 1), "steps": arguments.get("steps_per_epoch")}
        callback.set_params({**known, **(callbacks.params or {})})
    before = callbacks.callbacks
    callbacks.callbacks = [*own, *before]
    try:
        return fit(**arguments)
    finally:
        callbacks.callbacks = before


def _positional(function: Callable[..., Any]) -> int:
    """Number of required positional parameters of a function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions may have no signature
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)
