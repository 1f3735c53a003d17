"""Every Keras loss on extreme numbers: large, tiny, constant, few, far from zero, in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_features
import pytest
from keras import ops
from keras_loss_cases import (
    as_array,
    called,
    differentiated,
    every_case,
    every_dtype,
    keras_loss,
    logits_cases,
    to_keras,
)
from loss_case import LossCase

import keras_distill


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Nothing of what other tests need: no test here trains a model, and each clean-up would take a second."""


def finite_value(case: LossCase, student: Any, teacher: Any, dtype: str) -> float:
    """The value, after a check that it and the student's gradient are finite."""
    result = differentiated(keras_loss(case), student, teacher, dtype)
    assert np.isfinite(result.value)
    assert result.student_dtype == dtype
    if case.steep and dtype == "float16":
        finite_value(case, np.float16(student), np.float16(teacher), "float32")
    else:
        assert np.isfinite(result.student).all()
    return float(result.value)


@every_dtype
@every_case
def test_finite_where_all_numbers_are_ten_thousand(case: LossCase, dtype: str) -> None:
    finite_value(case, *(1e4 * np.sign(to_keras(case, array)) for array in case.inputs()), dtype)


@every_dtype
@logits_cases
def test_finite_for_two_classes_and_one_example_that_disagree(case: LossCase, dtype: str) -> None:
    for size in (1.0, 1e4):
        student = np.array([[size, -size]])
        assert (finite_value(case, student, -student, dtype) > 0) == case.knows_classes


@every_case
def test_finite_for_a_batch_of_one(case: LossCase) -> None:
    value = finite_value(case, *(to_keras(case, array)[:1] for array in case.inputs()), "float32")

    # One example has no relation to others: such losses may be zero.
    assert value > 0 or (value > -1e-6 and not case.per_example)


# Float16 is where a gradient that is too large overflows: the others are computed in float32 all the same.
@pytest.mark.parametrize(
    ("dtype", "constant"),
    [("float16", 0.0), ("float16", 0.1), ("float16", 12345.678), ("bfloat16", 0.1), ("float32", 0.1)],
)
@every_case
def test_finite_where_a_model_is_constant(case: LossCase, dtype: str, constant: float) -> None:
    student, teacher = (to_keras(case, array) for array in case.inputs())

    finite_value(case, np.full_like(student, constant), teacher, dtype)
    finite_value(case, student, np.full_like(teacher, constant), dtype)
    finite_value(case, np.full_like(student, constant), np.full_like(teacher, constant), dtype)


@pytest.mark.parametrize(
    "loss",
    [
        keras_distill.SoftTargetLoss(standardize=True),
        keras_distill.DISTLoss(),
        keras_distill.PearsonFeatureLoss(),
        keras_distill.FeatureMapTransferLoss(),
        keras_distill.CKALoss(),
        keras_distill.RelationalLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_student_that_is_constant_up_to_rounding_counts_as_constant(loss: Any) -> None:
    """The means of 11 or 12 times 0.7 are not 0.7: what is left must not be divided by its own size."""
    teacher = np.random.default_rng(0).normal(size=(11, 12))

    rounded, exact = (differentiated(loss, np.full((11, 12), constant), teacher) for constant in (0.7, 0.0))

    assert float(rounded.value) == pytest.approx(float(exact.value), rel=1e-6)
    gradients = [np.zeros((11, 12)) if result.student is None else result.student for result in (rounded, exact)]
    np.testing.assert_allclose(*gradients, atol=1e-6)
    assert np.abs(gradients[0]).max() < 1


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_attention_transfer_ignores_an_extreme_scale(size: float) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)).astype("float32")
    loss = keras_distill.AttentionTransferLoss()

    assert float(loss(teacher, size * student)) == pytest.approx(float(loss(teacher, student)), rel=1e-5)


def test_attention_of_a_weak_example_survives_beside_a_strong_one() -> None:
    loss = keras_distill.AttentionTransferLoss(p=12.0)
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)).astype("float32")
    student *= np.array([1e4, 1e-2], "float32").reshape(2, 1, 1, 1)

    alone = [float(loss(teacher[i : i + 1], student[i : i + 1])) for i in range(2)]

    assert float(loss(teacher, student)) == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_distances_beyond_the_quadratic_part_of_the_huber_function_equal_the_oracle() -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 4))
    student[2] += 100  # its distances are 2.5 times the mean

    value = keras_distill.functional.relational_distance(student.astype("float32"), teacher.astype("float32"))

    expected = oracle_features.relational(student, teacher, distance_weight=1.0, angle_weight=0.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_duplicated_examples_coincide_in_spite_of_rounding(seed: int) -> None:
    random = np.random.default_rng(seed)
    student, teacher = np.tile(random.normal(size=(3, 4)), (2, 1)), random.normal(size=(6, 5))

    value = keras_distill.RelationalLoss()(teacher.astype("float32"), student.astype("float32"))

    assert float(value) == pytest.approx(oracle_features.relational(student, teacher), rel=1e-5)


@pytest.mark.parametrize("name", ["RelationalLoss", "CKALoss"])
def test_relations_keep_their_digits_far_from_the_origin(name: str) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    student += 1000

    value = getattr(keras_distill, name)()(teacher, student)

    function = {"RelationalLoss": oracle_features.relational, "CKALoss": oracle_features.cka}[name]
    assert float(value) == pytest.approx(function(*(array.astype("float64") for array in (student, teacher))), rel=1e-5)


def test_probabilistic_transfer_of_opposite_examples_survives_cosines_below_minus_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        vector = random.normal(size=(1, 1000))
        result = differentiated(
            keras_distill.ProbabilisticTransferLoss(),
            np.concatenate([vector, -1.7 * vector]),
            random.normal(size=(2, 3)),
        )
        assert np.isfinite(result.value)
        assert np.isfinite(result.student).all()


def test_scores_of_minus_one_hundred_and_less_count_as_zero() -> None:
    scores = np.array([[[[-99.0, -100.0, -101.0, 2.0]]]], "float32")

    value = keras_distill.AttentionMapLoss("mse")(np.zeros_like(scores), scores)

    assert float(value) == (99**2 + 2**2) / 4


def test_divergence_of_probabilities_equals_that_of_their_scores() -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)).astype("float32")

    value = keras_distill.AttentionMapLoss(from_scores=False)(ops.softmax(teacher), ops.softmax(student))

    assert float(value) == pytest.approx(float(keras_distill.AttentionMapLoss()(teacher, student)), rel=1e-5)


def test_probability_of_zero_has_a_finite_value_and_a_gradient() -> None:
    loss = keras_distill.AttentionMapLoss(from_scores=False)

    result = differentiated(loss, np.array([[[[0.0, 1.0]]]]), np.array([[[[1.0, 0.0]]]]))

    assert float(result.value) == pytest.approx(1 - np.log(1e-6), rel=1e-6)
    assert result.student[0, 0, 0, 0] == pytest.approx(-1e6)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_keys_masked_by_minus_infinity_have_no_gradient(kind: str) -> None:
    student, teacher = (np.array([[[[score, 2.0, -np.inf]]]]) for score in (1.0, 3.0))

    result = differentiated(keras_distill.AttentionMapLoss(kind), student, teacher)

    assert np.isfinite(result.value)
    assert np.isfinite(result.student).all()
    assert result.student[0, 0, 0, 2] == 0


@pytest.mark.parametrize("size", [6e-8, 6e4])
@every_case
def test_finite_at_the_smallest_and_the_largest_float16(case: LossCase, size: float) -> None:
    student, teacher = (ops.cast(size * np.sign(to_keras(case, array)), "float16") for array in case.inputs())

    assert np.isfinite(as_array(called(keras_loss(case), student, teacher)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_case
def test_half_precision_inputs_are_computed_in_float32(case: LossCase, dtype: str) -> None:
    student, teacher = (as_array(ops.cast(to_keras(case, array), dtype)) for array in case.inputs())
    loss = keras_loss(case)

    half, single = (differentiated(loss, student, teacher, precision) for precision in (dtype, "float32"))

    assert half.value_dtype == "float32"
    assert float(half.value) == pytest.approx(float(single.value), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["SimilarityPreservingLoss", "InterChannelCorrelationLoss"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_relations_of_products_ignore_an_extreme_scale(name: str, size: float) -> None:
    """The squares of the products would leave float32."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)).astype("float32")
    loss = getattr(keras_distill, name)()

    assert float(loss(teacher, size * student)) == pytest.approx(float(loss(teacher, student)), rel=1e-5)
