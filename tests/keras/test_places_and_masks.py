"""Masked tokens, layers that run twice, the names of layers, and the metrics (K12, K15, K29, K31)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import keras_distill
import lightning_distill.metrics
from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, SoftTargetLoss, Tap
from keras_distill.metrics import TeacherAgreement, TeacherDivergence

TOKENS = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])


def tagger(width: int) -> keras.Model:
    tokens = keras.Input((4,), dtype="int32")
    embedded = layers.Embedding(6, width, mask_zero=True, name="embedding")(tokens)
    return keras.Model(tokens, layers.Dense(3, name="head")(embedded))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_k12_masked_tokens_are_ignored_in_logits_and_in_features() -> None:
    """K12: both losses are means over the four tokens that are there."""
    student, teacher = tagger(5), tagger(5)
    terms = [LogitsDistillation(SoftTargetLoss(2.0)), FeatureDistillation("embedding", "embedding")]
    model = DistillModel(student, teacher, terms)
    model.compile("sgd")
    logs = model.evaluate(TOKENS, verbose=0, return_dict=True)
    kept = TOKENS > 0
    student_value, teacher_value = (
        log_softmax(np.float64(network.predict(TOKENS, verbose=0)) / 2.0) for network in (student, teacher)
    )
    divergence = 4.0 * (np.exp(teacher_value) * (teacher_value - student_value)).sum(-1)
    assert logs["logits_loss"] == pytest.approx(divergence[kept].mean(), rel=1e-3)
    student_value, teacher_value = (
        np.float64(ops.convert_to_numpy(m.get_layer("embedding")(TOKENS))) for m in (student, teacher)
    )
    assert logs["embedding_loss"] == pytest.approx(np.square(student_value - teacher_value)[kept].mean(), rel=1e-5)


def test_k15_a_layer_that_ran_twice_raises_unless_a_call_is_named() -> None:
    """K15: the remedy of the error works: the tap reads the tensor of the chosen call."""
    inputs = keras.Input((4,))
    shared = layers.Dense(4, activation="relu", name="shared")
    student = keras.Model(inputs, layers.Dense(3)(shared(shared(inputs))))
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="hidden"), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"layer 'shared' to run once in a forward pass\. Pass Tap\('shared', call="):
        DistillModel(student, teacher, FeatureDistillation("shared", "hidden"))
    model = DistillModel(student, teacher, FeatureDistillation(Tap("shared", call=1), "hidden"))
    model.compile("sgd")
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    student_value = ops.convert_to_numpy(shared(shared(x)))
    teacher_value = ops.convert_to_numpy(teacher.get_layer("hidden")(x))
    logs = model.evaluate(x, verbose=0, return_dict=True)
    assert logs["shared_loss"] == pytest.approx(np.square(student_value - teacher_value).mean(), rel=1e-5)


def test_k15_a_call_that_the_layer_does_not_make_raises() -> None:
    """K15: calls are counted from 0, and the message holds their number."""
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    student = keras.Model(inputs, layers.Dense(3)(shared(shared(inputs))))
    words = r"^Expected student layer 'shared' to run more than 2 times\. Received: 2 calls$"
    with pytest.raises(ValueError, match=words):
        DistillModel(student, keras.models.clone_model(student), FeatureDistillation(Tap("shared", call=2), "shared"))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [layers.Dense(4), layers.Dense(5)]

    def call(self, x: object) -> object:
        for block in self.blocks:
            x = block(x)
        return x


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="block"), layers.Dense(4)], name="backbone")
    other = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="block")], name="neck")
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="head")(other(inner(inputs))))


def test_k29_layers_are_named_by_name_path_attribute_or_themselves() -> None:
    """K29: each way finds the layer; unknown and ambiguous names list the candidates."""
    model = nested()
    for layer in ("head", "backbone/block", model.get_layer("head"), model.get_layer("backbone").get_layer("block")):
        DistillModel(nested(), model, FeatureDistillation("backbone/block", layer, name="feature"))
    student = Subclassed()
    student(np.zeros((1, 4), "float32"))
    DistillModel(student, Subclassed(), FeatureDistillation("blocks.0", "blocks.1"))
    with pytest.raises(
        ValueError, match=r"Pass one of 'backbone/block', 'neck/block'\. Received: 'block', the name of several layers"
    ):
        DistillModel(nested(), model, FeatureDistillation("head", "block"))
    with pytest.raises(ValueError, match=r"Closest: 'head'\. Received: 'heat'$"):
        DistillModel(nested(), model, FeatureDistillation("heat", "head"))
    with pytest.raises(ValueError, match=r"Received: the layer 'alien', which is not in it"):
        DistillModel(nested(), model, FeatureDistillation("head", layers.Dense(3, name="alien")))


class Block(layers.Layer):
    """A layer that is made of layers, as custom blocks are."""

    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.steps = [layers.Dense(width, name="inner"), layers.Dense(4, name="outer")]

    def call(self, x: Any) -> Any:
        for step in self.steps:
            x = step(x)
        return x


def test_k29_layers_within_a_layer_are_named_too() -> None:
    """K29: of a custom layer, by the path of names and by the end of it."""

    def network(width: int) -> keras.Model:
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(3)(Block(width, name="block")(inputs)))

    student, teacher = network(5), network(5)
    model = DistillModel(student, teacher, FeatureDistillation("block/inner", "inner", adapter=None, name="feature"))
    model.compile("sgd")
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    student_value, teacher_value = (
        ops.convert_to_numpy(network.get_layer("block").steps[0](x)) for network in (student, teacher)
    )
    logs = model.evaluate(x, verbose=0, return_dict=True)
    assert logs["feature_loss"] == pytest.approx(np.square(student_value - teacher_value).mean(), rel=1e-5)


class Twins(keras.Model):
    """Two layers that are called the same, next to each other and within others that are too."""

    def __init__(self, depth: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.first, self.second = (Twins(0, name="twin") if depth else layers.Dense(4, name="twin") for _ in range(2))

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_k29_siblings_with_the_same_name_are_distinguished() -> None:
    """K29: subclassed models may have them; the candidates are names that choose, as do attributes and the layers."""
    student, teacher = Twins(0), Twins(1)
    words = r"Pass one of 'layers\.0', 'layers\.1'\. Received: 'twin', the name of several layers$"
    with pytest.raises(ValueError, match=words):
        DistillModel(student, teacher, FeatureDistillation("twin", "layers.0"))
    words = r"Pass one of 'layers\.0/layers\.0', 'layers\.0/layers\.1', 'layers\.1/layers\.0', 'layers\.1/layers\.1'\."
    with pytest.raises(ValueError, match=words):
        DistillModel(student, teacher, FeatureDistillation("layers.0", "twin/twin"))
    ways = [student.first, "first", "layers.0"]
    teacher_layers = [teacher.second.first, "second.first", "layers.1/layers.0"]
    terms = [
        FeatureDistillation(*pair, name=f"way{number}")
        for number, pair in enumerate(zip(ways, teacher_layers, strict=True))
    ]
    model = DistillModel(student, teacher, terms)
    assert [model.terms[0].get_config()[side][0]["layer"] for side in ("student_layer", "teacher_layer")] == [
        "layers.0",
        "layers.1/layers.0",
    ]
    model.compile("sgd")
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    logs = model.evaluate(x, verbose=0, return_dict=True)
    student_value = ops.convert_to_numpy(student.first(x))
    teacher_value = ops.convert_to_numpy(teacher.second.first(teacher.first(x)))
    for number in range(3):
        assert logs[f"way{number}_loss"] == pytest.approx(np.square(student_value - teacher_value).mean(), rel=1e-5)


def test_k31_metrics_count_rows_over_batches_of_any_size() -> None:
    """K31: agreement and divergence are means over rows, as in the PyTorch half."""
    generator = np.random.default_rng(1)
    student, teacher = generator.standard_normal((2, 7, 3)).astype("float32")
    agreement, divergence = TeacherAgreement(), TeacherDivergence(temperature=2.0)
    for rows in (slice(0, 5), slice(5, 7)):
        agreement.update_state(teacher[rows], student[rows])
        divergence.update_state(teacher[rows], student[rows])
    assert float(agreement.result()) == pytest.approx((student.argmax(1) == teacher.argmax(1)).mean())
    log_student, log_teacher = log_softmax(np.float64(student) / 2), log_softmax(np.float64(teacher) / 2)
    assert float(divergence.result()) == pytest.approx(
        (np.exp(log_teacher) * (log_teacher - log_student)).sum(-1).mean(), rel=1e-5
    )
    single = TeacherAgreement()
    single.update_state(np.float32([[1.0], [-1.0]]), np.float32([[2.0], [0.5]]))
    assert float(single.result()) == 0.5


def test_k31_rows_have_weights() -> None:
    """K31: as every metric of Keras takes them; the mean is divided by their sum."""
    student, teacher = np.random.default_rng(1).standard_normal((2, 7, 3)).astype("float32")
    weights = np.float32([0, 1, 2, 3, 0, 5, 1])
    agreement, divergence = TeacherAgreement(), TeacherDivergence()
    for metric in (agreement, divergence):
        metric.update_state(teacher, student, sample_weight=weights)
    agrees = student.argmax(1) == teacher.argmax(1)
    assert np.average(agrees, weights=weights) != pytest.approx(agrees.mean())
    assert float(agreement.result()) == pytest.approx(np.average(agrees, weights=weights))
    log_student, log_teacher = log_softmax(np.float64(student)), log_softmax(np.float64(teacher))
    expected = np.average((np.exp(log_teacher) * (log_teacher - log_student)).sum(-1), weights=weights)
    assert float(divergence.result()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 4), (6, 1), (6,)])
def test_k31_both_halves_compute_the_same_numbers(shape: tuple[int, ...]) -> None:
    """K31: rows of several classes, rows of rows, and single scores, which are logits of one of two classes."""
    student, teacher = np.random.default_rng(2).standard_normal((2, *shape)).astype("float32")
    for name, settings in (("TeacherAgreement", {}), ("TeacherDivergence", {"temperature": 2.5})):
        metric, expected = (getattr(half.metrics, name)(**settings) for half in (keras_distill, lightning_distill))
        metric.update_state(teacher, student)
        expected.update(torch.as_tensor(student), torch.as_tensor(teacher))
        assert float(metric.result()) == pytest.approx(float(expected.compute()), rel=1e-6, abs=1e-7), name
