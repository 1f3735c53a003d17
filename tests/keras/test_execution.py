"""How a step is run: compiled, several at once, eagerly, on two devices, in half precision, quantised (K16 to K21)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import keras
import keras_two_devices
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, mlp, table

from keras_distill import (
    AttentionTransferLoss,
    DistillationScheduler,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
)

ROOT = Path(__file__).parents[2]


def distilled(student: keras.Model | None = None, teacher: keras.Model | None = None, **settings: Any) -> DistillModel:
    """The same model each time: logits, a feature with an adapter, and labels; compiled if wanted."""
    keras.utils.set_random_seed(5)
    student = mlp(8, dropout=settings.pop("dropout", 0.0)) if student is None else student
    teacher = mlp(12, name="teacher") if teacher is None else teacher
    terms = [LogitsDistillation(weight=0.5), FeatureDistillation("hidden", "hidden", weight=0.4)]
    model = DistillModel(student, teacher, terms, task_weight=0.7)
    settings = {"jit_compile": False, **settings}  # XLA takes ten times as long to compile such a step as to run it
    model.compile(settings.pop("optimizer", None) or keras.optimizers.SGD(0.1), cross_entropy(), **settings)
    return model


def fitted(model: DistillModel, epochs: int = 2, batch: int = 8, **settings: Any) -> dict[str, list[float]]:
    inputs, labels = table(32)
    weights = np.linspace(0.5, 1.5, 32, dtype="float32")
    fit = model.fit(inputs, labels, batch, epochs, sample_weight=weights, shuffle=False, verbose=0, **settings)
    return fit.history


WAYS = [
    pytest.param({"jit_compile": True, "steps_per_execution": 4}, marks=pytest.mark.tensorflow, id="jit, 4 steps"),
    pytest.param({"steps_per_execution": 3}, marks=pytest.mark.tensorflow, id="3 steps"),  # Keras refuses it on torch
    pytest.param({"run_eagerly": True}, id="eager"),
]


@pytest.mark.parametrize("way", WAYS)
def test_k16_every_way_to_execute_ends_in_the_same_weights_and_logs(way: dict[str, Any]) -> None:
    """K16, with sample weights, an adapter and validation."""
    inputs, labels = table(8, seed=1)
    dropout = 0.0 if way.get("jit_compile") else 0.3  # XLA draws other random numbers from the same seed
    usual, other = distilled(dropout=dropout), distilled(dropout=dropout, **way)
    expected = fitted(usual, validation_data=(inputs, labels))
    assert_same_logs(fitted(other, validation_data=(inputs, labels)), expected)
    assert_same_weights(other, usual)
    assert len(usual.get_weights()) > len(usual.student.get_weights())  # the adapter's are among them


class CountingModel(DistillModel):
    """A DistillModel that counts the calls of ``train_step``, of which a compiled step has one for each trace."""

    calls = 0

    def train_step(self, *args: Any) -> Any:
        self.calls += 1
        return super().train_step(*args)


def test_the_first_step_creates_no_variables_so_that_tensorflow_traces_it_once() -> None:
    model = CountingModel(mlp(8), mlp(12, name="teacher"), FeatureDistillation("hidden", "hidden"))
    model.compile("adam", cross_entropy(), metrics=["accuracy"], jit_compile=False)
    model.fit(*table(8), batch_size=8, verbose=0)  # one batch
    assert model.calls == 1


@pytest.mark.tensorflow
@pytest.mark.parametrize("way", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_k16_convolutions_and_batch_norm_too(way: dict[str, Any]) -> None:
    """K16 with feature maps of another size, batch statistics and a loss that has no adapter."""

    def convolutional(filters: int, stride: int, name: str) -> keras.Model:
        inputs = keras.Input((8, 8, 2))
        maps = keras.layers.Conv2D(filters, 3, stride, padding="same", name="maps")(inputs)
        pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization(name="norm")(maps))
        return keras.Model(inputs, keras.layers.Dense(3)(pooled), name=name)

    def run(**settings: Any) -> DistillModel:
        keras.utils.set_random_seed(5)
        terms = [
            FeatureDistillation("norm", "norm", weight=0.2),
            FeatureDistillation("maps", "maps", AttentionTransferLoss(), weight=3.0),
        ]
        model = DistillModel(convolutional(3, 2, "student"), convolutional(5, 1, "teacher"), terms)
        model.compile(keras.optimizers.SGD(0.1), cross_entropy(), **settings)
        images = np.random.default_rng(0).normal(size=(16, 8, 8, 2)).astype("float32")
        model.fit(images, np.arange(16) % 3, 4, 2, shuffle=False, verbose=0)
        return model

    assert_same_weights(run(**way), run(jit_compile=False))


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the script with two logical devices."""
    path = tmp_path_factory.mktemp("devices") / "report.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, keras_two_devices.__file__, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    return report


@pytest.mark.tensorflow
@pytest.mark.parametrize("case", ["plain", "weighted", "string"])
def test_k17_two_devices_equal_one(devices: dict[str, Any], case: str) -> None:
    """K17: weights, logs of training and validation, and `evaluate`; with an adapter, regularisers, sample weights."""
    single, double = devices[case]["one"], devices[case]["two"]
    assert {"logits_loss", "hidden_loss", "gap_loss", "val_teacher_agreement", "val_loss"} <= single["history"].keys()
    assert_same_logs(double["history"], single["history"])
    assert_same_logs(double["evaluated"], single["evaluated"])
    for value, expected in zip(single["weights"], double["weights"], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.tensorflow
def test_k17_the_loss_of_two_devices_is_the_sum_of_its_parts(devices: dict[str, Any]) -> None:
    """K17: a part that counted twice would show."""
    logs = {key: values[0] for key, values in devices["plain"]["two"]["history"].items()}
    parts = 0.5 * logs["logits_loss"] + 0.3 * logs["hidden_loss"] + 0.1 * logs["gap_loss"]
    assert logs["distillation_loss"] == pytest.approx(parts, rel=1e-5)
    without_regularizers = 0.7 * logs["task_loss"] + parts
    assert without_regularizers < logs["loss"]


def test_k18_accumulated_gradients_equal_a_large_batch() -> None:
    """K18: two steps of 16 with `gradient_accumulation_steps=2` equal one of 32, adapters included."""
    accumulating = distilled(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    large = distilled()
    before = accumulating.get_weights()
    fitted(accumulating, batch=16, epochs=3)
    fitted(large, batch=32, epochs=3)
    assert_same_weights(accumulating, large, 1e-5)
    changed = [not np.allclose(old, new) for old, new in zip(before, accumulating.get_weights(), strict=True)]
    assert sum(changed) == len(large.trainable_variables)


@pytest.fixture
def half() -> keras.Model:
    """A student in mixed float16."""
    keras.config.set_dtype_policy("mixed_float16")
    student = mlp(8)
    keras.config.set_dtype_policy("float32")
    return student


def test_k19_a_mixed_float16_student_has_its_loss_scaled(half: keras.Model) -> None:
    """K19, although the teacher and the default policy are float32."""
    model = distilled(student=half)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = half.get_weights()
    logs = fitted(model)
    assert np.isfinite([value for values in logs.values() for value in values]).all()
    assert all(not np.array_equal(old, new) for old, new in zip(before, half.get_weights(), strict=True))
    assert not isinstance(distilled().optimizer, keras.optimizers.LossScaleOptimizer)


def test_k19_distillation_is_computed_in_float32(half: keras.Model) -> None:
    """K19: the logged losses equal float64 numbers to far better than float16 could."""
    model = distilled(student=half)
    inputs, labels = table(16)
    logs = model.evaluate(inputs, labels, 16, verbose=0, return_dict=True)
    student = np.asarray(half.predict(inputs, verbose=0), "float64")
    teacher = np.asarray(model.teacher.predict(inputs, verbose=0), "float64")
    assert half(inputs).dtype != model.teacher(inputs).dtype
    log_student, log_teacher = (z / 4 - np.log(np.exp(z / 4).sum(-1, keepdims=True)) for z in (student, teacher))
    expected = 16 * (np.exp(log_teacher) * (log_teacher - log_student)).sum(-1).mean()
    assert logs["logits_loss"] == pytest.approx(expected, rel=2e-5)
    feature = keras.Model(half.input, half.get_layer("hidden").output).predict(inputs, verbose=0)
    target = keras.Model(model.teacher.input, model.teacher.get_layer("hidden").output).predict(inputs, verbose=0)
    kernel, bias = (np.asarray(weight, "float64") for weight in model.terms[1].adapters[0].get_weights())
    mapped = feature.astype("float64") @ kernel + bias
    assert logs["hidden_loss"] == pytest.approx(((mapped - target) ** 2).mean(), rel=2e-5)


@pytest.mark.parametrize("width", [8, 12])
def test_k19_activations_of_ten_thousand_stay_finite(width: int) -> None:
    """K19, with an adapter (width 8) and without: float16 cannot hold the square of 1e4."""
    keras.config.set_dtype_policy("mixed_float16")
    half = mlp(width)
    keras.config.set_dtype_policy("float32")
    large = half.get_layer("hidden")
    large.set_weights([large.get_weights()[0], np.full(width, 1e4, "float32")])
    model = distilled(student=half, optimizer=keras.optimizers.SGD(1e-9))
    logs = fitted(model)
    assert logs["hidden_loss"][0] > 1e6
    assert np.isfinite([value for values in logs.values() for value in values]).all()
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


class Counting(keras.layers.Layer):
    """Passes its input on, and counts how often Python runs it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = 0

    def call(self, inputs: Any) -> Any:
        self.calls += 1
        return inputs


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", [True, False])
def test_k20_a_schedule_changes_the_loss_without_a_new_trace(jit: bool) -> None:
    """K20: the temperature of the logits, the weights of the terms and of the task."""
    inputs = keras.Input((6,))
    counting = Counting()
    hidden = counting(keras.layers.Dense(8, name="hidden")(inputs))
    model = distilled(keras.Model(inputs, keras.layers.Dense(3)(hidden)), jit_compile=jit)
    schedules = [
        DistillationScheduler("temperature", lambda epoch: 4.0 - epoch),
        DistillationScheduler("weight", lambda epoch: 0.5 + epoch, term="hidden"),
        DistillationScheduler("weight", lambda epoch, before: before * 0.5, term="logits"),
        DistillationScheduler("task_weight", lambda epoch: 1.0 - 0.25 * epoch),
    ]
    data = table(32)
    validation = table(8)
    model.fit(*data, 8, epochs=1, callbacks=schedules, validation_data=validation, verbose=0)
    calls = counting.calls
    logs = model.fit(
        *data, 8, epochs=4, initial_epoch=1, callbacks=schedules, validation_data=validation, verbose=0
    ).history
    assert counting.calls == calls
    assert logs["logits_temperature"] == [3.0, 2.0, 1.0]
    assert logs["hidden_weight"] == [1.5, 2.5, 3.5]
    assert logs["logits_weight"] == [0.125, 0.0625, 0.03125]
    assert logs["task_weight"] == [0.75, 0.5, 0.25]


def test_k20_the_scheduled_values_are_those_that_training_uses() -> None:
    """K20: the loss is the sum of its parts at the epoch's weights, and the divergence is that at its temperature."""
    model = distilled(optimizer=keras.optimizers.SGD(0.0))
    temperatures = [1.0, 2.0, 8.0]
    schedules = [
        DistillationScheduler("temperature", lambda epoch: temperatures[epoch]),
        DistillationScheduler("weight", lambda epoch: 0.5 + epoch, term="hidden"),
        DistillationScheduler("task_weight", lambda epoch: 1.0 - 0.5 * epoch),
    ]
    inputs, labels = table(32)
    logs = model.fit(inputs, labels, 32, 3, callbacks=schedules, shuffle=False, verbose=0).history
    teacher, student = (ops.stop_gradient(network(inputs)) for network in (model.teacher, model.student))
    for epoch, temperature in enumerate(temperatures):
        expected = float(SoftTargetLoss(temperature=temperature)(teacher, student))
        assert logs["logits_loss"][epoch] == pytest.approx(expected, rel=1e-4)
        parts = 0.5 * logs["logits_loss"][epoch] + (0.5 + epoch) * logs["hidden_loss"][epoch]
        assert logs["distillation_loss"][epoch] == pytest.approx(parts, rel=1e-5)
        total = parts + (1.0 - 0.5 * epoch) * logs["task_loss"][epoch]
        assert logs["loss"][epoch] == pytest.approx(total, rel=1e-5)


def test_k21_a_quantised_teacher_is_tapped() -> None:
    """K21: the feature is that of the int8 layer, which Keras runs by another method."""
    teacher = mlp(12, name="teacher")
    inputs, labels = table(16)
    plain = np.asarray(ops.convert_to_numpy(teacher(inputs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras says that neither the input nor the model itself is quantised
        teacher.quantize("int8")
    assert teacher.get_layer("hidden").quantization_mode == "int8"
    model = distilled(teacher=teacher)
    targets = model.teacher_targets(ops.convert_to_tensor(inputs), labels).teacher
    layer = keras.Model(teacher.input, teacher.get_layer("hidden").output)
    expected = ops.convert_to_numpy(layer(inputs))
    np.testing.assert_allclose(ops.convert_to_numpy(targets["features"]["hidden"]), expected, rtol=1e-5)
    assert not np.array_equal(plain, ops.convert_to_numpy(targets["output"]))
    before = teacher.get_weights()
    logs = fitted(model)
    assert logs["hidden_loss"][-1] < logs["hidden_loss"][0]
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_k21_a_student_with_lora_trains_its_small_matrices_alone() -> None:
    """K21, with a tap on the layer that has LoRA."""
    student = mlp(8)
    hidden = student.get_layer("hidden")
    hidden.enable_lora(2)
    kernel = ops.convert_to_numpy(hidden._kernel).copy()
    first, second = (ops.convert_to_numpy(part).copy() for part in (hidden.lora_kernel_a, hidden.lora_kernel_b))
    logs = fitted(distilled(student=student))
    assert logs["hidden_loss"][-1] < logs["hidden_loss"][0]
    np.testing.assert_array_equal(kernel, ops.convert_to_numpy(hidden._kernel))
    assert not np.array_equal(first, ops.convert_to_numpy(hidden.lora_kernel_a))
    assert not np.array_equal(second, ops.convert_to_numpy(hidden.lora_kernel_b))


def test_k21_a_frozen_layer_of_the_student_stays() -> None:
    """K21: what is frozen keeps its weights, the rest and the adapter on the frozen layer learn."""
    student = mlp(8)
    student.get_layer("hidden").trainable = False
    frozen, free = student.get_layer("hidden").get_weights(), student.get_layer("logits").get_weights()
    model = distilled(student=student)
    adapter = model.terms[1].adapters[0]
    before = adapter.get_weights()
    fitted(model)
    for old, new in zip(frozen, student.get_layer("hidden").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for layer, weights in ((student.get_layer("logits"), free), (adapter, before)):
        assert all(not np.array_equal(old, new) for old, new in zip(weights, layer.get_weights(), strict=True))


class Projection(keras.layers.Layer):
    """A dense layer that takes no `training`, which TensorFlow cannot rematerialise in a graph."""

    def __init__(self, units: int, activation: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.activation = units, activation

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, inputs: Any) -> Any:
        return self.activation(ops.matmul(inputs, self.kernel))


@pytest.mark.parametrize("mode", ["full", "activations"])
@pytest.mark.parametrize("way", [{}, {"run_eagerly": True}], ids=str)
def test_k21_a_rematerialised_layer_is_tapped(mode: str, way: dict[str, Any]) -> None:
    """K21: recomputing a tapped layer in the backward pass changes neither feature nor weights."""
    calls = {"plain": 0, "recomputed": 0}

    def student(kind: str) -> keras.Model:
        def counted(inputs: Any) -> Any:
            calls[kind] += 1
            return ops.tanh(inputs)

        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        with keras.RematScope(mode=mode if kind == "recomputed" else None):
            hidden = Projection(8, counted, name="hidden")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden))

    usual, remat = distilled(student=student("plain"), **way), distilled(student=student("recomputed"), **way)
    assert_same_logs(fitted(remat), fitted(usual))
    assert_same_weights(remat, usual)
    if keras.backend.backend() != "jax":  # it recomputes what it has traced, without another call
        assert calls["recomputed"] > calls["plain"]
