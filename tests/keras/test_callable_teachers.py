"""Teachers that are functions of arrays: ONNX sessions, ``predict_proba``, torch modules."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, kl64, mlp, table

from keras_distill import (
    CacheError,
    CallableTeacher,
    DistillModel,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
)

X, Y = table(16)
KERNEL = np.random.default_rng(5).normal(size=(6, 3)).astype("float32")
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 2}


def scores(x: Any) -> Any:
    return x @ KERNEL


def probabilities(x: Any) -> Any:
    exponents = np.exp(scores(x).astype("float64"))
    return exponents / exponents.sum(-1, keepdims=True)


def dense() -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, use_bias=False)])
    model.set_weights([KERNEL])
    return model


def trained(teacher: Any, terms: Any = None, **compiled: Any) -> tuple[DistillModel, Any]:
    keras.utils.set_random_seed(3)
    model = DistillModel(mlp(), teacher, terms)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), **compiled)
    return model, model.fit(X, Y, validation_data=(X, Y), **FIT).history


EAGER = {"run_eagerly": True}


@functools.cache
def by_a_model(eager: bool) -> tuple[keras.Model, Any]:
    model, logs = trained(dense(), run_eagerly=eager, jit_compile=False)
    return model.student, logs


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_function_trains_as_the_keras_model_of_the_same_formula(batch_size: int | None, eager: bool) -> None:
    teacher = CallableTeacher(scores, (3,), batch_size=batch_size)
    model, logs = trained(teacher, run_eagerly=eager, jit_compile=False)
    student, expected = by_a_model(eager)
    assert_same_weights(model.student, student, 1e-6)
    assert_same_logs(logs, expected)


def test_probabilities_become_logits_whose_softmax_is_the_probabilities() -> None:
    teacher = CallableTeacher(probabilities, (3,), from_probabilities=True)
    model = DistillModel(mlp(), teacher, LogitsDistillation(SoftTargetLoss(temperature=1.0)), task_weight=0.0)
    model.compile("sgd", **EAGER)
    loss = model.evaluate(X, verbose=0, return_dict=True)["logits_loss"]
    student = np.asarray(model.student.predict(X, verbose=0), "float64")
    np.testing.assert_allclose(loss, kl64(student, scores(X), 1.0).mean(), rtol=1e-5)


def test_a_probability_of_exactly_0_stays_finite() -> None:
    forest = np.eye(3, dtype="float32")
    teacher = CallableTeacher(lambda x: forest[np.arange(len(x)) % 3], (3,), from_probabilities=True)
    _, logs = trained(teacher, **EAGER)
    assert np.isfinite(logs["loss"]).all()


def test_a_single_probability_becomes_its_log_odds() -> None:
    teacher = CallableTeacher(lambda x: np.full((len(x), 1), 0.8), (1,), from_probabilities=True)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(teacher(X[:2])), np.log(4.0), rtol=1e-6)


def test_the_function_gets_the_structure_of_the_inputs_in_calls_of_at_most_the_batch_size() -> None:
    sizes: list[int] = []

    def on_dict(inputs: dict[str, Any]) -> Any:
        sizes.append(len(inputs["table"]))
        return scores(inputs["table"]) + inputs["shift"]

    shift = np.ones((16, 1), "float32")
    teacher = CallableTeacher(on_dict, (3,), batch_size=3)
    result = teacher({"table": X[:8], "shift": shift[:8]})
    np.testing.assert_allclose(keras.ops.convert_to_numpy(result), scores(X[:8]) + 1.0, rtol=1e-6)
    assert sizes == [3, 3, 2]


def test_the_function_may_change_its_arrays_in_place() -> None:
    def careless(x: Any) -> Any:
        result = x @ KERNEL
        x[:] = 0.0
        return result

    inputs = X.copy()
    model, _ = trained(CallableTeacher(careless, (3,)), **EAGER)
    assert_same_weights(model.student, by_a_model(True)[0], 1e-6)
    np.testing.assert_array_equal(inputs, X)


@pytest.mark.tensorflow
def test_xla_is_switched_off_with_a_warning_only_if_it_was_asked_for() -> None:
    with pytest.warns(UserWarning, match="The teacher does not support `jit_compile=True`"):
        model, _ = trained(CallableTeacher(scores, (3,)), jit_compile=True)
    assert model.jit_compile is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(CallableTeacher(scores, (3,)), jit_compile="auto")


def test_the_stored_outputs_of_a_function_are_those_of_the_function() -> None:
    model = DistillModel(mlp(), CallableTeacher(scores, (3,)))
    targets = model.teacher_targets(X, Y)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(targets.teacher), scores(X), rtol=1e-6)


IN_A_STEP: dict[str, tuple[Callable[[], CallableTeacher], str]] = {
    "too few rows": (
        lambda: CallableTeacher(lambda x: scores(x)[:1], (3,)),
        "Expected the function of 'callable_teacher' to return an array of shape (8, 3)",
    ),
    "another number of classes": (
        lambda: CallableTeacher(lambda x: scores(x)[:, :2], (3,)),
        "Received: shape (8, 2)",
    ),
    "numbers that are not finite": (
        lambda: CallableTeacher(lambda x: scores(x) / 0.0, (3,)),
        "Expected the function of 'callable_teacher' to return finite numbers",
    ),
    "a list of outputs": (
        lambda: CallableTeacher(lambda x: [scores(x)], (3,)),
        "Pass a function that picks one, such as lambda x: session.run(None, {'x': x})[0]. Received: a list",
    ),
    "names instead of numbers": (
        lambda: CallableTeacher(lambda x: np.full((len(x), 3), "cat"), (3,)),
        "Expected the function of 'callable_teacher' to return numbers",
    ),
    "masked entries": (
        lambda: CallableTeacher(lambda x: np.ma.masked_greater(scores(x), 0), (3,)),
        "Expected the function of 'callable_teacher' to return a value everywhere",
    ),
    "logits that should be probabilities": (
        lambda: CallableTeacher(scores, (3,), from_probabilities=True),
        "to return probabilities, rows from 0 to 1 that sum to 1. Pass from_probabilities=False for logits.",
    ),
    "probabilities that should be logits": (
        lambda: CallableTeacher(probabilities, (3,)),
        "to return logits, which the loss expects. Pass from_probabilities=True.",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", IN_A_STEP)
def test_a_wrong_output_raises_an_error_before_the_student_changes(name: str, eager: bool) -> None:
    make, words = IN_A_STEP[name]
    model = DistillModel(mlp(), make())
    model.compile("sgd", run_eagerly=eager)
    before = model.student.get_weights()
    with pytest.raises(Exception, match=re.escape(words)):  # TensorFlow has classes of its own for errors in a graph
        model.fit(X, **FIT)
    if keras.backend.backend() == "jax":  # Keras itself loses the weights in such an error
        return
    for own, expected in zip(model.student.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, expected)


def test_probabilities_suit_a_loss_on_probabilities() -> None:
    student = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
    terms = [LogitsDistillation(SoftTargetLoss(temperature=2.0, from_logits=False))]
    model = DistillModel(student, CallableTeacher(probabilities, (3,)), terms)
    model.compile("sgd", run_eagerly=True)
    assert np.isfinite(model.fit(X, **FIT).history["loss"]).all()
    with pytest.raises(ValueError, match="Expected the teacher's output to be probabilities"):
        DistillModel(student, CallableTeacher(probabilities, (3,), from_probabilities=True), terms)


def not_savable(folder: Path) -> None:
    model = DistillModel(mlp(), CallableTeacher(scores, (3,)), save_teacher=True)
    model.save(folder / "model.keras")


BEFORE: dict[str, tuple[type[Exception], Callable[[Path], Any], str]] = {
    "a bare function": (
        TypeError,
        lambda _: DistillModel(mlp(), scores),
        "Wrap a function of arrays: CallableTeacher(function, output_shape=(10,)). Received: a function",
    ),
    "a Keras model": (TypeError, lambda _: CallableTeacher(dense(), (3,)), "A Keras model is a teacher itself"),
    "no function": (TypeError, lambda _: CallableTeacher("teacher.onnx", (3,)), "to be a function of arrays"),
    "no shape": (ValueError, lambda _: CallableTeacher(scores, ()), "sizes of one example's output, such as (10,)"),
    "a number as the shape": (ValueError, lambda _: CallableTeacher(scores, 3), "Received: output_shape=3"),
    "a batch size of 0": (
        ValueError,
        lambda _: CallableTeacher(scores, (3,), batch_size=0),
        "Expected `batch_size` to be greater than 0",
    ),
    "other classes than the student's": (
        ValueError,
        lambda _: DistillModel(mlp(), CallableTeacher(scores, (4,)), LogitsDistillation(LogitMSELoss())),
        "Both models must score the same classes.",
    ),
    "a layer of a function": (
        ValueError,
        lambda _: DistillModel(mlp(), CallableTeacher(scores, (3,)), FeatureDistillation("hidden", "hidden")),
        "Expected `teacher_layer` to name one layer of the teacher 'callable_teacher'",
    ),
    "a file with the function": (ValueError, not_savable, "Expected a teacher that a file can hold"),
    "a cache": (
        CacheError,
        lambda folder: TeacherCache.build(CallableTeacher(scores, (3,)), X, folder / "cache"),
        "Store the function's outputs with TeacherCache.from_arrays.",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_wrong_use_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    kind, act, words = BEFORE[name]
    with pytest.raises(kind, match=re.escape(words)):
        act(tmp_path)
