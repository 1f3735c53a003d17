"""Every private name of Keras and TensorFlow in `keras_distill.compat`: what it is for, and that it still does it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, mlp, table

import keras_distill
from keras_distill import compat

PACKAGE = Path(keras_distill.__file__).parent


def test_no_other_file_imports_private_names_of_keras_or_tensorflow() -> None:
    imported = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith(("keras.src", "tensorflow.python")) and path.name != "compat.py":
                imported.append(f"{path.relative_to(PACKAGE)}: {module}")
    assert imported == []


def test_masks_are_attached_to_tensors_and_read_again() -> None:
    tensor = ops.ones((2, 3))
    assert compat.get_keras_mask(tensor) is None
    compat.set_keras_mask(tensor, mask := ops.ones((2,), "bool"))
    assert compat.get_keras_mask(tensor) is mask


def test_attributes_are_attached_to_tensors_and_read_again() -> None:
    tensor = ops.ones((2, 3))
    assert compat.get_tensor_attr(tensor, "_distill_test") is None
    compat.set_tensor_attr(tensor, "_distill_test", value := object())
    assert compat.get_tensor_attr(tensor, "_distill_test") is value


def test_the_specification_of_an_output_is_found_in_a_scratch_graph() -> None:
    seen: list[Any] = []

    def double(x: Any) -> Any:
        seen.append((compat.in_symbolic_scope(), compat.get_symbolic_scope()))
        return 2 * x

    assert compat.get_symbolic_scope() is None
    assert tuple(compat.output_spec(double, keras.KerasTensor((None, 3))).shape) == (None, 3)
    assert all(inside and scope is not None for inside, scope in seen)


def test_values_are_weighted_masked_and_reduced_as_in_compile() -> None:
    values, mask = ops.array([1.0, 2.0, 9.0]), ops.array([True, True, False])
    assert float(compat.reduce_weighted_values(values, mask=mask)) == 1.5
    assert float(compat.reduce_weighted_values(values, mask=mask, reduction="sum")) == 3.0
    assert float(compat.unscale_loss_for_distribution(ops.array(2.0))) == 2.0


def test_a_list_of_metrics_is_where_callbacks_look_for_the_better_direction() -> None:
    metric = keras.metrics.Mean(name="score")
    assert compat.direction(metric) is None
    compat.set_direction(metric, "up")
    assert compat.direction(metric) == "up"
    assert compat.direction(keras.metrics.MeanSquaredError()) == "down"

    class Model(keras.Sequential):
        @property
        def metrics(self) -> Any:
            return [compat.MetricsList([metric])]

    stopping = keras.callbacks.EarlyStopping(monitor="val_score")
    stopping.set_model(Model([keras.Input((2,)), keras.layers.Dense(1)]))
    stopping._set_monitor_op()
    assert bool(stopping._is_improvement(2.0, 1.0))


def test_models_remember_their_inputs() -> None:
    single, inputs = mlp(), {"a": keras.Input((2,), name="a")}
    assert tuple(compat.input_structure(single).shape) == (None, 6)
    assert set(compat.input_structure(keras.Model(inputs, keras.layers.Dense(1)(inputs["a"])))) == {"a"}
    assert compat.input_structure(keras.Sequential([keras.layers.Dense(1)])) is None


def test_a_compiled_loss_comes_without_regularisers_which_are_added_one_by_one() -> None:
    x, y = table(4)
    model = mlp()
    model.compile("sgd", cross_entropy())
    expected = cross_entropy()(y, model(x))
    value = compat.compiled_loss(model, ops.convert_to_tensor(y), model(x), None)
    np.testing.assert_allclose(ops.convert_to_numpy(value), ops.convert_to_numpy(expected), rtol=1e-6)
    assert float(compat.additional_loss(model, ops.array([1.0, 2.0]))) == 3.0


@pytest.mark.not_jax
def test_batches_are_counted_also_by_an_optimizer_that_scales_its_loss() -> None:
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    for optimizer in (inner, keras.optimizers.LossScaleOptimizer(inner)):
        assert compat.raw_iterations(optimizer) == (0, 2)
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.apply([ops.ones(2)], [variable])
    assert compat.raw_iterations(optimizer) == (1, 1)


@pytest.mark.tensorflow
def test_a_tape_does_not_record_untaped_operations() -> None:
    import tensorflow as tf

    variable = tf.Variable(2.0)
    with tf.GradientTape() as tape:
        with compat.untaped():
            quiet = variable * 3.0
        total = quiet + variable * 5.0
    assert tape.gradient(total, variable).numpy() == 5.0


def test_changes_of_variables_are_forgotten() -> None:
    variable = keras.Variable(1.0)
    with compat.discarded_changes():
        variable.assign(2.0)
    assert float(ops.convert_to_numpy(variable.value)) == 1.0


def test_layers_compute_in_another_precision_for_a_while() -> None:
    model = mlp()
    with compat.computed_in([model, *model.layers], "bfloat16"):
        assert keras.backend.standardize_dtype(model(table(2)[0]).dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(model(table(2)[0]).dtype) == "float32"
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}


def test_rematerialized_layers_and_their_names_are_known() -> None:
    with keras.RematScope(mode="full"):
        layer = keras.layers.Dense(2)
    assert compat.rematerialized(layer)
    assert not compat.rematerialized(keras.layers.Dense(2))


def test_sublayers_and_jit_support_are_known() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    assert compat.sublayers_of(model) == model.layers
    assert compat.model_supports_jit(model)
    model.layers[0].supports_jit = False
    assert not compat.model_supports_jit(model)


def test_compiled_metrics_are_known_before_keras_builds_them() -> None:
    model, own, weighted = mlp(), keras.metrics.MeanSquaredError(), keras.metrics.MeanAbsoluteError()
    assert compat.compiled_metrics(model) == []
    model.compile("sgd", cross_entropy(), metrics=["accuracy", own], weighted_metrics=[weighted])
    assert compat.compiled_metrics(model) == ["accuracy", own, weighted]


@pytest.mark.tensorflow
def test_variables_of_optimizer_and_metrics_are_created_ahead_and_mistakes_are_left_to_the_step() -> None:
    model, (x, y) = mlp(), table(4)
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    compat.create_variables(model, (x[:, :1], y))  # the model expects more inputs
    assert not model.optimizer.built
    compat.create_variables(model, (x, y))
    assert model.optimizer.built
    count = len(model.variables), len(model.optimizer.variables), len(model.metrics_variables)
    model.fit(x, y, verbose=0)
    assert (len(model.variables), len(model.optimizer.variables), len(model.metrics_variables)) == count
