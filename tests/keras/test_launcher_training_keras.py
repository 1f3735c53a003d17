"""The launcher for Keras: the losses of its built-in training."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_launch import Logs, divergence64, launched
from keras_nets import ce64, kl64, log_softmax64, mlp, numpy_of, structured, table

from keras_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from keras_distill import KnowledgeDistillationLoss as Knowledge


@pytest.mark.parametrize(
    ("kind", "from_logits", "labels_are"),
    [
        *itertools.product(["CE", "KL", "MSE"], [True, False], ["sparse"]),
        *itertools.product(["KL"], [True, False], ["column", "one_hot"]),
    ],
)
def test_built_in_training_minimises_the_formula_n12(kind: str, from_logits: bool, labels_are: str) -> None:
    """N12, N3: the first loss is that of the untrained models in float64, for every kind of labels and of outputs."""
    inputs, labels = table()
    coded = {"sparse": labels, "column": labels[:, None], "one_hot": np.eye(3, dtype="float32")[labels]}[labels_are]
    student, teacher = mlp(), mlp(12, name="teacher")
    z_s, z_t = (numpy_of(model(inputs)) for model in (student, teacher))
    if not from_logits:
        z_s, z_t = log_softmax64(z_s), log_softmax64(z_t)
        student, teacher = (keras.Sequential([model, keras.layers.Softmax()]) for model in (student, teacher))
    logs = Logs()
    distiller = launched(callbacks=[logs], student_model=student, teacher_model=teacher)
    distiller.criterion = Knowledge(2.0, ["CE", kind], [0.25, 0.75], from_logits=from_logits)
    distiller.train_dataloader = [(inputs, coded)]
    distiller.fit()
    expected = 0.25 * ce64(z_s, labels).mean() + 0.75 * divergence64(kind, 2.0, z_s, z_t)
    np.testing.assert_allclose(logs.epochs[0]["loss"], expected, rtol=2e-5)


def test_the_teacher_runs_in_inference_mode_and_is_never_trained_n12() -> None:
    """N12: its BatchNorm statistics, weights and trainable flags stay; its dropout does nothing."""
    teacher = structured("functional", 12, dropout=0.9, name="teacher")
    before = teacher.get_weights()
    inputs, labels = table()
    keras.utils.set_random_seed(0)
    student, logs = mlp(), Logs()
    expected = kl64(numpy_of(student(inputs)), numpy_of(teacher(inputs, training=False)), 1.0).mean()
    teacher.get_layer("counter").calls.assign(before[0])
    distiller = launched(student_model=student, teacher_model=teacher, callbacks=[logs])
    distiller.train_dataloader = [(inputs, labels)]
    distiller.criterion = Knowledge(1.0, ["CE", "KL"], [0.0, 1.0])
    distiller.fit()
    np.testing.assert_allclose(logs.epochs[0]["loss"], expected, rtol=2e-5)
    assert float(teacher.get_layer("counter").calls) == 1.0
    for initial, final in zip(before[1:], teacher.get_weights()[1:], strict=True):
        np.testing.assert_array_equal(initial, final)
    assert all(layer.trainable for layer in teacher.layers)


def test_a_teacher_without_weight_never_runs_n3() -> None:
    """N3: the logged loss is the weighted task loss, and a teacher is not needed."""
    teacher = structured("functional", 12, name="teacher")
    for teacher_model in (teacher, None):
        logs = Logs()
        distiller = launched(teacher_model=teacher_model, callbacks=[logs])
        expected = ce64(numpy_of(distiller.student_model(table()[0])), table()[1]).mean()
        distiller.train_dataloader = [table()]
        distiller.criterion = Knowledge(1.0, ["CE", "KL"], [1.0, 0.0])
        distiller.fit()
        np.testing.assert_allclose(logs.epochs[0]["loss"], expected, rtol=2e-5)
    assert float(teacher.get_layer("counter").calls) == 0.0


def test_layers_are_matched_through_adapters_n5() -> None:
    """N5, N6: a narrower student learns the teacher's hidden layer; origin loss and weights as in the formula."""
    inputs, labels = table()
    criterion = Intermediate(["hidden", ["logits", ""]], ["MSE", "L1"], [0.5, 2.0], add_origin_loss=True)
    logs = Logs()
    distiller = launched(epochs=8, criterion=criterion, callbacks=[logs], optimizer=keras.optimizers.Adam(0.05))
    z_s, z_t = (numpy_of(m(inputs)) for m in (distiller.student_model, distiller.teacher_model))
    distiller.train_dataloader = [(inputs, labels)]
    distiller.fit()
    first = logs.epochs[0]
    np.testing.assert_allclose(first["logits_loss"], np.abs(z_s - z_t).mean(), rtol=2e-5)
    total = ce64(z_s, labels).mean() + 0.5 * first["hidden_loss"] + 2.0 * first["logits_loss"]
    np.testing.assert_allclose(first["loss"], total, rtol=2e-5)
    assert logs.epochs[-1]["hidden_loss"] < 0.5 * first["hidden_loss"]


def test_a_criterion_of_the_users_own_makes_the_total_n10() -> None:
    """N10: called with both outputs and the student's own loss."""
    inputs, labels = table()
    logs = Logs()

    def criterion(student_output: Any, teacher_output: Any, student_loss: Any) -> Any:
        return 3.0 * student_loss + ops.mean(ops.abs(student_output - teacher_output))

    distiller = launched(criterion=criterion, callbacks=[logs], train_dataloader=[(inputs, labels)])
    z_s, z_t = (numpy_of(m(inputs)) for m in (distiller.student_model, distiller.teacher_model))
    distiller.fit()
    np.testing.assert_allclose(
        logs.epochs[0]["loss"], 3 * ce64(z_s, labels).mean() + np.abs(z_s - z_t).mean(), rtol=2e-5
    )


@pytest.mark.parametrize("task_loss", [None, "sparse_categorical_crossentropy", "categorical_crossentropy"])
def test_a_criterion_of_the_users_own_gets_the_weighted_loss_of_the_labels_n10(task_loss: str | None) -> None:
    """N10: as the compiled loss of a criterion of this package."""
    inputs, labels = table()
    targets = np.eye(3, dtype="float32")[labels] if task_loss == "categorical_crossentropy" else labels
    weights, logs = np.linspace(0.0, 2.0, len(labels), dtype="float32"), Logs()
    distiller = launched(
        criterion=lambda student_output, teacher_output, student_loss: 3.0 * student_loss,
        callbacks=[logs], train_dataloader=[(inputs, targets, weights)], task_loss=task_loss,
    )  # fmt: skip
    if task_loss is not None:
        distiller.student_model = keras.Sequential([distiller.student_model, keras.layers.Softmax()])
        distiller.teacher_model = keras.Sequential([distiller.teacher_model, keras.layers.Softmax()])
    output = numpy_of(distiller.student_model(inputs))
    logits = output if task_loss is None else np.log(output)
    distiller.fit()
    np.testing.assert_allclose(logs.epochs[0]["loss"], 3 * (weights * ce64(logits, labels)).mean(), rtol=2e-5)
