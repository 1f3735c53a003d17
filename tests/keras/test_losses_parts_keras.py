"""Keras losses with parts of their own beyond one map: published values, what trains which part, words of errors."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras_loss_cases import differentiated
from loss_case import golden_arrays, golden_index

from keras_distill import FactorTransferLoss, functional

HAS_FLOAT64 = keras.backend.result_type("float64", "float64") == "float64"
DTYPE = "float64" if HAS_FLOAT64 else "float32"


def last(array: Any) -> np.ndarray[Any, Any]:
    """A map in Keras' layout."""
    return np.moveaxis(np.asarray(array), 1, -1)


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
