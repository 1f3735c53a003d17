"""Numbers in words, for a page that people read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from distill_core.guidance.results import Results
from distill_core.guidance.run_records import number
from distill_core.terminal import printable

UNKNOWN: Final = "not known"
NOT_A_NUMBER: Final = "not a number"


@dataclass(frozen=True)
class Numbers:
    """The way in which the deciding metric is written.

    Args:
        percent: Whether values from 0 to 1 are written in percent, and their differences in points.
    """

    percent: bool

    @classmethod
    def of(cls, results: Results) -> Numbers:
        """Percent for shares of which more is better, such as accuracies, and plain numbers for everything else."""
        values = [value for method in results.methods for value in results.values(method).values()]
        values += [results.teacher_value()] if math.isfinite(results.teacher_value()) else []
        return cls(results.higher_is_better and all(0 <= value <= 1 for value in values))

    def value(self, value: float) -> str:
        """A value.

        Example:
            >>> Numbers(True).value(0.9125), Numbers(False).value(0.91254)
            ('91.2 %', '0.9125')
        """
        if not math.isfinite(value):
            return NOT_A_NUMBER
        return share(value) if self.percent else _plain(value)

    def difference(self, value: float) -> str:
        """A difference with its sign.

        Example:
            >>> Numbers(True).difference(-0.021), Numbers(False).difference(0.00123456)
            ('-2.10', '+0.001235')
            >>> Numbers(True).difference(-1e-9)
            '+0.00'
        """
        if not math.isfinite(value):
            return ""
        # adding 0.0 turns a rounded -0.0 into 0.0
        return f"{round(100 * value, 2) + 0.0:+.2f}" if self.percent else _plain(value + 0.0, sign="+")

    @property
    def unit(self) -> str:
        """The unit of differences, with a space before it, or an empty string."""
        return " points" if self.percent else ""

    def tick(self, value: float) -> str:
        """A value beside an axis."""
        return f"{100 * value:.6g}" if self.percent else f"{value:.6g}"

    def spread(self, values: Sequence[float]) -> str:
        """Mean and standard deviation of several values."""
        if not values:
            return UNKNOWN
        middle = self.value(statistics.fmean(values))
        if len(values) == 1:
            return middle
        deviation = statistics.stdev(values)
        return f"{middle} ± {100 * deviation:.1f}" if self.percent else f"{middle} ± {_plain(deviation, digits=2)}"


def share(value: float) -> str:
    """A share in percent.

    Example:
        >>> share(0.1234), share(float("nan"))
        ('12.3 %', '')
    """
    return f"{100 * value:.1f} %" if math.isfinite(value) else ""


def shares(values: Sequence[float]) -> str:
    """The mean of shares in percent, and their standard deviation if there are several."""
    finite = [value for value in values if math.isfinite(value)]
    return Numbers(True).spread(finite) if finite else ""


def count(value: Any) -> str:
    """A whole number with separators, or that it is not known.

    Example:
        >>> count(1234567), count(None)
        ('1,234,567', 'not known')
    """
    return f"{round(number(value)):,}" if math.isfinite(number(value)) else UNKNOWN


def size(value: Any) -> str:
    """A number of bytes.

    Example:
        >>> size(12_345), size(None)
        ('12.3 kB', 'not known')
    """
    amount = number(value)
    if not math.isfinite(amount):
        return UNKNOWN
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB"


def duration(value: Any) -> str:
    """A duration from seconds.

    Example:
        >>> duration(0.00123), duration(95), duration(7200)
        ('1.23 ms', '1.6 min', '2.0 h')
    """
    seconds = number(value)
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def clipped(text: Any, length: int = 80) -> str:
    """Text from a file on one line, of limited length, without characters that cannot be seen.

    Example:
        >>> clipped("a" * 100, 10)
        'aaaaaaaaa…'
    """
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def plural(amount: int, noun: str) -> str:
    """A number and its noun.

    Example:
        >>> plural(1, "seed"), plural(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _plain(value: float, *, digits: int = 4, sign: str = "") -> str:
    return f"{value:{sign}.{digits}g}"
