"""The duration of a step from many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

_LEFT_OUT: Final = 20  # one in so many at either end


def middle_mean(times: Sequence[float]) -> float | None:
    """The mean of the middle 90 % of some durations.

    The first steps of a run, which prepare what later ones reuse, and pauses of the machine are left out; steps that
    are expensive by design, such as every fourth, count.

    Args:
        times: Durations, in any order.

    Returns:
        The mean; None of an empty list.

    Example:
        >>> middle_mean([*[1.0] * 15, *[3.0] * 5, 1000.0])
        1.526...
    """
    if not times:
        return None
    cut = -(-len(times) // _LEFT_OUT) if len(times) > 2 else 0
    return statistics.fmean(sorted(times)[cut : len(times) - cut])
