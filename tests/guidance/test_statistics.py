"""Means and paired differences over seeds against scipy and against hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill_core.guidance.statistics import Estimate, estimate, paired, t_quantile
from distill_core.guidance.timing import typical_seconds

scipy_stats = pytest.importorskip("scipy.stats", reason="the oracle is scipy, which scikit-learn brings: extra `plots`")


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 99, 1000])
@pytest.mark.parametrize("probability", [0.0, 0.5, 0.9, 0.95, 0.975, 0.99, 0.9999])
def test_quantiles_of_the_t_distribution_are_those_of_scipy(degrees: int, probability: float) -> None:
    expected = scipy_stats.t.ppf((1 + probability) / 2, degrees)
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = [0.81, 0.79, 0.84, 0.8, 0.77]
    result = estimate(values)
    low, high = scipy_stats.t.interval(0.95, 4, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert (result.mean - result.margin, result.mean + result.margin) == pytest.approx((low, high))


def test_the_interval_of_paired_differences_agrees_with_the_paired_test_of_scipy() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 6))
    result = paired(dict(enumerate(first)), dict(enumerate(second)))
    interval = scipy_stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.mean - result.margin, result.mean + result.margin) == pytest.approx((interval.low, interval.high))


def test_a_margin_by_hand() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027, margin 4.3027 / sqrt(3)
    result = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert result == Estimate(2.0, pytest.approx(4.3026527 / math.sqrt(3)), 3)
    assert result.sign == 0


def test_the_correction_for_several_methods_is_that_of_bonferroni() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    expected = scipy_stats.t.ppf(1 - 0.05 / 3 / 2, 3) * scipy_stats.sem(values)
    assert estimate(values, comparisons=3).margin == pytest.approx(expected)


def test_seeds_without_a_partner_are_left_out() -> None:
    assert paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5, 2: 0.0}) == Estimate(0.5, 0.0, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_interval_and_no_sign() -> None:
    assert estimate([3.0]) == Estimate(3.0, None, 1)
    assert estimate([3.0]).sign == 0


@pytest.mark.parametrize(("values", "sign"), [([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([-1.0, 1.0, 0.5], 0)])
def test_the_sign_is_that_of_an_interval_without_0(values: list[float], sign: int) -> None:
    assert estimate(values).sign == sign


def test_differences_of_rounding_are_not_a_sign() -> None:
    assert paired({0: 0.1 + 0.2, 1: 0.1 + 0.2}, {0: 0.3, 1: 0.3}).sign == 0


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    samples = np.random.default_rng(1).normal(0.3, 2.0, size=(4000, 4))
    estimates = [estimate(list(sample)) for sample in samples]
    inside = np.mean([abs(result.mean - 0.3) <= result.margin for result in estimates])
    assert inside == pytest.approx(0.95, abs=0.012)


def test_a_step_is_timed_without_pauses_but_with_regular_expensive_steps() -> None:
    steps = [1.0, 1.0, 1.0, 5.0] * 30
    disturbed = list(steps)
    for place in (0, 1, 2, 45, 101):
        disturbed[place] = 300.0
    assert typical_seconds(disturbed) == typical_seconds(steps) == 2.0
    assert typical_seconds([3.0, 2.0, 90.0]) == 3.0
    assert typical_seconds([]) is None
