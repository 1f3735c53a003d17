"""Differences between runs of the same seed, and the verdict on them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from results_folder import ALONE, EQUAL, comparison, run, write_comparison, write_runs
from scipy import stats

from distill_core.guidance.results import read_results
from distill_core.guidance.verdict import paired_difference, verdict_of


@pytest.mark.parametrize("comparisons", [1, 3])
def test_the_interval_equals_that_of_scipy(comparisons: int) -> None:
    random = np.random.default_rng(0)
    values, others = random.normal(0.9, 0.01, 6), random.normal(0.88, 0.01, 6)
    pairs = dict(enumerate(values.tolist())), dict(enumerate(others.tolist()))
    difference = paired_difference("a", "b", *pairs, comparisons=comparisons)
    expected = stats.ttest_rel(values, others).confidence_interval(1 - 0.05 / comparisons)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert difference.mean == pytest.approx((values - others).mean())


def test_the_intervals_of_several_methods_are_right_together(tmp_path: Path) -> None:
    values = {ALONE: [0.70, 0.71, 0.72], "a": [0.80, 0.82, 0.81], "b": [0.70, 0.71, 0.72]}
    difference = verdict_of(read_results(folder_of(tmp_path, values))).beside(ALONE)
    assert difference.high - difference.mean == pytest.approx(stats.t.ppf(1 - 0.025 / 2, 2) * 0.01 / math.sqrt(3))


@pytest.mark.parametrize(
    ("values", "higher_is_better", "verdict"),
    [
        ([0.80, 0.81, 0.82], True, "better"),
        ([0.80, 0.81, 0.82], False, "worse"),
        ([0.60, 0.61, 0.62], True, "worse"),
        ([0.60, 0.61, 0.62], False, "better"),
        ([0.60, 0.72, 0.80], True, "no clear difference"),
        ([0.70, 0.71, 0.72], True, "no clear difference"),
        ([0.9], True, "not tested"),
        ([], True, "not tested"),
    ],
)
def test_verdicts_beside_a_baseline(values: list[float], higher_is_better: bool, verdict: str) -> None:
    baseline = {0: 0.70, 1: 0.71, 2: 0.72}
    assert paired_difference("a", "b", dict(enumerate(values)), baseline, higher_is_better).verdict == verdict


def test_only_common_seeds_count() -> None:
    difference = paired_difference("a", "b", {0: 0.8, 7: 0.1}, {0: 0.7, 3: 0.9})
    assert (difference.seeds, difference.mean) == (1, pytest.approx(0.1))
    assert math.isnan(difference.low)


def folder_of(tmp_path: Path, values: dict[str, list[float]], **changes: object) -> Path:
    write_comparison(tmp_path, comparison(tuple(values), **changes))
    runs = [run(method, seed, value) for method, each in values.items() for seed, value in enumerate(each)]
    write_runs(tmp_path, runs)
    return tmp_path


def test_the_best_method_has_a_teacher_and_the_best_mean(tmp_path: Path) -> None:
    values = {ALONE: [0.70, 0.71], EQUAL: [0.95, 0.96], "a": [0.72, 0.73], "b": [0.90, 0.91]}
    verdict = verdict_of(read_results(folder_of(tmp_path, values)))
    assert verdict.best == "b"
    assert verdict.beside(ALONE).mean == pytest.approx(0.2)
    assert verdict.beside(EQUAL).verdict == "worse"
    assert verdict.beside(ALONE, "a").mean == pytest.approx(0.02)


def test_a_smaller_metric_is_better_in_mode_min(tmp_path: Path) -> None:
    values = {ALONE: [0.70, 0.71], "a": [0.72, 0.73], "b": [0.90, 0.91]}
    assert verdict_of(read_results(folder_of(tmp_path, values, mode="min"))).best == "a"


def test_without_a_number_there_is_not_a_best_method(tmp_path: Path) -> None:
    verdict = verdict_of(read_results(folder_of(tmp_path, {ALONE: [0.7], "a": [math.nan]})))
    assert verdict.best is None
    assert verdict.beside(ALONE) is None
