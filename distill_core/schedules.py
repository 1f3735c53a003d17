"""Schedules: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill_core.checks import Checks, message

Over = Literal["steps", "epochs", "fraction"]
_AXES = ("steps", "epochs", "fraction")
_CHECKS = Checks()


@dataclass(frozen=True)
class Progress:
    """The position in a training.

    Args:
        step: Optimizer steps made so far.
        epoch: The epoch, from 0; None if it is not known.
        fraction: Share of the whole training, from 0 to 1; None if the length is not known.
    """

    step: int = 0
    epoch: int | None = None
    fraction: float | None = None

    def along(self, over: Over) -> float:
        """The position on the axis of a schedule.

        Args:
            over: The axis.

        Returns:
            Steps, epochs or the fraction.

        Raises:
            ValueError: If it is not known.
        """
        position = {"steps": self.step, "epochs": self.epoch, "fraction": self.fraction}[over]
        if position is None:
            remedy = "Limit the training, or call distiller.advance(step, epoch, fraction) in a loop of your own."
            raise ValueError(message(f"the position over {over!r} to be known", "none", remedy))
        return float(position)


class Schedule:
    """A number as a function of the position in training; it can replace any weight or temperature.

    Args:
        function: Maps the position to the number. The number depends on the position alone, so a resumed training
            continues the schedule at the same value.
        over: Unit of the position: optimizer ``"steps"`` from 0, ``"epochs"`` from 0, or the ``"fraction"`` of the
            training, from 0 to 1.

    Raises:
        TypeError: If ``function`` cannot be called.
        ValueError: If ``over`` is not one of the three.

    Example:
        >>> Schedule(lambda epoch: 0.9**epoch, over="epochs").at(Progress(epoch=2))
        0.81
        >>> Linear(8.0, 1.0, duration=0.5)
        Linear(start=8.0, end=1.0, duration=0.5, over='fraction')
    """

    measured = False  # whether the number depends on measurements too, so that only the weight of a term can have it

    def __init__(self, function: Callable[[float], float], *, over: Over = "steps") -> None:
        if not callable(function):
            raise TypeError(message("`function` to be a function of the position", f"function={function!r}"))
        _CHECKS.one_of("over", over, _AXES)
        self.function, self.over = function, over

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {"function": self.function, "over": self.over}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The schedule that :meth:`get_config` describes."""
        return cls(**config)

    def at(self, progress: Progress) -> float:
        """The number at a point of the training.

        Args:
            progress: The point.

        Returns:
            The number.

        Raises:
            ValueError: If the position is not known, or the number is not finite.
        """
        value = float(self._value(progress.along(self.over)))
        _CHECKS.number(f"the value of {type(self).__name__}", value)
        return value

    def __repr__(self) -> str:
        # the name of a function and not its address, which differs between two runs
        settings = {name: getattr(value, "__qualname__", repr(value)) for name, value in self.get_config().items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"

    def _value(self, position: float) -> float:  # methods, not closures: a schedule travels to spawned processes
        return self.function(position)


class Linear(Schedule):
    """Linear ramp from ``start`` to ``end``, constant afterwards.

    Args:
        start: First value.
        end: Last value.
        duration: Length of the ramp in steps or epochs, or as a fraction of the training; the default is all of it.
        over: Unit of ``duration``.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If ``duration`` is not greater than 0, or missing with ``over="steps"`` or ``"epochs"``.

    Example:
        >>> Linear(8.0, 1.0, duration=0.5).at(Progress(fraction=0.25))
        4.5
    """

    def __init__(self, start: float, end: float, *, duration: float | None = None, over: Over = "fraction") -> None:
        _CHECKS.number("start", start)
        _CHECKS.number("end", end)
        self.start, self.end, self.duration = float(start), float(end), _duration(duration, over)
        super().__init__(self._value, over=over)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {"start": self.start, "end": self.end, "duration": self.duration, "over": self.over}

    def _value(self, position: float) -> float:
        return self._between(min(position / self.duration, 1.0))

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


class Cosine(Linear):
    """Half-cosine ramp from ``start`` to ``end`` (slow at both ends), constant afterwards.

    Args:
        start: First value.
        end: Last value.
        duration: Length of the ramp in steps or epochs, or as a fraction of the training; the default is all of it.
        over: Unit of ``duration``.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If ``duration`` is not greater than 0, or missing with ``over="steps"`` or ``"epochs"``.

    Example:
        >>> round(Cosine(1.0, 0.0, duration=100, over="steps").at(Progress(step=25)), 4)
        0.8536
    """

    def _between(self, share: float) -> float:
        return super()._between((1 - math.cos(math.pi * share)) / 2)


class WarmUp(Linear):
    """Linear warm-up from 0 to ``value``, constant afterwards.

    Args:
        value: Value after the warm-up.
        duration: Length of the warm-up in steps or epochs, or as a fraction of the training; the default is all of it.
        over: Unit of ``duration``.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If ``duration`` is not greater than 0, or missing with ``over="steps"`` or ``"epochs"``.

    Example:
        >>> WarmUp(0.5, duration=10, over="epochs").at(Progress(epoch=4))
        0.2
    """

    def __init__(self, value: float, *, duration: float | None = None, over: Over = "fraction") -> None:
        super().__init__(0.0, value, duration=duration, over=over)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {"value": self.end, "duration": self.duration, "over": self.over}


class Step(Schedule):
    """Piecewise constant schedule.

    Args:
        values: The values; one more than `boundaries`.
        boundaries: Increasing positions at which the next value begins.
        over: Unit of the boundaries.

    Raises:
        TypeError: If an entry is not a number.
        ValueError: If the counts do not fit, or the boundaries do not increase.

    Example:
        >>> Step([4.0, 2.0, 1.0], boundaries=[10, 20], over="epochs").at(Progress(epoch=10))
        2.0
    """

    def __init__(self, values: Sequence[float], *, boundaries: Sequence[float], over: Over = "epochs") -> None:
        for name, entries in (("values", values), ("boundaries", boundaries)):
            for index, entry in enumerate(entries):
                _CHECKS.number(f"{name}[{index}]", entry)
        if len(values) != len(boundaries) + 1 or any(a >= b for a, b in itertools.pairwise(boundaries)):
            expected = "`values` to have one entry more than the increasing `boundaries`"
            raise ValueError(message(expected, f"values={list(values)} and boundaries={list(boundaries)}"))
        self.values, self.boundaries = [float(value) for value in values], [float(boundary) for boundary in boundaries]
        super().__init__(self._value, over=over)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {"values": self.values, "boundaries": self.boundaries, "over": self.over}

    def _value(self, position: float) -> float:
        return self.values[bisect.bisect_right(self.boundaries, position)]


def first_value(
    name: str,
    value: Any,
    check: Callable[[str, Any], None],
    schedules: dict[str, Schedule],
    *,
    balances: bool = False,
) -> float:
    """The first value of a setting; a schedule is stored under the setting's name.

    Args:
        name: Name of the setting.
        value: A number, or a schedule.
        check: Check of every number of the setting.
        schedules: The dict that stores a schedule.
        balances: Whether the number may be a balanced weight.

    Returns:
        The number.

    Raises:
        TypeError: If the value is neither a number nor a schedule.
        ValueError: If the number does not pass the check.

    Example:
        >>> schedules = {}
        >>> first_value("temperature", Linear(8.0, 1.0), Checks().positive, schedules), list(schedules)
        (8.0, ['temperature'])
    """
    if isinstance(value, Schedule):
        if value.measured and not balances:
            remedy = "Only the weight of a term can be balanced."
            raise TypeError(message(f"`{name}` to be a number or a schedule", f"{name}={value!r}", remedy))
        schedules[name] = value
        value = value.at(Progress(0, 0, 0.0))
    check(name, value)
    return float(value)


class Setting:
    """A number of an object that is checked whenever it is assigned, and may be a schedule.

    The object keeps its schedules by name in ``schedules``. Assigning a number replaces a schedule; the values of a
    schedule are written by :func:`set_scheduled` in each step.

    Args:
        check: The check that every number must pass, called with the setting's name and the number.

    Example:
        >>> class Term:
        ...     weight = Setting(Checks().non_negative)
        >>> term = Term()
        >>> term.weight = Linear(2.0, 0.0)
        >>> term.weight, list(term.schedules)
        (2.0, ['weight'])
        >>> term.weight = 1
        >>> term.weight, list(term.schedules)
        (1.0, [])
    """

    balances = False  # whether the number may be a balanced weight

    def __init__(self, check: Callable[[str, Any], None]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        try:
            return owner.__dict__["_settings"][self._name]
        except KeyError:
            raise AttributeError(f"{type(owner).__name__!r} object has no attribute {self._name!r}") from None

    def __set__(self, owner: Any, value: float | Schedule) -> None:
        schedules: dict[str, Schedule] = {}
        number = first_value(self._name, value, self.check, schedules, balances=self.balances)
        attributes = owner.__dict__
        kept = attributes.setdefault("schedules", {})
        kept.pop(self._name, None)
        kept.update(schedules)
        attributes.setdefault("_settings", {})[self._name] = number


def set_scheduled(owner: Any, name: str, value: float) -> None:
    """Set a scheduled setting to its value at a point of the training, and keep the schedule.

    Args:
        owner: The object with the setting.
        name: Name of the setting.
        value: The number.
    """
    settings = owner.__dict__.get("_settings", {})
    target = settings if name in settings else owner.__dict__
    target[name] = value


def _duration(duration: float | None, over: str) -> float:
    _CHECKS.one_of("over", over, _AXES)
    if duration is None and over == "fraction":
        return 1.0
    if duration is None:
        raise ValueError(message(f"`duration` to be given in {over}", "duration=None"))
    _CHECKS.positive("duration", duration)
    return float(duration)
