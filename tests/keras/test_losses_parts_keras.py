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
from keras_parts_nets import DTYPE, Called, assert_resumes, distilled, last, network
from loss_case import golden_arrays, golden_index

from keras_distill import (
    DistillModel,
    FactorTransferLoss,
    HierarchicalContextLoss,
    ReviewDistillation,
    functional,
)
from keras_distill.terms import review as keras_review
from lightning_distill.terms import review as lightning_review

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
    reference = lightning_review._Review(channels, wide, 3)
    review = keras_review._Review(wide, 3, dtype="float32")
    review.build([feature.shape for feature in features])
    for kind in ("squeeze", "spread"):
        for (convolution, norm), part in zip(getattr(reference, kind), getattr(review, kind), strict=True):
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
            part.convolution.kernel.assign(keras_kernel(convolution.weight.detach().numpy(), 4))
            part.scale.assign(norm.weight.detach().numpy())
            part.shift.assign(norm.bias.detach().numpy())
    for attention, part in zip(reference.attention, review.attention, strict=True):
        part.kernel.assign(keras_kernel(attention.weight.detach().numpy(), 4))
        part.bias.assign(attention.bias.detach().numpy())

    expected = reference.double()([torch.as_tensor(np.moveaxis(feature, -1, 1)) for feature in features])
    results = review([ops.convert_to_tensor(feature, "float32") for feature in features])

    for result, expected_map in zip(results, expected, strict=True):
        np.testing.assert_allclose(as_array(result), last(expected_map.detach()), rtol=0, atol=5e-6)


def test_a_review_trains_its_parts_and_goes_on_from_its_file(tmp_path: Path) -> None:
    def make() -> DistillModel:
        return distilled(ReviewDistillation(["norm", "body"], ["norm", "body"]), teacher=network(5, 2, "teacher"))

    model = make()
    assert len(model.terms[0].trainable_variables) == 2 * 3 + 2 + 2 * 3
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
