"""Students that teach each other, and chains of assistants."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, kl64, mlp, table

from keras_distill import (
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    MutualLearning,
    SoftTargetLoss,
    assistant_chain,
)
from keras_distill.schedules import Linear

X, Y = table(16)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def students(count: int = 2) -> list[keras.Model]:
    keras.utils.set_random_seed(6)
    return [mlp(5 + number, name=f"student{number}") for number in range(count)]


def mutual(count: int = 2, terms: Any = None, optimizer: Any = None, **compiled: Any) -> MutualLearning:
    model = MutualLearning(students(count), terms)
    optimizer = optimizer or keras.optimizers.Adam(0.05)
    model.compile(optimizer, cross_entropy(), **(compiled or {"run_eagerly": True}))
    return model


def by_hand(epochs: int, heat: float = 1.0, weight: float = 1.0) -> list[Any]:
    """Each student with its own optimizer, and its own loss, to the outputs of the same step."""
    import tensorflow as tf

    models, optimizers = students(), [keras.optimizers.Adam(0.05) for _ in range(2)]
    for start in [0, 8] * epochs:
        x, y = X[start : start + 8], Y[start : start + 8]
        outputs, gradients = [ops.convert_to_tensor(model(x)) for model in models], []
        for own, model in enumerate(models):
            with tf.GradientTape() as tape:
                log_s = ops.log_softmax(model(x) / heat)
                log_t = ops.log_softmax(outputs[1 - own] / heat)
                divergence = heat**2 * ops.mean(ops.sum(ops.exp(log_t) * (log_t - log_s), axis=-1))
                task = -ops.mean(ops.sum(ops.one_hot(y, 3) * ops.log_softmax(model(x)), axis=-1))
                total = task + weight * divergence
            gradients.append(tape.gradient(total, model.trainable_variables))
        for model, optimizer, gradient in zip(models, optimizers, gradients, strict=True):
            optimizer.apply(gradient, model.trainable_variables)
    return [weight for model in models for weight in model.get_weights()]


def fitted(**compiled: Any) -> Callable[[Path], MutualLearning]:
    def situation(folder: Path) -> MutualLearning:
        model = mutual(**compiled)
        model.fit(X, Y, epochs=2, **FIT)
        return model

    return situation


def loaded(folder: Path) -> MutualLearning:
    model = mutual()
    model.fit(X, Y, **FIT)
    model.save(folder / "model.keras")
    again: MutualLearning = keras.models.load_model(folder / "model.keras")
    again.run_eagerly = True
    again.fit(X, Y, epochs=2, initial_epoch=1, **FIT)
    return again


SITUATIONS: dict[str, Callable[[Path], MutualLearning]] = {
    "eager": fitted(),
    "graph": fitted(jit_compile=False),
    "jit_compile": fitted(jit_compile=True),
    "steps_per_execution": fitted(steps_per_execution=2, jit_compile=False),
    "load_model": loaded,
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", SITUATIONS)
def test_one_optimizer_trains_the_students_as_one_optimizer_for_each(name: str, tmp_path: Path) -> None:
    model = SITUATIONS[name](tmp_path)
    trained = [weight for student in model.students for weight in student.get_weights()]
    for own, expected in zip(trained, by_hand(2), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.tensorflow
def test_the_terms_set_temperature_and_weight() -> None:
    model = mutual(terms=LogitsDistillation(SoftTargetLoss(temperature=3.0), weight=2.0))
    model.fit(X, Y, **FIT)
    trained = [weight for student in model.students for weight in student.get_weights()]
    for own, expected in zip(trained, by_hand(1, heat=3.0, weight=2.0), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


def test_three_students_learn_from_the_mean_over_the_others() -> None:
    model = mutual(3)
    z = [np.asarray(student.predict(X, verbose=0), "float64") for student in model.students]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = sum(kl64(z[i], z[j], 1.0).mean() for i, j in pairs) / 2
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["mutual_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(logs["loss"], expected + sum(logs[f"student{i}_loss"] for i in range(3)), rtol=1e-4)


def test_sample_weights_count_in_both_losses() -> None:
    model, weights = mutual(), np.arange(16.0, dtype="float32")
    z = [np.asarray(student.predict(X, verbose=0), "float64") for student in model.students]
    expected = sum((weights * kl64(*pair, 1.0)).mean() for pair in (z, z[::-1]))
    logs = model.evaluate(X, Y, sample_weight=weights, batch_size=16, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["mutual_loss"], expected, rtol=1e-4)


def test_metrics_are_those_of_each_student() -> None:
    model = mutual(metrics=["accuracy", keras.metrics.SparseCategoricalAccuracy(name="right")], run_eagerly=True)
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    for student in model.students:
        right = (np.asarray(student.predict(X, verbose=0)).argmax(-1) == Y).mean()
        np.testing.assert_allclose([logs[f"{student.name}_{key}"] for key in ("accuracy", "right")], right, rtol=1e-5)


def test_a_weight_that_is_assigned_counts_for_every_student() -> None:
    model = mutual(jit_compile=False)
    model.fit(X, Y, **FIT)
    model.terms[0].weight = 0.0
    assert model.evaluate(X, Y, verbose=0, return_dict=True)["mutual_loss"] == 0.0


def test_unlabelled_batches_train_on_the_outputs_alone() -> None:
    model = mutual()
    before = model.students[1].get_weights()[0].copy()
    assert np.isfinite(model.fit(X, **FIT).history["mutual_loss"]).all()
    assert (model.students[1].get_weights()[0] != before).any()


def test_predictions_are_those_of_each_student() -> None:
    model = mutual()
    outputs = model.predict(X, verbose=0)
    for student in model.students:
        np.testing.assert_allclose(outputs[student.name], student.predict(X, verbose=0), rtol=1e-6)


def shared(trainable: bool = True) -> list[keras.Model]:
    layer = keras.layers.Dense(4, name="encoder", trainable=trainable)
    models = []
    for name in ("first", "second"):
        inputs = keras.Input((6,))
        models.append(keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)), name=name))
    return models


def other_classes() -> list[keras.Model]:
    inputs = keras.Input((6,))
    return [mlp(5), keras.Model(inputs, keras.layers.Dense(4)(inputs))]


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "one student": (ValueError, lambda: MutualLearning(students(1)), "to be a list of two or more models"),
    "no model": (TypeError, lambda: MutualLearning([mlp(), "student"]), "Expected `student` to be a keras.Model"),
    "one name": (ValueError, lambda: MutualLearning([mlp(), mlp()]), "Expected students with names of their own."),
    "shared weights": (ValueError, lambda: MutualLearning(shared()), "Expected students that share only frozen"),
    "other classes": (ValueError, lambda: MutualLearning(other_classes()), "Both models must score the same classes."),
    "features": (
        ValueError,
        lambda: MutualLearning(students(), FeatureDistillation("hidden", "hidden")),
        "Expected terms on outputs for students that teach each other.",
    ),
    "schedules": (
        ValueError,
        lambda: MutualLearning(students(), LogitsDistillation(weight=Linear(1.0, 0.0))),
        "Assign new numbers in a callback: model.terms[0].weight = 0.5.",
    ),
    "clipping over all weights": (
        ValueError,
        lambda: mutual(optimizer=keras.optimizers.SGD(0.1, global_clipnorm=1.0)),
        "Expected an optimizer that treats each weight by itself, for several students. Pass clipnorm=... instead.",
    ),
    "clipping inside of a loss scale": (
        ValueError,
        lambda: mutual(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, global_clipnorm=1.0))),
        "Expected an optimizer that treats each weight by itself, for several students. Pass clipnorm=... instead.",
    ),
}


def test_weights_of_masked_tokens_count_alike_for_every_student() -> None:
    """On torch Keras multiplies the weights by the mask in place."""

    def tagger(name: str) -> keras.Model:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,), dtype="int32")
        hidden = keras.layers.Embedding(9, 5, mask_zero=True)(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(hidden), name=name)

    ids, labels = np.array([[1, 2, 0, 0], [3, 4, 5, 6]], "int32"), np.array([[0, 1, 2, 0], [1, 1, 2, 0]])
    weights = np.array([[1.0, 2.0, 1.0, 1.0], [0.5, 1.0, 1.0, 3.0]], "float32")
    alone, model = tagger("alone"), MutualLearning([tagger(name) for name in "abc"])
    for each in (alone, model):
        each.compile("sgd", cross_entropy(), run_eagerly=True)
    expected = alone.evaluate(ids, labels, sample_weight=weights, verbose=0)
    logs = model.evaluate(ids, labels, sample_weight=weights, verbose=0, return_dict=True)
    assert [logs[f"{name}_loss"] for name in "abc"] == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("half", [0, 1])
def test_the_loss_is_scaled_if_any_student_is_mixed_float16(half: int) -> None:
    models = []
    for number in range(2):
        keras.config.set_dtype_policy("mixed_float16" if number == half else "float32")
        models.append(mlp(5, name=f"student{number}"))
        keras.config.set_dtype_policy("float32")
    model = MutualLearning(models)
    model.compile("sgd", cross_entropy())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_that_cannot_be_right_is_refused_in_words(name: str) -> None:
    kind, act, words = REFUSED[name]
    with pytest.raises(kind, match=re.escape(words)):
        act()


def test_a_frozen_encoder_may_be_shared_and_stays_as_it_was() -> None:
    model = MutualLearning(shared(trainable=False))
    layer = model.students[0].get_layer("encoder")
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    before = layer.get_weights()
    model.fit(X, Y, **FIT)
    for own, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, expected)


# Chains ---------------------------------------------------------------------------------------------------------------


class Training:
    """Distils with a DistillModel, and counts; it may stop in a stage."""

    def __init__(self, stops_at: str = "") -> None:
        self.stages: list[str] = []
        self.stops_at = stops_at

    def __call__(self, student: keras.Model, teacher: keras.Model) -> None:
        if student.name == self.stops_at:
            raise KeyboardInterrupt
        self.stages.append(f"{teacher.name} to {student.name}")
        model = DistillModel(student, teacher, task_weight=0.0)
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        model.fit(X, **FIT)


def chain() -> tuple[keras.Model, list[keras.Model]]:
    keras.utils.set_random_seed(8)
    return mlp(9, name="teacher"), [mlp(7, name="large"), mlp(5, name="middle"), mlp(3, name="small")]


def test_a_chain_that_was_stopped_continues_with_the_unfinished_stage(tmp_path: Path) -> None:
    teacher, models = chain()
    whole = assistant_chain(teacher, models, Training(), tmp_path / "whole")
    teacher, models = chain()
    with pytest.raises(KeyboardInterrupt):
        assistant_chain(teacher, models, Training(stops_at="middle"), tmp_path / "stopped")
    teacher, models = chain()
    training = Training()
    last = assistant_chain(teacher, models, training, tmp_path / "stopped")
    assert training.stages == ["large to middle", "middle to small"]
    assert [path.name for path in sorted(tmp_path.glob("stopped/*"))] == [
        "0_large.keras", "1_middle.keras", "2_small.keras", "chain.json",
    ]  # fmt: skip
    for own, expected in zip(last.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(own, expected)
    assert keras.models.load_model(tmp_path / "stopped" / "1_middle.keras").name == "middle"


def in_the_folder(change: Callable[[keras.Model, list[keras.Model]], Any]) -> Callable[[Path], Any]:
    def act(folder: Path) -> None:
        assistant_chain(*chain(), Training(), folder)
        teacher, models = chain()
        teacher, models = change(teacher, models)
        assistant_chain(teacher, models, Training(), folder)

    return act


CHAINS: dict[str, tuple[type[Exception], Callable[[Path], Any], str]] = {
    "another teacher": (
        ValueError,
        in_the_folder(lambda _, models: (mlp(9, name="teacher"), models)),
        "to hold the stages of this chain. Pass another folder. Received: another teacher's weights",
    ),
    "other students": (
        ValueError,
        in_the_folder(lambda teacher, models: (teacher, models[:2])),
        "Received: students ['large', 'middle', 'small']",
    ),
    "another size": (
        ValueError,
        in_the_folder(lambda teacher, models: (teacher, [mlp(8, name="large"), *models[1:]])),
        "Expected '0_large.keras' to hold the weights of student 'large'.",
    ),
    "no function": (TypeError, lambda folder: assistant_chain(*chain(), None, folder), "Expected `train` to be"),
    "no students": (ValueError, lambda folder: assistant_chain(mlp(), [], Training(), folder), "at least one model"),
    "a student without inputs": (
        ValueError,
        lambda folder: assistant_chain(mlp(), [keras.Sequential([keras.layers.Dense(3)])], Training(), folder),
        "Expected `students` to be models that are built. Add keras.Input.",
    ),
    "one name": (
        ValueError,
        lambda folder: assistant_chain(mlp(), [mlp(), mlp()], Training(), folder),
        "Expected students with names of their own.",
    ),
}


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_cannot_be_right_is_refused_in_words(name: str, tmp_path: Path) -> None:
    kind, act, words = CHAINS[name]
    with pytest.raises(kind, match=re.escape(words)):
        act(tmp_path)
