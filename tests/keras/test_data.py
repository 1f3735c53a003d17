"""Where the data comes from, and data without labels (K27, K28 and K30)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, mlp, table

from keras_distill import (
    DistillModel,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    MutualLearning,
    SoftTargetLoss,
)
from keras_distill.schedules import Step

INPUTS, LABELS = table(32)
WEIGHTS = np.linspace(0.0, 2.0, 32, dtype="float32")


class Runs(keras.layers.Layer):
    """Passes its input on, and counts how often Python runs it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = 0

    def call(self, inputs: Any) -> Any:
        self.calls += 1
        return inputs


def distilled(loss: Any = "labels", teacher: keras.Model | None = None, **settings: Any) -> DistillModel:
    keras.utils.set_random_seed(5)
    compiled = {key: settings.pop(key) for key in ("metrics", "weighted_metrics", "run_eagerly") if key in settings}
    terms = [LogitsDistillation(weight=0.5), FeatureDistillation("hidden", "hidden", weight=0.4)]
    model = DistillModel(mlp(8), teacher or mlp(12, name="teacher"), terms, **settings)
    model.compile(
        keras.optimizers.SGD(0.1), cross_entropy() if loss == "labels" else loss, jit_compile=False, **compiled
    )
    return model


def batches(*parts: Any) -> list[tuple[Any, ...]]:
    """Four batches of eight."""
    return [tuple(part[start : start + 8] for part in parts) for start in range(0, 32, 8)]


class Dataset(keras.utils.PyDataset):
    """Batches for Keras' own loader."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.batches = batches(*parts)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def source(kind: str, *parts: Any) -> Any:
    """The same batches in the form of one kind of source."""
    if kind == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(parts).batch(8)
    if kind == "PyDataset":
        return Dataset(*parts)
    if kind == "generator":
        return (batch for _ in range(2) for batch in batches(*parts))
    import torch

    tensors = [torch.as_tensor(part) for part in parts]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=8)


KINDS = ["PyDataset", "generator", "torch", pytest.param("tf.data", marks=pytest.mark.tensorflow)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_k30_every_source_of_data_trains_like_arrays(kind: str, weighted: bool) -> None:
    """K30: weights and logs of two epochs, with and without sample weights."""
    arrays, other = distilled(), distilled()
    expected = arrays.fit(
        INPUTS, LABELS, 8, 2, sample_weight=WEIGHTS if weighted else None, shuffle=False, verbose=0
    ).history
    parts = (INPUTS, LABELS, WEIGHTS) if weighted else (INPUTS, LABELS)
    steps = 4 if kind == "generator" else None
    logs = other.fit(source(kind, *parts), epochs=2, steps_per_epoch=steps, shuffle=False, verbose=0).history
    assert_same_logs(logs, expected, 1e-5)
    assert_same_weights(other, arrays, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_k30_every_source_serves_for_validation(kind: str) -> None:
    """K30: `evaluate` returns the same as for arrays."""
    model = distilled()
    expected = model.evaluate(INPUTS, LABELS, 8, verbose=0, return_dict=True)
    steps = 4 if kind == "generator" else None
    logs = model.evaluate(source(kind, INPUTS, LABELS), steps=steps, verbose=0, return_dict=True)
    assert logs == pytest.approx(expected, rel=1e-5)


def test_k30_batches_of_different_sizes_count_by_their_examples() -> None:
    """K30: the logs of 30 examples in batches of 8 are the mean over the examples, not over the batches."""
    model = distilled()
    whole = model.evaluate(INPUTS[:30], LABELS[:30], 30, verbose=0, return_dict=True)
    split = model.evaluate(INPUTS[:30], LABELS[:30], 8, verbose=0, return_dict=True)
    assert split == pytest.approx(whole, rel=1e-4)


def test_k30_one_batch_at_a_time() -> None:
    """K30: `train_on_batch` and `test_on_batch`, whose logs have the same keys."""
    model, other = distilled(), distilled()
    logs = model.train_on_batch(INPUTS, LABELS, return_dict=True)
    expected = other.fit(INPUTS, LABELS, 32, shuffle=False, verbose=0).history
    assert {key: [value] for key, value in logs.items()} == pytest.approx(
        {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
    )
    assert_same_weights(model, other, 1e-6)
    assert model.test_on_batch(INPUTS, LABELS, return_dict=True).keys() == logs.keys()


def test_k30_predictions_are_the_students() -> None:
    """K30: `predict` takes what the student takes."""
    model = distilled()
    np.testing.assert_array_equal(model.predict(INPUTS, verbose=0), model.student.predict(INPUTS, verbose=0))


@pytest.fixture
def counted() -> tuple[keras.Model, Runs]:
    """A teacher, and what counts its runs."""
    inputs, runs = keras.Input((6,)), Runs()
    hidden = keras.layers.Dense(12, name="hidden")(runs(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(hidden), name="teacher"), runs


@pytest.mark.parametrize("eager", [True, False])
def test_k27_evaluation_without_the_teacher(counted: tuple[keras.Model, Runs], eager: bool) -> None:
    """K27: it does not run, its keys are not there, and the loss is that of the task."""
    teacher, runs = counted
    model = distilled(teacher=teacher, evaluate_distillation=False, task_weight=0.7, run_eagerly=eager, metrics=["acc"])
    runs.calls = 0
    logs = model.evaluate(INPUTS, LABELS, verbose=0, return_dict=True)
    assert runs.calls == 0
    assert set(logs) == {"loss", "task_loss", "acc"}
    assert logs["loss"] == pytest.approx(0.7 * logs["task_loss"], rel=1e-6)
    history = model.fit(INPUTS, LABELS, 8, validation_data=(INPUTS, LABELS), verbose=0).history
    assert runs.calls > 0
    own = {"loss", "task_loss", "distillation_loss", "logits_loss", "hidden_loss", "teacher_agreement", "acc"}
    assert set(history) == own | {"val_loss", "val_task_loss", "val_acc"}
    assert set(model.evaluate(INPUTS, LABELS, verbose=0, return_dict=True)) == {"loss", "task_loss", "acc"}


def test_k27_by_default_evaluation_runs_the_teacher(counted: tuple[keras.Model, Runs]) -> None:
    """K27: the other way round; training and validation have the same keys."""
    model = distilled(teacher=counted[0])
    history = model.fit(INPUTS, LABELS, 8, validation_data=(INPUTS, LABELS), verbose=0).history
    training_keys = {key for key in history if not key.startswith("val_")}
    assert {f"val_{key}" for key in training_keys} == set(history) - training_keys
    assert "teacher_agreement" in training_keys


def test_k27_agreement_may_be_left_out() -> None:
    """K27: with `teacher_metrics=[]` no log has it."""
    model = distilled(teacher_metrics=[])
    history = model.fit(INPUTS, LABELS, 8, validation_data=(INPUTS, LABELS), verbose=0).history
    assert not [key for key in history if "agreement" in key]


def unlabelled(kind: str) -> Any:
    """Inputs alone, in batches of 8."""
    if kind == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(INPUTS).batch(8)
    if kind == "generator":
        return (batch for _ in range(2) for batch in batches(INPUTS))
    return Dataset(INPUTS)


@pytest.mark.parametrize("loss", [None, "labels"])
@pytest.mark.parametrize(
    "kind", ["arrays", "PyDataset", "generator", pytest.param("tf.data", marks=pytest.mark.tensorflow)]
)
def test_k28_inputs_alone_are_enough(kind: str, loss: Any) -> None:
    """K28: the gradient is that of the distillation, whether a loss is compiled or not, and whatever the source."""
    labelled = distilled(None, task_weight=0.0)
    expected = labelled.fit(INPUTS, LABELS, 8, 2, shuffle=False, verbose=0).history
    model = distilled(loss, metrics=["accuracy"])
    if kind == "arrays":
        logs = model.fit(INPUTS, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    else:
        steps = 4 if kind == "generator" else None
        logs = model.fit(unlabelled(kind), epochs=2, steps_per_epoch=steps, shuffle=False, verbose=0).history
    assert set(logs) == {"loss", "distillation_loss", "logits_loss", "hidden_loss", "teacher_agreement"}
    assert_same_weights(model.student, labelled.student, 1e-5)
    for key in logs:
        np.testing.assert_allclose(logs[key], expected[key], rtol=1e-5)
    evaluated = model.evaluate(INPUTS, verbose=0, return_dict=True)
    assert set(evaluated) == set(logs)


def test_k28_labels_without_a_loss_serve_metrics() -> None:
    """K28: pure distillation, watched by accuracy."""
    model = distilled(None, metrics=["accuracy"])
    logs = model.fit(INPUTS, LABELS, 8, validation_data=(INPUTS, LABELS), verbose=0).history
    assert "task_loss" not in logs
    accuracy = float(np.mean(model.predict(INPUTS, verbose=0).argmax(-1) == LABELS))
    assert logs["val_accuracy"][0] == pytest.approx(accuracy)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras' word for the end of an unknown length
@pytest.mark.tensorflow  # only a graph of TensorFlow begins a step without its batch
@pytest.mark.parametrize("kind", ["live", "average", "mutual"])
@pytest.mark.parametrize("accumulated", [None, 3])
def test_k30_a_data_set_of_unknown_length_trains_and_counts_like_one_of_known_length(
    kind: str, accumulated: int | None
) -> None:
    """K30: Keras learns the end from a step without a batch, in which nothing may happen."""

    import tensorflow as tf

    def trained(known: bool) -> tuple[keras.Model, dict[str, Any], int]:
        keras.utils.set_random_seed(5)
        students = [mlp(8), mlp(6, name="second")]
        model: Any = MutualLearning(students)
        if kind != "mutual":
            teacher = EMATeacher(0.7) if kind == "average" else mlp(12, name="teacher")
            ramp = LogitsDistillation(SoftTargetLoss(temperature=Step([4.0, 1.0], boundaries=[0.5], over="fraction")))
            model = DistillModel(students[0], teacher, ramp)
        optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=accumulated)
        model.compile(optimizer, cross_entropy(), metrics=["accuracy"], jit_compile=False)
        data = source("tf.data", INPUTS, LABELS)  # every batch has eight rows, which the graph knows
        data = data.unbatch().batch(8, drop_remainder=True)
        data = data.apply(tf.data.experimental.assert_cardinality(4)) if known else data.filter(lambda x, y: True)
        logs = model.fit(data, epochs=3, shuffle=False, validation_data=data, verbose=0).history
        return model, logs, int(optimizer._iterations)

    model, logs, number = trained(known=False)
    expected_model, expected_logs, expected_number = trained(known=True)
    assert number == expected_number == 12
    assert_same_weights(model, expected_model)  # those of an average and its number of updates too
    assert_same_logs(logs, expected_logs)
