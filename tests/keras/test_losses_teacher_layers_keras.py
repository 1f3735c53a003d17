"""Keras losses that take numbers from layers of the teacher: published values, what they read, words of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_loss_cases import as_array, differentiated
from keras_parts_nets import DTYPE, assert_resumes, distilled, fitted, last, network
from loss_case import golden_arrays, golden_index

from distill_core.margins import margins_of
from keras_distill import (
    DistillModel,
    FeatureDistillation,
    MarginReLULoss,
    SelfDistillation,
    SoftmaxRegressionLoss,
    functional,
)

# Margin ReLU ------------------------------------------------------------------------------------------------------


def test_margin_relu_is_the_published_distance_over_its_sum() -> None:
    """The reference adds over all numbers and divides by 1000 and by the examples."""
    entry = golden_index("ofd")[0]
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"][DTYPE]
    loss = MarginReLULoss(margins=arrays["margin"].ravel().tolist(), dtype=DTYPE)
    factor = arrays["student_feat"][0].size / 1000

    result = differentiated(loss, last(arrays["student_feat"]), last(arrays["teacher_feat"]), DTYPE)

    np.testing.assert_allclose(factor * result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(factor * result.student, last(arrays["grad_student_feat"]), **tolerance)


def margins_read(model: DistillModel) -> Any:
    return as_array(model.terms[0].learned[0].layer.margins)


def margins_in(teacher: keras.Model) -> Any:
    norm = teacher.get_layer("norm")
    return np.array(margins_of(as_array(norm.gamma), as_array(norm.beta)))


def test_the_term_takes_the_margins_from_the_teachers_batch_normalisation() -> None:
    model = distilled(FeatureDistillation("norm", "norm", MarginReLULoss()))

    np.testing.assert_allclose(margins_read(model), margins_in(model.teacher), rtol=1e-5)
    assert not model.terms[0].trainable_variables


def test_a_new_teacher_brings_its_own_margins() -> None:
    model = distilled(FeatureDistillation("norm", "norm", MarginReLULoss()))
    fitted(model, 1)

    model.teacher = network(4, 7, "other")
    fitted(model, 1)

    np.testing.assert_allclose(margins_read(model), margins_in(model.teacher), rtol=1e-5)


def test_a_model_with_margins_goes_on_from_its_file(tmp_path: Path) -> None:
    assert_resumes(lambda: distilled(FeatureDistillation("norm", "norm", MarginReLULoss())), tmp_path)


def test_a_file_keeps_the_margins(tmp_path: Path) -> None:
    model = distilled(FeatureDistillation("norm", "norm", MarginReLULoss()))
    fitted(model, 1)  # Keras loads the optimizer of a trained model only
    model.save(tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")

    np.testing.assert_array_equal(margins_read(loaded), margins_read(model))


def test_layers_without_scale_and_shift_have_the_margins_of_a_standard_normal() -> None:
    norm = keras.layers.BatchNormalization(scale=False, center=False)
    norm.build((None, 3))
    loss = MarginReLULoss()
    loss.build((None, 3), (None, 3))
    loss.read_teacher(lambda name: norm)

    np.testing.assert_allclose(as_array(loss.layer.margins), np.full(3, -0.79788456), rtol=1e-6)


def test_margins_that_cannot_be_read_raise() -> None:
    teachers = [network(4, seed, f"teacher{seed}") for seed in (3, 4)]
    with pytest.raises(ValueError, match=r"teacher's layer to be a batch normalisation\. Name the batch .* a Conv2D"):
        distilled(FeatureDistillation("conv", "conv", MarginReLULoss()))
    with pytest.raises(
        ValueError, match=r"`margins` to be given where no term reads them from the teacher\. Pass them"
    ):
        MarginReLULoss()(ops.ones((2, 3)), ops.ones((2, 3)))
    with pytest.raises(ValueError, match=r"one teacher for term 'norm', which takes numbers .*\. Received: 2"):
        distilled(FeatureDistillation("norm", "norm", MarginReLULoss()), teacher=teachers)
    with pytest.raises(ValueError, match=r"`teacher` to be a model for term 'norm', whose loss takes numbers from its"):
        DistillModel(network(4, 1, "student"), None, SelfDistillation("norm", "conv", MarginReLULoss()))


def test_targets_without_a_teacher_serve_margins_that_are_given_or_known() -> None:
    x, y = np.random.default_rng(0).standard_normal((8, 3, 3, 2)).astype("float32"), np.zeros((8, 3), "float32")
    known = distilled(FeatureDistillation("norm", "norm", MarginReLULoss()))
    targets = known.teacher_targets(x, y)
    known.teacher = None
    known.fit(x, targets, 4, 1, verbose=0)

    unknown = DistillModel(network(4, 1, "student"), None, FeatureDistillation("norm", "norm", MarginReLULoss()))
    unknown.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match=r"`teacher` to be a model for term 'norm', whose loss takes numbers from its"):
        unknown.fit(x, targets, 4, 1, verbose=0)


def test_given_margins_need_no_teacher() -> None:
    loss = MarginReLULoss(margins=(-1.0,) * 4)
    model = DistillModel(network(4, 1, "student"), None, SelfDistillation("norm", "conv", loss))
    model.compile("sgd", "mse", jit_compile=False)

    assert fitted(model, 1)["norm_loss"][0] > 0


@pytest.mark.parametrize("margins", [[0.5, -1.0], []])
def test_margins_above_zero_raise(margins: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Expected `margins` to be numbers that are at most 0\. Received: margins="):
        MarginReLULoss(margins=margins)


def test_margins_that_do_not_fit_the_channels_raise() -> None:
    with pytest.raises(ValueError, match=r"`margins` to have one number for each of the 3 channels\. Received: shape"):
        MarginReLULoss(margins=(-1.0, -1.0))(ops.ones((2, 3)), ops.ones((2, 3)))
    with pytest.raises(ValueError, match=r"Expected features to have channels\. Received: shape \(3,\)"):
        functional.margin_relu_distance(ops.ones(3), ops.ones(3), margins=ops.zeros(3))


# Softmax regression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("srrl"), ids=lambda entry: entry["case"])
def test_softmax_regression_is_the_published_loss(entry: dict[str, Any]) -> None:
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"][DTYPE]
    student, teacher = last(arrays["student_feat"]), last(arrays["teacher_feat"])
    head = keras.layers.Dense(len(arrays["teacher_fc_bias"]), dtype=DTYPE)
    head.build((None, teacher.shape[-1]))
    head.set_weights([arrays["teacher_fc_weight"].T, arrays["teacher_fc_bias"]])
    loss = SoftmaxRegressionLoss(regression_weight=entry["hyperparameters"]["weight"], dtype=DTYPE)
    loss.build(student.shape, teacher.shape)
    loss.read_teacher(lambda name: head)
    loss.layer.parts[0].kernel.assign(arrays["param_connector_conv.weight"][:, :, 0, 0].T)
    loss.layer.scale.assign(arrays["param_connector_bn.weight"])
    loss.layer.shift.assign(arrays["param_connector_bn.bias"])

    result = differentiated(loss, student, teacher, DTYPE)

    np.testing.assert_allclose(result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(result.student, last(arrays["grad_student_feat"]), **tolerance)


def regression(**settings: Any) -> FeatureDistillation:
    return FeatureDistillation("body", "body", SoftmaxRegressionLoss(**settings))


def test_the_term_finds_the_teachers_classifier_and_keeps_it_out_of_files(tmp_path: Path) -> None:
    model = distilled(regression(), teacher=network(5, 2, "teacher"))
    fitted(model, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    kernel = as_array(model.teacher.get_layer("head").kernel)
    np.testing.assert_array_equal(as_array(model.terms[0].learned[0]._kernel), kernel)
    assert loaded.terms[0].learned[0]._kernel is None
    assert len(loaded.terms[0].trainable_variables) == 3
    loaded.teacher = model.teacher
    np.testing.assert_array_equal(as_array(loaded.terms[0].learned[0]._kernel), kernel)


def test_softmax_regression_goes_on_from_its_file(tmp_path: Path) -> None:
    assert_resumes(lambda: distilled(regression(classifier="head")), tmp_path)


def two_heads() -> keras.Model:
    inputs = keras.Input((3, 3, 2))
    maps = keras.layers.Conv2D(8, 2, 2, "same", name="body")(inputs)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(maps)
    return keras.Model(inputs, keras.layers.Dense(3, name="a")(pooled) + keras.layers.Dense(3, name="b")(pooled))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: distilled(regression(), teacher=two_heads()),
            r"the teacher to have one Dense layer of 8 inputs, .*classifier=<.* Received: 2: a, b",
        ),
        (
            lambda: distilled(FeatureDistillation("norm", "norm", SoftmaxRegressionLoss())),
            r"the teacher to have one Dense layer of 4 inputs, .* Received: 0: none",
        ),
        (
            lambda: distilled(FeatureDistillation("norm", "norm", SoftmaxRegressionLoss(classifier="head"))),
            r"to be a Dense layer of 4 inputs, the channels .* Received: a Dense, classifier='head'",
        ),
        (lambda: distilled(regression(classifier="haed")), r"to name one layer of the teacher .*head"),
        (
            lambda: functional.softmax_regression(ops.ones((2, 3)), ops.ones((2, 3)), classifier=ops.ones((5, 3))),
            r"`classifier` to have the shape \(3, classes\)\. Received: shape \(5, 3\)",
        ),
        (
            lambda: functional.softmax_regression(ops.ones((2, 3)), ops.ones((2, 4)), classifier=ops.ones((4, 5))),
            r"`averaged student` and `averaged teacher` to have equal shapes\. Map the student",
        ),
        (lambda: SoftmaxRegressionLoss(feature_weight=-1.0), r"`feature_weight` to be at least 0\. Received"),
    ],
)
def test_a_classifier_that_does_not_fit_raises(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_classifier_that_is_unknown_or_not_named_raises() -> None:
    loss = SoftmaxRegressionLoss()
    loss.build((None, 3), (None, 4))
    with pytest.raises(ValueError, match=r"the teacher's classifier to be known\. Set the model's teacher"):
        loss(ops.ones((2, 4)), ops.ones((2, 3)))
    with pytest.raises(TypeError, match=r"Expected `classifier` to be the name of a layer\. Received: classifier="):
        SoftmaxRegressionLoss(classifier=3)
