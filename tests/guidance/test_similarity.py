"""Minibatch CKA against the formula of the paper in float64, published values, and laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cka_by_hand import cka_by_hand
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill_core.guidance.similarity import MinibatchCKA, check_size

GOLDEN = Path(__file__).parents[1] / "golden"
Array = NDArray[np.float64]


def grams(*features: Array) -> Array:
    return np.stack([feature.reshape(len(feature), -1) @ feature.reshape(len(feature), -1).T for feature in features])


def similarity(student: Array, teacher: Array) -> float:
    cka = MinibatchCKA(["s"], ["t"])
    cka.add(grams(student), grams(teacher))
    return float(cka.matrix()[0, 0])


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_it_equals_the_published_code_where_batches_have_equal_weights(case: str) -> None:
    with np.load(GOLDEN / f"cka_minibatch__{case}.npz") as arrays:
        student = [arrays[name] for name in sorted(arrays.files) if name.startswith("student_feat")]
        teacher = [arrays[name] for name in sorted(arrays.files) if name.startswith("teacher_feat")]
        sizes, expected = arrays["batch_sizes"], arrays["cka_expected"]
    cka = MinibatchCKA(["s"] * len(student), ["t"] * len(teacher))
    for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        rows = slice(start, start + size)
        cka.add(grams(*(each[rows] for each in student)), grams(*(each[rows] for each in teacher)), weight=1.0)
    np.testing.assert_allclose(cka.matrix(), expected, rtol=1e-9)


def test_batches_of_unequal_size_are_weighted_by_their_size() -> None:
    generator = np.random.default_rng(0)
    sizes = [5, 12, 7]
    student = [generator.normal(size=(n, 6)) for n in sizes]
    teacher = [np.tanh(batch[:, :4] + generator.normal(size=(len(batch), 4))) for batch in student]
    cka = MinibatchCKA(["s"], ["t"])
    for first, second in zip(student, teacher, strict=True):
        cka.add(grams(first), grams(second))
    assert cka.matrix()[0, 0] == pytest.approx(cka_by_hand(student, teacher, [5, 12, 7]), rel=1e-12)
    assert cka.matrix()[0, 0] != pytest.approx(cka_by_hand(student, teacher, [1, 1, 1]), rel=1e-3)
    assert (cka.examples, cka.batches) == (24, 3)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.integers(4, 9))
def test_rotated_permuted_scaled_and_shifted_features_have_similarity_one(seed: int, scale: float, n: int) -> None:
    generator = np.random.default_rng(seed)
    feature = generator.normal(size=(n, 5))
    rotation = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    for changed in (feature @ rotation, feature[:, generator.permutation(5)], scale * feature, feature + scale):
        assert similarity(feature, changed) == pytest.approx(1, abs=1e-6)


def test_independent_features_are_near_zero_though_they_are_wide() -> None:
    generator = np.random.default_rng(0)
    cka = MinibatchCKA(["s"], ["t"])
    for _ in range(20):
        cka.add(grams(generator.normal(size=(8, 500))), grams(generator.normal(size=(8, 500))))
    assert abs(cka.matrix()[0, 0]) < 0.1
    wide = [each - each.mean(0) for each in generator.normal(size=(2, 8, 500))]
    biased = np.sum((wide[0] @ wide[0].T) * (wide[1] @ wide[1].T))
    biased /= np.prod([np.linalg.norm(each @ each.T) for each in wide])
    assert biased > 0.9  # the usual estimator, on the same kind of features


def test_a_layer_that_is_the_same_for_all_examples_has_no_similarity() -> None:
    cka = MinibatchCKA(["constant", "s"], ["t"])
    feature = np.random.default_rng(0).normal(size=(6, 3))
    cka.add(np.stack([np.zeros((6, 6)), grams(feature)[0]]), grams(feature))
    assert np.isnan(cka.matrix()[0, 0])
    assert cka.matrix()[1, 0] == pytest.approx(1)
    assert cka.varies("student").tolist() == [False, True]


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected every batch to have at least 4 examples, but got one with 3"):
        MinibatchCKA(["s"], ["t"]).add(np.zeros((1, 3, 3)), np.zeros((1, 3, 3)))
    check_size(4)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_numbers_that_are_not_finite_are_reported_with_their_layer(who: str) -> None:
    good, bad = np.ones((2, 4, 4)), np.ones((2, 4, 4))
    bad[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=f"the {who}'s layers to return finite numbers, but got NaN .* from 'second'"):
        MinibatchCKA(["first", "second"], ["first", "second"]).add(*((bad, good) if who == "student" else (good, bad)))
