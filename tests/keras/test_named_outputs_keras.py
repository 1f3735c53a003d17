"""Labels and sample weights belong to a student's outputs by their names, as Keras pairs them for the compiled loss."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from keras_distill import (
    DecoupledKDLoss,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    SequenceDistillation,
    SoftTargetLoss,
)
from keras_distill.terms.outputs import by_output

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 5)).astype("float32")
LABELS = {"z": RNG.integers(0, 3, 8), "a": RNG.integers(0, 3, 8)}
WEIGHTS = {name: RNG.uniform(0.2, 2.0, 8).astype("float32") for name in "za"}
HEADS = ("z", "a")  # not in the order of the alphabet


def network(width: int, name: str, as_dict: bool = False) -> keras.Model:
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(width, "tanh")(inputs)
    heads = {head: keras.layers.Dense(3, name=head)(hidden) for head in HEADS}
    return keras.Model(inputs, heads if as_dict else list(heads.values()), name=name)


def logits(model: keras.Model) -> dict[str, Any]:
    outputs = model.predict(X, verbose=0)
    return outputs if isinstance(outputs, dict) else dict(zip(HEADS, outputs, strict=True))


def decoupled(student: Any, teacher: Any, labels: Any) -> Any:
    """The loss of each row in float64, with the weights 1 and 8, at temperature 4."""
    values = []
    for own, other, label in zip(student.astype("float64") / 4, teacher.astype("float64") / 4, labels, strict=True):
        q, p = np.exp(own) / np.exp(own).sum(), np.exp(other) / np.exp(other).sum()
        target = p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        q, p = np.delete(q, label), np.delete(p, label)
        q, p = q / q.sum(), p / p.sum()
        values.append(16 * (target + 8 * (p * np.log(p / q)).sum()))
    return np.array(values)


def divergence(student: Any, teacher: Any) -> Any:
    """The divergence of each row in float64, at temperature 4."""
    log_q, log_p = (z.astype("float64") / 4 for z in (student, teacher))
    log_q, log_p = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_q, log_p))
    return 16 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def term_loss(term: Any, as_dict: bool, labels: Any, weights: Any = None, compiled: Any = None) -> tuple[float, Any]:
    """The logged loss of the term, and for each head both models' logits."""
    keras.utils.set_random_seed(0)
    student, teacher = network(4, "student", as_dict), network(6, "teacher", as_dict)
    model = DistillModel(student, teacher, term)
    model.compile("sgd", compiled, run_eagerly=True)
    pairs = {head: (own, logits(teacher)[head]) for head, own in logits(student).items()}
    results = model.evaluate(X, labels, sample_weight=weights, batch_size=8, verbose=0, return_dict=True)
    return results["logits_loss"], pairs


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("order", [HEADS, HEADS[::-1]])
def test_named_labels_reach_the_term_by_name(as_dict: bool, order: tuple[str, ...]) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    labels = {head: LABELS[head] for head in order}
    term = LogitsDistillation(DecoupledKDLoss(temperature=4.0))
    value, pairs = term_loss(term, as_dict, labels, compiled=dict.fromkeys(HEADS, loss))
    expected = sum(decoupled(*pairs[head], LABELS[head]).mean() for head in HEADS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_term_on_the_second_of_a_list_of_outputs_takes_its_named_labels() -> None:
    term = LogitsDistillation(DecoupledKDLoss(temperature=4.0), output=1)
    value, pairs = term_loss(term, False, LABELS)
    np.testing.assert_allclose(value, decoupled(*pairs["a"], LABELS["a"]).mean(), rtol=1e-5)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("output", [None, "a"])
def test_named_weights_reach_the_term_by_name(as_dict: bool, output: str | None) -> None:
    key: Any = output if as_dict or output is None else HEADS.index(output)
    term = LogitsDistillation(SoftTargetLoss(temperature=4.0), output=key)
    value, pairs = term_loss(term, as_dict, LABELS, WEIGHTS)
    heads = HEADS if output is None else (output,)
    expected = sum((WEIGHTS[head] * divergence(*pairs[head])).mean() for head in heads)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_head_without_labels_and_weights_counts_each_example_alike() -> None:
    loss = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    term = LogitsDistillation(SoftTargetLoss(temperature=4.0))
    value, pairs = term_loss(term, True, {"a": LABELS["a"]}, {"a": WEIGHTS["a"]}, compiled=loss)
    expected = (WEIGHTS["a"] * divergence(*pairs["a"])).mean() + divergence(*pairs["z"]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_tokens_take_the_named_labels_of_their_output() -> None:
    tokens = RNG.integers(1, 9, (4, 6)).astype("int32")
    answers = np.where(np.arange(6) < 3, -100, tokens)

    def tagger(width: int) -> keras.Model:
        inputs = keras.Input((6,), dtype="int32")
        hidden = keras.layers.Embedding(9, width, keras.initializers.RandomNormal(stddev=2.0, seed=width))(inputs)
        pooled = keras.layers.GlobalAveragePooling1D()(hidden)
        heads = [keras.layers.Dense(9, name="words")(hidden), keras.layers.Dense(2, name="class")(pooled)]
        return keras.Model(inputs, heads)

    student, teacher = tagger(4), tagger(8)
    model = DistillModel(student, teacher, SequenceDistillation(SoftTargetLoss(temperature=4.0), output=0))
    model.compile("sgd", run_eagerly=True)
    own, other = (each.predict(tokens, verbose=0)[0] for each in (student, teacher))
    results = model.evaluate(tokens, {"class": np.zeros(4), "words": answers}, verbose=0, return_dict=True)
    expected = divergence(own[:, 2:5], other[:, 2:5]).mean()  # position t predicts token t + 1
    np.testing.assert_allclose(results["tokens_loss"], expected, rtol=1e-5)


def test_a_loss_on_a_layer_that_needs_labels_refuses_those_of_several_outputs() -> None:
    student, teacher = network(4, "student"), network(6, "teacher")
    model = DistillModel(student, teacher, FeatureDistillation("z", "z", DecoupledKDLoss(temperature=4.0), name="head"))
    model.compile("sgd", run_eagerly=True)
    results = model.evaluate(X, {"z": LABELS["z"]}, verbose=0, return_dict=True)
    expected = decoupled(logits(student)["z"], logits(teacher)["z"], LABELS["z"]).mean()
    np.testing.assert_allclose(results["head_loss"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"labels for DecoupledKDLoss in term 'head'.*Received: 2 tensors"):
        model.evaluate(X, LABELS, verbose=0)


def test_a_list_of_labels_belongs_to_the_sorted_keys_as_in_keras() -> None:
    assert by_output([1, 2], {"z": 0.0, "a": 0.0}, ()) == {"a": 1, "z": 2}
    assert by_output({"z": 1, "boxes": 2}, 0.0, ("z",)) == 1
    assert by_output({"z": 1}, [0.0, 0.0], ("z", "a")) == [1, None]
