"""Means and paired differences over seeds, with confidence intervals of Student's t distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95
_ROUNDING: Final = 1e-12  # equal metrics of all seeds may differ by so much


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its confidence interval.

    Args:
        mean: The mean.
        margin: Half the width of the interval; None for a single seed, which has no interval.
        count: Number of seeds.
    """

    mean: float
    margin: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 if the whole interval is greater than 0, -1 if it is less, and 0 if it contains 0 or is not known."""
        if self.margin is None or abs(self.mean) <= max(self.margin, _ROUNDING):
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float], *, comparisons: int = 1, confidence: float = CONFIDENCE) -> Estimate:
    r"""The mean of some values and its confidence interval.

    .. math:: \bar{x} \pm t_{n - 1, \, 1 - \alpha / 2m} \, s / \sqrt{n}

    where s is the sample's standard deviation, 1 - alpha the confidence, and m the number of comparisons.

    Args:
        values: The values, one for each seed.
        comparisons: Number of intervals that shall all be right together with this confidence (Bonferroni).
        confidence: Probability that the intervals contain the true means, from 0 to 1.

    Returns:
        The estimate.

    Example:
        >>> estimate([1.0, 2.0, 4.0])
        Estimate(mean=2.333..., margin=3.794..., count=3)
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, 1)
    deviation = statistics.stdev(values)
    quantile = t_quantile(1 - (1 - confidence) / comparisons, len(values) - 1)
    return Estimate(mean, quantile * deviation / math.sqrt(len(values)), len(values))


def paired(
    values: Mapping[int, float], base: Mapping[int, float], *, comparisons: int = 1, confidence: float = CONFIDENCE
) -> Estimate | None:
    """The mean difference between two methods over the seeds that both have, with its interval.

    Args:
        values: Values of a method by seed.
        base: Values of the method to compare it with.
        comparisons: As in :func:`estimate`.
        confidence: As in :func:`estimate`.

    Returns:
        The estimate of ``values - base``; None if they have no seed in common.

    Example:
        >>> paired({0: 0.5, 1: 0.75, 2: 0.5}, {0: 0.25, 1: 0.5, 3: 0.0})
        Estimate(mean=0.25, margin=0.0, count=2)
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    return estimate(differences, comparisons=comparisons, confidence=confidence) if differences else None


def t_quantile(probability: float, degrees: int) -> float:
    """The number that the absolute value of a t distributed variable does not exceed with some probability.

    Args:
        probability: The two-sided probability, at least 0 and less than 1.
        degrees: Degrees of freedom, 1 or more.

    Returns:
        The quantile.

    Example:
        >>> round(t_quantile(0.95, 4), 4), round(t_quantile(0.95, 1), 3)
        (2.7764, 12.706)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # each step halves the angle's interval
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _inside(angle: float, degrees: int) -> float:
    """Probability that a t distributed variable lies between minus and plus ``sqrt(degrees) * tan(angle)``.

    The finite sums for whole degrees of freedom: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        factor, total = cosine, 0.0
        for index in range(1, degrees - 1, 2):
            total += factor
            factor *= cosine**2 * (index + 1) / (index + 2)
        return 2 / math.pi * (angle + sine * total)
    factor, total = 1.0, 0.0
    for index in range(0, degrees - 1, 2):
        total += factor
        factor *= cosine**2 * (index + 1) / (index + 2)
    return sine * total
