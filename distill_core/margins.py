"""Margins of a batch normalisation, from its scale and shift alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Beyond this number of standard deviations the tail's probability is no longer a normal number.
_FAR = 30.0


def negative_mean(mean: float, deviation: float) -> float:
    r"""Mean of the negative values of a normal distribution.

    .. math:: \mathrm{E}[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)}

    Args:
        mean: The distribution's mean.
        deviation: Its standard deviation, at least 0.

    Returns:
        A number that is at most 0.

    Example:
        >>> round(negative_mean(0.0, 1.0), 4), round(negative_mean(2.0, 0.5), 4)
        (-0.7979, -0.1128)
    """
    if deviation == 0:
        return min(mean, 0.0)
    distance = mean / deviation
    if distance > _FAR:  # the ratio's series, without the mean, which it cancels
        return -deviation * (1 / distance - 2 / distance**3)
    density = math.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
    return mean - deviation * density / (0.5 * math.erfc(distance / math.sqrt(2)))


def margins_of(scales: Sequence[float], shifts: Sequence[float]) -> tuple[float, ...]:
    """Means of the negative responses of a batch normalisation, one for each channel.

    Args:
        scales: Its learned factors.
        shifts: Its learned offsets.

    Returns:
        Numbers that are at most 0.

    Example:
        >>> [round(margin, 4) for margin in margins_of([1.0, -0.5], [0.0, 2.0])]
        [-0.7979, -0.1128]
    """
    return tuple(negative_mean(float(shift), abs(float(scale))) for scale, shift in zip(scales, shifts, strict=True))
