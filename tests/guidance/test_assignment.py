"""The choice of pairs: stages, order, resolution, and the largest sum against a search through all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distill_core.guidance.assignment import Layer, best_pairs, choosable, grouped, pairs_by_depth, scores


def maps(*sides: int, block: bool = False) -> list[Layer]:
    return [Layer(f"l{i}", (8, side, side), (side, side), block=block) for i, side in enumerate(sides)]


def search(values: np.ndarray, groups: list[list[int]], columns: list[int]) -> float:
    best = -np.inf
    for rows in itertools.product(*groups):
        for chosen in itertools.combinations(columns, len(groups)):
            best = max(best, sum(values[row, column] for row, column in zip(rows, chosen, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_in_order_has_a_larger_sum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(6, 7))
    groups = [[0, 1], [2], [3, 4, 5]][: 1 + seed % 3]
    columns = sorted(generator.choice(7, size=int(generator.integers(len(groups), 8)), replace=False).tolist())
    pairs = best_pairs(values, groups, columns)
    assert sum(values[pair] for pair in pairs) == pytest.approx(search(values, groups, columns))
    assert [row in group for (row, _), group in zip(pairs, groups, strict=True)] == [True] * len(groups)
    assert all(first[1] < second[1] for first, second in itertools.pairwise(pairs))
    assert {column for _, column in pairs} <= set(columns)


def test_of_nearly_equal_similarities_the_equal_resolution_is_preferred() -> None:
    student, teacher = maps(4), maps(8, 4)
    assert best_pairs(scores(np.array([[0.80, 0.65]]), student, teacher), [[0]], [0, 1]) == [(0, 1)]
    assert best_pairs(scores(np.array([[0.80, 0.55]]), student, teacher), [[0]], [0, 1]) == [(0, 0)]


def test_of_equal_similarities_the_equal_depth_is_preferred() -> None:
    student, teacher = maps(4, 4), maps(4, 4, 4, 4)
    values = scores(np.ones((2, 4)), student, teacher)
    assert best_pairs(values, [[0], [1]], range(4)) == [(0, 1), (1, 3)]


def test_a_halving_of_tokens_costs_as_much_as_one_of_both_sides() -> None:
    long, short = Layer("a", (16, 3), (16,)), Layer("b", (8, 3), (8,))
    sides = maps(8, 4)
    for student, teacher in ((long, short), (short, long), (sides[0], sides[1]), (sides[1], sides[0])):
        assert scores(np.array([[1.0]]), [student], [teacher])[0, 0] == pytest.approx(0.8)


def test_each_run_of_one_resolution_is_a_group() -> None:
    layers = maps(8, 8, 4, 4, 4, 8)
    assert grouped(layers, range(6), None) == [[0, 1], [2, 3, 4], [5]]
    assert grouped(layers, range(6), 2) == [[2, 3, 4], [5]]
    assert grouped(layers, range(6), 4) == [[0, 1], [2], [3, 4], [5]]
    assert grouped(layers, range(6), 6) == [[0], [1], [2], [3], [4], [5]]


def test_layers_of_one_resolution_are_cut_into_four_groups() -> None:
    groups = grouped(maps(*[4] * 12), range(12), None)
    assert groups == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert grouped(maps(4, 4), range(2), None) == [[0], [1]]


def test_blocks_and_the_layers_after_them_can_be_chosen() -> None:
    layers = [*maps(8), *maps(4, 4, block=True), *maps(4), Layer("pool", (8,))]
    assert choosable(layers, vectors=False) == [1, 2, 3]
    assert choosable(layers, vectors=True) == [1, 2, 3, 4]
    assert choosable([Layer("a", (3,)), Layer("b", (3,))], vectors=False) == [0, 1]


def test_maps_by_depth_are_those_of_the_papers() -> None:
    # TinyBERT, arXiv:1909.10351: layer m of 4 is paired with layer 3 m of 12, layer m of 6 with 2 m
    assert pairs_by_depth("uniform", 4, 12) == [(m - 1, 3 * m - 1) for m in (1, 2, 3, 4)]
    assert pairs_by_depth("uniform", 6, 12) == [(m - 1, 2 * m - 1) for m in range(1, 7)]
    assert pairs_by_depth("uniform", 12, 4, 2) == [(5, 1), (11, 3)]
    assert pairs_by_depth("last", 3, 5) == [(0, 2), (1, 3), (2, 4)]
