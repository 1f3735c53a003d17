"""The launcher for Keras: scripts in the style of the older API's second version (N12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_launch import divergence64
from keras_nets import assert_same_weights, mlp, numpy_of, table

from keras_distill import (
    Distillation,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLoss,
    KnowledgeDistillationLossConfig,
    prepare_compression,
)


def pair() -> tuple[keras.Model, keras.Model]:
    return mlp(), mlp(12, name="teacher")


@pytest.mark.tensorflow
@pytest.mark.parametrize("softmax", [False, True])
def test_a_loop_with_a_tape_equals_one_by_hand(softmax: bool) -> None:
    """Image models that end in a softmax, as the older API's example has them, and logits."""
    import tensorflow as tf

    inputs, labels = table()
    model, teacher_model = pair()
    if softmax:
        model, teacher_model = (keras.Sequential([net, keras.layers.Softmax()]) for net in (model, teacher_model))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax)
    # the script
    distil_loss = KnowledgeDistillationLossConfig(temperature=2.0, loss_types=["CE", "KL"], loss_weights=[0.5, 0.5])
    conf = DistillationConfig(teacher_model=teacher_model, criterion=distil_loss)
    compression_manager = prepare_compression(model, conf)
    compression_manager.callbacks.on_train_begin()
    model = compression_manager.model
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    for epoch in range(3):
        compression_manager.callbacks.on_epoch_begin(epoch)
        compression_manager.callbacks.on_step_begin(0)
        with tf.GradientTape() as tape:
            output = model(inputs, training=True)
            loss = loss_fn(labels, output)
            loss = compression_manager.callbacks.on_after_compute_loss(inputs, output, loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        compression_manager.callbacks.on_before_optimizer_step()
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        compression_manager.callbacks.on_step_end()
        compression_manager.callbacks.on_epoch_end()
    compression_manager.callbacks.on_train_end()

    def scores(output: Any) -> Any:
        return ops.log(output) if softmax else output

    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    for _ in range(3):
        with tf.GradientTape() as tape:
            output = twin(inputs, training=True)
            soft = ops.softmax(scores(teacher_model(inputs, training=False)) / 2)
            logs = ops.log_softmax(scores(output) / 2)
            divergence = ops.mean(ops.sum(soft * (ops.log(soft) - logs), axis=-1))
            loss = 0.5 * loss_fn(labels, output) + 0.5 * 4 * divergence
        optimizer.apply_gradients(
            zip(tape.gradient(loss, twin.trainable_variables), twin.trainable_variables, strict=True)
        )
    for value, expected in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_the_hooks_need_no_beginning_and_take_the_teachers_output() -> None:
    """In the older API, too, on_train_begin may be left out."""
    inputs, _ = table()
    teacher_logits = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    criterion = KnowledgeDistillationLossConfig(2.0, ["CE", "KL"], [0.5, 0.5])
    manager = prepare_compression(mlp(), DistillationConfig(criterion=criterion))
    output = manager.model(inputs)
    total = manager.callbacks.on_after_compute_loss(inputs, output, 2.0, teacher_logits)
    expected = 1.0 + 0.5 * divergence64("KL", 2.0, numpy_of(output), teacher_logits)
    np.testing.assert_allclose(float(numpy_of(total)), expected, rtol=2e-5)
    manager.close()


def test_intermediate_layers_are_read() -> None:
    inputs, _ = table()
    student, teacher = mlp(), mlp(8, name="teacher")
    criterion = IntermediateLayersKnowledgeDistillationLossConfig([["hidden"]], loss_types=[], loss_weights=[])
    with prepare_compression(student, [DistillationConfig(teacher, criterion)]) as manager:
        total = manager.callbacks.on_after_compute_loss(inputs, manager.model(inputs), 2.0)
    features = [np.maximum(inputs @ net.get_weights()[0] + net.get_weights()[1], 0) for net in (student, teacher)]
    np.testing.assert_allclose(float(numpy_of(total)), ((features[0] - features[1]) ** 2).mean(), rtol=2e-5)
    assert "call" not in vars(student)


def test_the_best_student_is_kept_and_saved_as_any_keras_model(tmp_path: Path) -> None:
    student, teacher = pair()
    scores = iter([0.0, 0.5, 0.9, 0.1])
    manager = prepare_compression(student, DistillationConfig(teacher))
    manager.distiller.eval_func = lambda model: 0.0 if model is teacher else next(scores)
    manager.callbacks.on_train_begin()
    weights = []
    for factor in (1.0, 2.0, 3.0):
        student.set_weights([factor * value for value in student.get_weights()])
        weights.append(student.get_weights())
        manager.callbacks.on_epoch_end()
    path = manager.save(tmp_path / "running")
    assert_same_weights(keras.saving.load_model(path), student)
    manager.callbacks.on_train_end()
    path = manager.save(tmp_path / "output" / "student")
    loaded = keras.saving.load_model(path)
    for value, best in zip(loaded.get_weights(), weights[1], strict=True):
        np.testing.assert_array_equal(value, best)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: prepare_compression(mlp(), object()), TypeError, "`confs` to be a DistillationConfig"),
        (lambda: prepare_compression(mlp(), []), ValueError, "`confs` to hold one DistillationConfig"),
        (lambda: prepare_compression(None, DistillationConfig()), ValueError, "`student_model` to be a keras.Model"),
        (lambda: DistillationConfig(criterion="KL"), TypeError, "`criterion` to be one of the LossConfig objects"),
        (lambda: KnowledgeDistillationLossConfig(temperature=0), ValueError, "`temperature` to be greater than 0"),
        (lambda: DistillationConfig(optimizer={"SDG": {}}), ValueError, "`distillation.train.optimizer.SDG` to be"),
    ],
)
def test_wrong_arguments_are_refused_with_a_clear_error(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"Expected {words}"):
        make()


def test_names_of_the_first_version_are_taken() -> None:
    distiller, model = Distillation(), mlp()
    distiller.model = model
    assert distiller.student_model is model
    made = distiller.create_criterion()
    assert isinstance(made, KnowledgeDistillationLoss)
    assert distiller.criterion is made
    distiller.on_train_begin()
    with pytest.raises(ValueError, match="Expected a teacher to learn from"):
        distiller.on_after_compute_loss(None, model(table()[0]), 1.0)
    distiller.close()
