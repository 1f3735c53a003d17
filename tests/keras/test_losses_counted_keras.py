"""Every Keras loss where a part does not count: ignored labels, masks, classes of probability 0; and its settings."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_loss_cases import (
    KERAS_CASES,
    as_array,
    called,
    class_indices,
    differentiated,
    every_case,
    keras_loss,
    to_keras,
)
from loss_case import LossCase

import keras_distill
from keras_distill import backends

LABELLED = [case for case in KERAS_CASES if case.loss.needs_labels]
labelled_cases = pytest.mark.parametrize("case", LABELLED, ids=str)
SOFTMAX = [case for case in KERAS_CASES if case.on_logits and case.loss.__name__ != "LogitMSELoss"]
SOFTMAX += [case for case in KERAS_CASES if case.name in ("kl", "attention_kl")]
# Where an impossible class still is one of those that the loss averages over or correlates.
COUNTS_CLASSES = ("DISTLoss", "MultiLevelLogitLoss", "BinarySoftTargetLoss", "QualityFocalLoss")


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Nothing of what other tests need: no test here trains a model, and each clean-up would take a second."""


def rows() -> tuple[Any, Any, Any]:
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 5)).astype("float32")
    return student, teacher, np.array([0, 4, 2, 1, 3, 0], "int32")


@pytest.mark.parametrize(("ignored", "settings"), [(-100, {}), (-1, {}), (255, {"ignore_index": 255})])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@labelled_cases
def test_rows_with_an_ignored_label_do_not_count(case: LossCase, reduction: str, ignored: int, settings: dict) -> None:
    student, teacher, labels = rows()
    kept = np.arange(6) != 2
    loss = getattr(keras_distill, case.loss.__name__)(reduction=reduction, **settings)
    expected = differentiated(loss, student[kept], teacher[kept], labels=labels[kept])
    labels[2], student[2], teacher[2] = ignored, np.nan, np.nan

    result = differentiated(loss, student, teacher, labels=labels)

    assert float(result.value) == pytest.approx(float(expected.value), rel=1e-5)
    np.testing.assert_allclose(result.student[kept], expected.student, rtol=1e-4, atol=1e-6)
    assert (result.student[2] == 0).all()


@labelled_cases
def test_values_of_ignored_rows_are_zero_and_labels_beyond_the_classes_are_loud(case: LossCase) -> None:
    student, teacher, labels = rows()
    labels[1], labels[3] = -100, 7
    loss = getattr(keras_distill, case.loss.__name__)(reduction=None)

    values = as_array(called(loss, student, teacher, labels))

    assert values[1] == 0
    assert np.isnan(values).tolist() == [False, False, False, True, False, False]


@labelled_cases
def test_labels_that_are_all_ignored_make_the_loss_zero(case: LossCase) -> None:
    student, teacher, labels = rows()

    result = differentiated(getattr(keras_distill, case.loss.__name__)(), student, teacher, labels=labels * 0 - 100)

    assert float(result.value) == 0
    assert result.student is None or (result.student == 0).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@labelled_cases
def test_labels_never_pass_through_half_precision(case: LossCase, precision: str) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 5000)).astype("float32")
    labels = np.array([301, 4001], "int32")
    expected = float(called(getattr(keras_distill, case.loss.__name__)(), student, teacher, labels))

    value = float(called(getattr(keras_distill, case.loss.__name__)(dtype=precision), student, teacher, labels))

    assert value == pytest.approx(expected, rel=1e-6)
    floatx = keras.config.floatx()
    keras.config.set_floatx(precision)
    try:
        loss = getattr(keras_distill, case.loss.__name__)()
    finally:
        keras.config.set_floatx(floatx)
    assert float(called(loss, student, teacher, labels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize(
    "case", [c for c in KERAS_CASES if keras_loss(c).gives == "positions" and len(c.student_shape) == 2], ids=str
)
def test_a_mask_of_keras_is_the_same_as_a_smaller_batch(case: LossCase, reduction: str) -> None:
    student, teacher = (to_keras(case, array).astype("float32") for array in case.inputs())
    mask = np.arange(len(student)) != 1
    loss = keras_loss(case, reduction=reduction)
    labels = class_indices(teacher)
    expected = float(as_array(called(loss, student[mask], teacher[mask], labels[mask])))

    masked = backends.with_mask(ops.convert_to_tensor(student), ops.convert_to_tensor(mask))

    assert float(as_array(called(loss, masked, teacher, labels))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_classes_of_probability_zero_leave_value_and_gradient_finite(case: LossCase, who: str) -> None:
    student, teacher = (to_keras(case, array).astype("float32") for array in case.inputs())
    student, teacher = (np.concatenate([array, array[..., :1] + 1], -1) for array in (student, teacher))
    labels = np.zeros(student.shape[:-1], "int32")
    settings = dict(case.settings)
    for temperature in (0.1, 4.0):
        if "temperature" in settings:
            settings["temperature"] = temperature
        student_scores, teacher_scores = student.copy(), teacher.copy()
        if who != "teacher":
            student_scores[..., -1] = -np.inf
        if who != "student":
            teacher_scores[..., -1] = -np.inf

        result = differentiated(keras_loss(case, settings), student_scores, teacher_scores, labels=labels)

        assert np.isfinite(result.value)
        assert np.isfinite(result.student).all()
        if who == "both":
            assert (result.student[..., -1] == 0).all()
            if case.loss.__name__ not in COUNTS_CLASSES:
                loss = keras_loss(case, settings)
                expected = float(called(loss, student_scores[..., :-1], teacher_scores[..., :-1], labels))
                assert float(result.value) == pytest.approx(expected, rel=1e-5)


def test_relations_take_vectors_with_their_heads_apart() -> None:
    student, teacher = (np.random.default_rng(0).normal(size=(2, 3, 2, d)).astype("float32") for d in (4, 6))
    loss = keras_distill.AttentionRelationLoss(relation_heads=2)

    value = float(loss(teacher, student))

    assert value == pytest.approx(float(loss(teacher.reshape(2, 3, 12), student.reshape(2, 3, 8))), rel=1e-6)


@every_case
def test_repr_shows_every_setting_and_no_address(case: LossCase) -> None:
    loss = keras_loss(case)
    options = ("reduction", "name", "dtype")
    settings = [name for name in inspect.signature(type(loss)).parameters if name not in options]

    assert all(f"{name}=" in repr(loss) for name in settings)
    assert " at 0x" not in repr(loss)


@every_case
def test_numbers_of_numpy_are_numbers(case: LossCase) -> None:
    kinds = {int: np.int64, float: np.float32}
    settings = {name: kinds.get(type(value), lambda x: x)(value) for name, value in case.settings.items()}

    loss = keras_loss(case, settings)

    config = loss.get_config()
    for name, value in case.settings.items():
        if type(value) in kinds and name in config:
            assert type(config[name]) in (int, float), name
            assert config[name] == pytest.approx(value), name
