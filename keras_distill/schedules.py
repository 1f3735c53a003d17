"""Schedules for ``DistillationScheduler``: a weight or a temperature that changes while the student trains."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from keras_distill import checks

Over = Literal["steps", "epochs", "fraction"]
_AXES = ("steps", "epochs", "fraction")


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Args:
        step: Optimizer steps made so far.
        epoch: The epoch, from 0; None where it is not known.
        fraction: Share of the whole training, from 0 to 1; None where its length is not known.
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
            raise ValueError(checks.message(f"the position over {over!r} to be known", "none"))
        return float(position)


class Schedule:
    """A number as a function of the position in training, for a weight or a temperature.

    Args:
        function: From the position to the number. Within a training that is resumed it goes on where it was, since it
            depends on the position alone.
        over: What the position counts: optimizer ``"steps"`` from 0, ``"epochs"`` from 0, or the ``"fraction"`` of the
            training, from 0 to 1.

    Raises:
        TypeError: If ``function`` cannot be called.
        ValueError: If ``over`` is none of the three.

    Example:
        >>> Schedule(lambda epoch: 0.9**epoch, over="epochs").at(Progress(epoch=2))
        0.81
    """

    def __init__(self, function: Callable[[float], float], *, over: Over = "steps") -> None:
        if not callable(function):
            raise TypeError(checks.message("`function` to be a function of the position", f"function={function!r}"))
        checks.one_of("over", over, _AXES)
        self.function, self.over = function, over

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
        checks.number(f"the value of {type(self).__name__}", value)
        return value

    def _value(self, position: float) -> float:
        return self.function(position)


class Linear(Schedule):
    """A straight line from one number to another, which then stays.

    Args:
        start: The number at first.
        end: The number at the end.
        duration: Steps or epochs from the one to the other, or the fraction of the training, all of it by default.
        over: What the duration counts.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If ``duration`` is not greater than 0, or missing where it counts steps or epochs.

    Example:
        >>> Linear(8.0, 1.0, duration=0.5).at(Progress(fraction=0.25))
        4.5
    """

    def __init__(self, start: float, end: float, *, duration: float | None = None, over: Over = "fraction") -> None:
        checks.number("start", start)
        checks.number("end", end)
        self.start, self.end, self.duration = float(start), float(end), _duration(duration, over)
        super().__init__(self._value, over=over)

    def _value(self, position: float) -> float:
        return self._between(min(position / self.duration, 1.0))

    def _between(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


class Cosine(Linear):
    """Half a wave of the cosine from one number to another, which then stays: slow at both ends.

    Args:
        start: The number at first.
        end: The number at the end.
        duration: Steps or epochs from the one to the other, or the fraction of the training, all of it by default.
        over: What the duration counts.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If ``duration`` is not greater than 0, or missing where it counts steps or epochs.

    Example:
        >>> round(Cosine(1.0, 0.0, duration=100, over="steps").at(Progress(step=25)), 4)
        0.8536
    """

    def _between(self, share: float) -> float:
        return super()._between((1 - math.cos(math.pi * share)) / 2)


class WarmUp(Linear):
    """A number that grows from 0 and then stays.

    Args:
        value: The number that stays.
        duration: Steps or epochs until then, or the fraction of the training.
        over: What the duration counts.

    Raises:
        TypeError: If a setting is no number.
        ValueError: If ``duration`` is not greater than 0, or missing where it counts steps or epochs.

    Example:
        >>> WarmUp(0.5, duration=10, over="epochs").at(Progress(epoch=4))
        0.2
    """

    def __init__(self, value: float, *, duration: float | None = None, over: Over = "fraction") -> None:
        super().__init__(0.0, value, duration=duration, over=over)


class Step(Schedule):
    """Numbers that hold between boundaries.

    Args:
        values: The numbers, one more than the boundaries.
        boundaries: Positions, rising, from which the next number holds.
        over: What the positions count.

    Raises:
        TypeError: If an entry is no number.
        ValueError: If the counts do not fit, or the boundaries do not rise.

    Example:
        >>> Step([4.0, 2.0, 1.0], boundaries=[10, 20], over="epochs").at(Progress(epoch=10))
        2.0
    """

    def __init__(self, values: Sequence[float], *, boundaries: Sequence[float], over: Over = "epochs") -> None:
        for name, entries in (("values", values), ("boundaries", boundaries)):
            for index, entry in enumerate(entries):
                checks.number(f"{name}[{index}]", entry)
        if len(values) != len(boundaries) + 1 or any(a >= b for a, b in itertools.pairwise(boundaries)):
            expected = "`values` to be one more than `boundaries`, which rise"
            raise ValueError(checks.message(expected, f"values={list(values)} and boundaries={list(boundaries)}"))
        self.values, self.boundaries = [float(value) for value in values], [float(one) for one in boundaries]
        super().__init__(self._value, over=over)

    def _value(self, position: float) -> float:
        return self.values[bisect.bisect_right(self.boundaries, position)]


def _duration(duration: float | None, over: str) -> float:
    checks.one_of("over", over, _AXES)
    if duration is None and over == "fraction":
        return 1.0
    if duration is None:
        raise ValueError(checks.message(f"`duration` to be given in {over}", "duration=None"))
    checks.positive("duration", duration)
    return float(duration)
