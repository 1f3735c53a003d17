"""Every public loss in a real training with Keras: two epochs equal one epoch, a file, and another epoch (K22)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from cases import CASES
from keras_loss_cases import KERAS_CASES, keras_settings, to_keras
from keras_nets import assert_same_logs, assert_same_weights, numpy_of
from loss_case import LossCase

from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, losses

BASES = {"DistillationLoss", "FunctionLoss"}
ONE_EACH = {case.loss.__name__: case for case in reversed(CASES)}


def shapes(case: LossCase) -> list[tuple[int, ...]]:
    return [to_keras(case, np.empty(shape)).shape for shape in case.shapes]


def network(shape: tuple[int, ...], name: str, inputs: tuple[int, ...] = (4,)) -> keras.Model:
    """A model whose layer ``body`` returns the kind of feature that a row's loss compares."""
    inputs = keras.Input(inputs)
    flat = keras.layers.Dense(math.prod(shape[1:]))(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, keras.layers.Reshape(shape[1:], name="body")(flat), name=name)


@keras.saving.register_keras_serializable(package="tests")
def rows(inputs: Any) -> Any:
    """Rows of the data set that the inputs name."""
    return keras.ops.cast(keras.ops.argmax(inputs, axis=1), "int32")


@keras.saving.register_keras_serializable(package="tests")
def itself(targets: Any) -> Any:
    """The targets, which are boxes."""
    return targets


def inputs_of(case: LossCase) -> tuple[int, ...]:
    return (8, 8, 1) if case.loss.needs_boxes else (4,)


def distilled(case: LossCase) -> DistillModel:
    student_shape, teacher_shape = shapes(case)
    keras.utils.set_random_seed(2)
    teacher = network(teacher_shape, "teacher", inputs_of(case))
    keras.utils.set_random_seed(1)
    student = network(student_shape, "student", inputs_of(case))
    settings = {"mask_ratio": 0.5, **case.settings} if "mask" in case.settings else case.settings
    loss = getattr(losses, case.loss.__name__)(**keras_settings(settings))
    layers = ["body", "body"] if loss.several_layers else "body"
    places = {"index": rows} if loss.needs_index else {"boxes": itself} if loss.needs_boxes else {}
    term = (
        LogitsDistillation(loss, weight=0.1)
        if case.on_logits
        else FeatureDistillation(layers, layers, loss, weight=0.1, **places)
    )
    model = DistillModel(student, teacher, term, teacher_metrics=[])
    model.compile(
        keras.optimizers.Adam(0.01),
        no_task if case.loss.needs_labels or case.loss.needs_boxes else None,
        jit_compile=False,
    )
    return model


@keras.saving.register_keras_serializable(package="tests")
def no_task(y_true: Any, y_pred: Any) -> Any:
    """Labels reach a model only beside a loss on them."""
    return 0.0 * keras.ops.mean(y_pred, axis=tuple(range(1, len(y_pred.shape))))


def fitted(model: DistillModel, case: LossCase, epochs: int, start: int = 0) -> dict[str, list[float]]:
    """Two batches an epoch."""
    shape = shapes(case)[0]
    random = np.random.default_rng(0)
    x = random.standard_normal((2 * shape[0], *inputs_of(case))).astype("float32")
    y = random.integers(0, shape[-1], (len(x), *shape[1:-1])) if case.loss.needs_labels else None
    if case.loss.needs_boxes:
        y = np.repeat(np.array([[[0, 0, 4, 4], [2, 2, 8, 5]]], "float32"), len(x), axis=0)
    fit = model.fit(x, y, shape[0], epochs, initial_epoch=start, shuffle=False, verbose=0)
    return fit.history


def test_every_public_loss_has_a_row() -> None:
    assert set(ONE_EACH) | BASES == set(losses.__all__)
    assert {case.loss.__name__ for case in KERAS_CASES} == set(ONE_EACH)


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
def test_k22_a_loaded_model_ends_where_a_straight_run_does(case: LossCase, tmp_path: Path) -> None:
    """K22: student, adapters, parameters of the loss, and logs."""
    straight, first = distilled(case), distilled(case)
    untouched = [numpy_of(weight) for weight in straight.teacher.weights]
    logs = fitted(straight, case, 2)
    fitted(first, case, 1)
    begun = [numpy_of(weight) for weight in first.trainable_variables]
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    second.teacher = straight.teacher
    assert_same_logs(fitted(second, case, 2, start=1), {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)
    assert all(not np.array_equal(a, numpy_of(b)) for a, b in zip(begun, second.trainable_variables, strict=True))
    learns = case.parameters is not None and "queue" not in case.parameters  # a queue is filled, not trained
    assert len(begun) >= (3 if learns else 2)
    for before, weight in zip(untouched, straight.teacher.weights, strict=True):
        np.testing.assert_array_equal(before, numpy_of(weight))
