"""Did a method help? Differences between runs of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.results import Results
from distill_core.guidance.statistics import paired

BETTER, WORSE, UNCLEAR, UNTESTED = "better", "worse", "no clear difference", "not tested"


@dataclass(frozen=True)
class Difference:
    """A method's metric minus that of a baseline with the same seed.

    Args:
        method: Name of the method.
        baseline: Name of the method that it is compared with.
        seeds: Number of seeds that both have.
        mean: Mean difference; NaN without a common seed.
        low: Lower end of the 95 % interval; NaN with less than two seeds.
        high: Upper end.
        verdict: "better", "worse", "no clear difference" or "not tested".
    """

    method: str
    baseline: str
    seeds: int
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    verdict: str = UNTESTED


@dataclass(frozen=True)
class Verdict:
    """The answer of a comparison.

    Args:
        best: The method with a teacher that has the best mean, or None.
        differences: Each method beside each baseline.
    """

    best: str | None
    differences: tuple[Difference, ...]

    def beside(self, baseline: str, method: str | None = None) -> Difference | None:
        """The difference of a method, by default the best one, to a baseline; None if they were not compared."""
        name = self.best if method is None else method
        return next((d for d in self.differences if (d.method, d.baseline) == (name, baseline)), None)


def verdict_of(results: Results) -> Verdict:
    """The verdict on the methods of a comparison.

    Runs of the same seed are compared, and the mean difference has a 95 % interval of Student's t. With several methods
    it is so wide that the intervals of all methods are right together (Bonferroni's correction).

    Args:
        results: The results folder.
    """
    differences = [
        paired_difference(
            method,
            baseline,
            results.values(method),
            results.values(baseline),
            results.higher_is_better,
            max(1, len(results.distilled)),
        )
        for baseline in (ALONE, EQUAL_COMPUTE)
        if baseline in results.methods
        for method in results.methods
        if method not in (ALONE, baseline)
    ]
    return Verdict(_best(results), tuple(differences))


def paired_difference(
    method: str,
    baseline: str,
    values: Mapping[int, float],
    baseline_values: Mapping[int, float],
    higher_is_better: bool = True,
    comparisons: int = 1,
) -> Difference:
    """Mean and 95 % interval of the differences between runs of the same seed.

    Args:
        method: Name of the method.
        baseline: Name of the baseline.
        values: The method's values by seed.
        baseline_values: The baseline's values by seed.
        higher_is_better: Whether a greater value is better.
        comparisons: Number of intervals that shall all be right together with a probability of 95 %.

    Returns:
        The difference; its verdict is "better" or "worse" if the interval does not contain 0.

    Example:
        >>> paired_difference("a", "b", {0: 0.8, 1: 0.9}, {0: 0.7, 1: 0.8}).verdict
        'better'
    """
    seeds = len(values.keys() & baseline_values.keys())
    gain = paired(values, baseline_values, comparisons=comparisons)
    if gain is None:
        return Difference(method, baseline, seeds)
    if gain.margin is None:
        return Difference(method, baseline, seeds, gain.mean)
    verdict = (UNCLEAR, BETTER, WORSE)[gain.sign if higher_is_better else -gain.sign]
    return Difference(method, baseline, seeds, gain.mean, gain.mean - gain.margin, gain.mean + gain.margin, verdict)


def _best(results: Results) -> str | None:
    """The method with a teacher that has the best mean over its seeds."""
    means = {
        method: statistics.fmean(values.values()) for method in results.distilled if (values := results.values(method))
    }
    if not means:
        return None
    return (max if results.higher_is_better else min)(means, key=lambda method: means[method])
