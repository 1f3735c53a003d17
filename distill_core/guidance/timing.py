"""The duration of a step from many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

_BLOCK: Final = 20  # steps in a row


def typical_seconds(times: Sequence[float]) -> float | None:
    """The duration of a step while nothing else disturbs it: the lower quartile of means of 20 steps in a row.

    Steps that are expensive by design, such as every fourth, count in each mean. The first steps of a run, which
    prepare what later ones reuse, and pauses of a busy machine are in few of the blocks.

    Args:
        times: Durations in the order of the steps.

    Returns:
        The duration; the median of fewer than 20 steps, and None of an empty list.

    Example:
        >>> steps = [1.0, 1.0, 1.0, 5.0] * 20
        >>> typical_seconds([*steps[:40], 900.0, *steps[40:]])
        2.0
    """
    if len(times) < _BLOCK:
        return statistics.median(times) if times else None
    starts = range(0, len(times) - _BLOCK + 1, _BLOCK)
    means = sorted(statistics.fmean(times[start : start + _BLOCK]) for start in starts)
    return means[(len(means) - 1) // 4]
