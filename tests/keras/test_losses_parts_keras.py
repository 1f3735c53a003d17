"""Keras losses with parts of their own beyond one map: published values, what trains which part, words of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras_loss_cases import as_array, differentiated, keras_kernel
from keras_nets import assert_same_logs, assert_same_weights
from loss_case import golden_arrays, golden_index

from distill_core.margins import margins_of
from keras_distill import (
    DistillModel,
    FactorTransferLoss,
    FeatureDistillation,
    HierarchicalContextLoss,
    MarginReLULoss,
    ReviewDistillation,
    SelfDistillation,
    functional,
)
from keras_distill.terms import review as keras_review
from lightning_distill.terms import review as lightning_review

HAS_FLOAT64 = keras.backend.result_type("float64", "float64") == "float64"
DTYPE = "float64" if HAS_FLOAT64 else "float32"


def last(array: Any) -> np.ndarray[Any, Any]:
    """A map in Keras' layout."""
    return np.moveaxis(np.asarray(array), 1, -1)


def network(channels: int, seed: int, name: str) -> keras.Model:
    """Inputs (N, 3, 3, 2); layers "conv", "norm" before a ReLU, "body" with smaller maps, and "head"."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3, 3, 2))
    maps = keras.layers.Conv2D(channels, 1, name="conv")(inputs)
    random = {name: keras.initializers.RandomNormal(seed=seed) for name in ("gamma", "beta")}
    settings = {f"{name}_initializer": initializer for name, initializer in random.items()}
    maps = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="norm", **settings)(maps))
    maps = keras.layers.Conv2D(2 * channels, 2, 2, "same", activation="relu", name="body")(maps)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(maps)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(pooled), name=name)


def distilled(*terms: Any, teacher: Any = None) -> DistillModel:
    model = DistillModel(network(4, 1, "student"), teacher or network(4, 2, "teacher"), list(terms))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    return model


def fitted(model: DistillModel, epochs: int, start: int = 0) -> dict[str, list[float]]:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((8, 3, 3, 2)).astype("float32"), random.standard_normal((8, 3)).astype("float32")
    return model.fit(x, y, 4, epochs, initial_epoch=start, shuffle=False, verbose=0).history


def assert_resumes(make: Any, path: Path) -> None:
    """Two epochs equal one epoch, a file, and another epoch."""
    straight, first = make(), make()
    logs = fitted(straight, 2)
    fitted(first, 1)
    first.save(path / "model.keras")
    second = keras.models.load_model(path / "model.keras")
    second.teacher = first.teacher
    assert_same_logs(fitted(second, 2, 1), {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)


class Called:
    """A function of the student's and the teacher's tensor, called as a loss is."""

    needs_labels = False

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, teacher: Any, student: Any) -> Any:
        return self.function(student, teacher)


# Factor transfer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("factor_transfer"), ids=lambda entry: entry["case"])
def test_factor_transfer_is_the_published_one_of_maps_with_one_channel(entry: dict[str, Any]) -> None:
    """The reference first takes the mean power over the channels; the paper compares whole factors, and so do we."""
    arrays, powers = golden_arrays(entry), entry["hyperparameters"]
    teacher = last(arrays["teacher_feat"])
    student = torch.as_tensor(arrays["student_feat"]).requires_grad_()
    smaller = torch.nn.functional.adaptive_avg_pool2d(student, teacher.shape[1:3])

    def value(student: Any, teacher: Any) -> Any:
        maps = [ops.mean(ops.power(feature, powers["p1"]), axis=-1, keepdims=True) for feature in (student, teacher)]
        return ops.mean(functional.factor_transfer(*maps, power=powers["p2"]))

    result = differentiated(Called(value), last(smaller.detach()), teacher, DTYPE)
    smaller.backward(torch.as_tensor(np.ascontiguousarray(np.moveaxis(result.student, -1, 1))))

    tolerance = entry["tolerance_suggested"][DTYPE]
    np.testing.assert_allclose(result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(student.grad.numpy(), arrays["grad_student_feat"], **tolerance)


@pytest.mark.tensorflow
def test_the_paraphraser_learns_from_the_restored_feature_and_the_translator_from_the_factor() -> None:
    import tensorflow as tf

    random = np.random.default_rng(0)
    student, teacher = (ops.convert_to_tensor(random.standard_normal((2, 4, 4, size)), "float32") for size in (3, 6))
    learning = {}
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        loss = FactorTransferLoss(factor_weight=weights[0], reconstruction_weight=weights[1])
        loss.build((None, 4, 4, 3), (None, 4, 4, 6))
        with tf.GradientTape() as tape:
            value = loss(teacher, student)
        names = ("translator", "paraphraser", "restorer")
        networks = [getattr(loss.layer, name).trainable_variables for name in names]
        gradients = tape.gradient(value, networks, unconnected_gradients="zero")
        learning[weights] = [any(bool(ops.any(gradient != 0)) for gradient in each) for each in gradients]

    assert learning == {(0.0, 1.0): [False, True, True], (1.0, 0.0): [True, False, False]}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rate": 0.0}, ValueError, r"Expected `rate` to be greater than 0\. Received: rate=0\.0"),
        ({"power": 0.5}, ValueError, r"Expected `power` to be at least 1\. Received: power=0\.5"),
        ({"factor_weight": -1.0}, ValueError, r"Expected `factor_weight` to be at least 0\. Received: factor_we"),
        ({"reconstruction_weight": "1"}, TypeError, r"Expected `reconstruction_weight` to be an int or a float"),
    ],
)
def test_bad_settings_of_factor_transfer_raise(settings: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FactorTransferLoss(**settings)


def test_factors_without_an_inner_dimension_raise() -> None:
    with pytest.raises(ValueError, match=r"Expected factors to have an inner dimension\. Received: shape \(3,\)"):
        functional.factor_transfer(ops.ones(3), ops.ones(3))


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
    with pytest.raises(ValueError, match=r"one teacher for term 'norm', whose loss takes numbers .*\. Received: 2"):
        distilled(FeatureDistillation("norm", "norm", MarginReLULoss()), teacher=teachers)
    with pytest.raises(ValueError, match=r"`teacher` to be a model for term 'norm', whose loss takes numbers from its"):
        DistillModel(network(4, 1, "student"), None, SelfDistillation("norm", "conv", MarginReLULoss()))


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


# Review -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", golden_index("reviewkd_hcl"), ids=lambda entry: entry["case"])
def test_hierarchical_context_added_over_layers_is_the_published_loss(entry: dict[str, Any]) -> None:
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"][DTYPE]
    values = []
    for name in entry["student_inputs"]:
        pair = last(arrays[name]), last(arrays[name.replace("student", "teacher")])
        result = differentiated(HierarchicalContextLoss(dtype=DTYPE), *pair, DTYPE)
        np.testing.assert_allclose(result.student, last(arrays[f"grad_{name}"]), **tolerance)
        values.append(float(result.value))

    np.testing.assert_allclose(sum(values), arrays["loss"], **tolerance)


def test_the_parts_of_a_review_give_the_numbers_of_pytorch() -> None:
    random = np.random.default_rng(0)
    sizes, channels, wide = [(5, 6), (3, 3), (2, 1)], (2, 3, 4), (3, 5, 2)
    features = [random.standard_normal((4, *size, width)) for size, width in zip(sizes, channels, strict=True)]
    ours = lightning_review._Review(channels, wide, 3)
    theirs = keras_review._Review(wide, 3, dtype="float32")
    theirs.build([feature.shape for feature in features])
    for kind in ("squeeze", "spread"):
        for (convolution, norm), part in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
            part.convolution.kernel.assign(keras_kernel(convolution.weight.detach().numpy(), 4))
            part.scale.assign(norm.weight.detach().numpy())
            part.shift.assign(norm.bias.detach().numpy())
    for attention, part in zip(ours.attention, theirs.attention, strict=True):
        part.kernel.assign(keras_kernel(attention.weight.detach().numpy(), 4))
        part.bias.assign(attention.bias.detach().numpy())

    expected = ours.double()([torch.as_tensor(np.moveaxis(feature, -1, 1)) for feature in features])
    results = theirs([ops.convert_to_tensor(feature, "float32") for feature in features])

    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(as_array(result), last(reference.detach()), rtol=0, atol=5e-6)


def test_a_review_trains_its_parts_and_goes_on_from_its_file(tmp_path: Path) -> None:
    def make() -> DistillModel:
        return distilled(ReviewDistillation(["norm", "body"], ["norm", "body"]), teacher=network(5, 2, "teacher"))

    model = make()
    before = [as_array(variable) for variable in model.terms[0].trainable_variables]
    fitted(model, 1)
    after = [as_array(variable) for variable in model.terms[0].trainable_variables]

    assert len(before) == 2 * 3 + 2 + 2 * 3
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    assert len(model.student.weights) == len(network(4, 1, "plain").weights)
    assert_resumes(make, tmp_path)


def test_a_review_is_the_sum_over_its_layers_of_resized_maps() -> None:
    inputs = keras.Input((4, 4, 2))
    maps = keras.layers.Conv2D(3, 1, 2, name="norm")(inputs)
    small = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(maps))
    inputs = keras.Input((4, 4, 2))
    maps = keras.layers.Conv2D(3, 1, name="norm")(inputs)
    large = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(maps))

    model = DistillModel(small, large, ReviewDistillation(["norm"], ["norm"]))
    model.compile("sgd", "mse", jit_compile=False)
    x = np.random.default_rng(0).standard_normal((4, 4, 4, 2)).astype("float32")
    value = model.evaluate(x, np.zeros((4, 3)), verbose=0, return_dict=True)["review_loss"]

    (fused,) = model.terms[0].adapters[0]([model.student.get_layer("norm")(x)])
    target = ops.average_pool(model.teacher.get_layer("norm")(x), 2)
    expected = HierarchicalContextLoss()(target, fused)
    assert value == pytest.approx(float(as_array(expected)), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReviewDistillation(["a", "b"], ["a"]), ValueError, r"name the same number of layers, at least one"),
        (lambda: ReviewDistillation(["a"], ["a"], channels=0), ValueError, r"`channels` to be at least 1\. Received"),
        (
            lambda: ReviewDistillation(["a"], ["a"], FactorTransferLoss()),
            TypeError,
            r"`loss` to be a loss on two maps without parameters of its own\. Use it in a FeatureDistillation\. Receiv",
        ),
        (
            lambda: distilled(ReviewDistillation(["norm", "head"], ["norm", "head"])),
            ValueError,
            r"layers 'head' and 'head' to return maps \(N, H, W, C\)\. Received: \(None, 3\) and \(None, 3\)",
        ),
        (lambda: HierarchicalContextLoss(levels=(4, 0)), ValueError, r"Expected `levels` to be at least 1\. Received"),
        (
            lambda: functional.hierarchical_context(ops.ones((2, 3)), ops.ones((2, 3))),
            ValueError,
            r"`student` to have positions of known sizes, and 3 to 5 dimensions\. Received: shape \(2, 3\)",
        ),
    ],
)
def test_bad_settings_of_a_review_raise(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
