"""Saving and loading models, students and settings (K22 to K24)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, mlp, table

from keras_distill import (
    DistillationScheduler,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    StudentCheckpoint,
)

BIG = 256


def teacher_of(width: int = 12) -> keras.Model:
    """The same teacher each time."""
    keras.utils.set_random_seed(11)
    return mlp(width, name="teacher")


def distilled(adapter: bool = True, **settings: Any) -> DistillModel:
    teacher = teacher_of(12 if adapter else 8)
    keras.utils.set_random_seed(5)
    terms = [
        LogitsDistillation(SoftTargetLoss(temperature=2.5), weight=0.5),
        FeatureDistillation("hidden", "hidden", weight=0.4),
    ]
    model = DistillModel(mlp(8), teacher, terms, task_weight=0.7, **settings)
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), metrics=["accuracy"], jit_compile=False)
    return model


def fitted(model: DistillModel, epochs: int = 1, **settings: Any) -> dict[str, list[float]]:
    history = model.fit(*table(16), 8, epochs, shuffle=False, verbose=0, **settings)
    return history.history


def loaded(path: Path | str) -> Any:
    """The model in a file; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # what NumPy says about Keras' variables, here as in pyproject.toml
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return keras.models.load_model(path)


@pytest.mark.parametrize("adapter", [True, False])
def test_k22_a_loaded_model_continues_exactly(tmp_path: Path, adapter: bool) -> None:
    """K22: two epochs equal one epoch, save, load, another epoch; weights, optimizer and logs."""
    straight, first = distilled(adapter), distilled(adapter)
    straight_logs = fitted(straight, 2)
    fitted(first)
    first.save(tmp_path / "model.keras")
    second = loaded(tmp_path / "model.keras")
    assert second.teacher is None
    assert int(second.optimizer.iterations) == 2
    restored, before = second.optimizer.variables, first.optimizer.variables
    assert len(restored) == len(before) > 2 * len(first.student.weights)
    for value, saved in zip(restored, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(value), ops.convert_to_numpy(saved))
    second.teacher = teacher_of(12 if adapter else 8)
    logs = fitted(second, 2, initial_epoch=1)
    assert_same_weights(second, straight, 1e-6)
    assert_same_logs(logs, {key: values[1:] for key, values in straight_logs.items()}, 1e-5)


def test_k22_adapters_come_back_without_a_teacher(tmp_path: Path) -> None:
    """K22: their weights are there before any data is."""
    model = distilled()
    fitted(model)
    model.save(tmp_path / "model.keras")
    [adapter] = loaded(tmp_path / "model.keras").terms[1].adapters
    for value, expected in zip(adapter.get_weights(), model.terms[1].adapters[0].get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_k22_the_weights_of_a_file_fit_a_new_model(tmp_path: Path) -> None:
    """K22: `save_weights` and `load_weights`, settings that a schedule has changed included."""
    model = distilled()
    fitted(model, callbacks=[DistillationScheduler("temperature", lambda epoch: 7.0)])
    model.save_weights(tmp_path / "model.weights.h5")
    other = distilled()
    fitted(other)  # Keras itself wants an optimizer that has been used
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(other, model, 0.0)
    assert float(other.terms[0].temperature) == 7.0


def test_k22_the_weights_of_a_file_fit_a_model_that_has_been_called(tmp_path: Path) -> None:
    """K22: a call by hand makes the student's weights and the adapters, before any training."""

    def unbuilt() -> DistillModel:
        layers = [keras.layers.Dense(8, name="hidden"), keras.layers.Dense(3)]
        return DistillModel(keras.Sequential(layers), teacher_of(), FeatureDistillation("hidden", "hidden"))

    inputs, _ = table(4)
    first, second = unbuilt(), unbuilt()
    for model in (first, second):
        model(inputs)
        assert len(model.trainable_weights) == 6
    first.terms[0].adapters[0].kernel.assign_add(ops.ones((8, 12)))
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(second, first, 0.0)


def test_k22_settings_that_were_changed_come_back(tmp_path: Path) -> None:
    """K22: weights, temperature and the task's weight as they were when the model was saved."""
    model = distilled()
    fitted(model)  # Keras itself warns of an optimizer that was saved before it was used
    model.terms[0].temperature, model.terms[1].weight, model.task_weight = 0.7, 0.3, 0.1
    model.save(tmp_path / "model.keras")
    back = loaded(tmp_path / "model.keras")
    config = back.get_config()
    assert config["task_weight"] == 0.1
    assert config["terms"][1]["config"]["weight"] == 0.3
    assert float(back.terms[0].temperature) == pytest.approx(0.7)
    assert back.terms[0].loss.temperature is back.terms[0].temperature


@keras.saving.register_keras_serializable(package="tests")
class Unbuilt(keras.Model):
    """A subclassed student that knows its inputs only when it is called."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, name="hidden")
        self.logits = keras.layers.Dense(3, name="logits")

    def call(self, inputs: Any) -> Any:
        return self.logits(self.hidden(inputs))


@pytest.mark.parametrize("kind", ["subclassed", "sequential"])
def test_k22_a_student_that_was_built_by_its_data_continues_too(tmp_path: Path, kind: str) -> None:
    """K22 for a subclassed student and a Sequential without an input."""

    def model() -> DistillModel:
        teacher = teacher_of()  # and the same seed for the student's layers
        layers = [keras.layers.Dense(8, name="hidden"), keras.layers.Dense(3)]
        student = Unbuilt() if kind == "subclassed" else keras.Sequential(layers)
        made = DistillModel(student, teacher, [FeatureDistillation("hidden", "hidden")])
        made.compile(keras.optimizers.Adam(0.01), cross_entropy(), jit_compile=False)
        return made

    straight = model()
    straight_logs = fitted(straight, 2)
    first = model()
    fitted(first)
    first.save(tmp_path / "model.keras")
    second = loaded(tmp_path / "model.keras")
    second.teacher = teacher_of()
    logs = fitted(second, 2, initial_epoch=1)
    assert_same_logs(logs, {key: values[1:] for key, values in straight_logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)


def test_k22_a_layer_of_a_nested_model_is_found_again(tmp_path: Path) -> None:
    """K22: a term that was given the layer itself, whose name is not unique, reads the same layer after loading."""

    def block(name: str, width: int) -> keras.Model:
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(width, name="dense")(inputs), name=name)

    def nested(name: str) -> keras.Model:
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(3)(block("second", 6)(block("first", 6)(inputs))), name=name)

    student, teacher = nested("student"), nested("teacher")
    student_layer, teacher_layer = (model.get_layer("second").get_layer("dense") for model in (student, teacher))
    model = DistillModel(student, teacher, [FeatureDistillation(student_layer, teacher_layer)])
    model.compile("sgd", cross_entropy(), jit_compile=False)
    model.save(tmp_path / "model.keras")
    back = loaded(tmp_path / "model.keras")
    back.teacher = teacher
    inputs, labels = table(8)
    expected = model.evaluate(inputs, labels, verbose=0, return_dict=True)
    assert back.evaluate(inputs, labels, verbose=0, return_dict=True) == pytest.approx(expected)


class Failing(keras.callbacks.Callback):
    """Raises when an epoch begins."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", [True, False])
def test_k22_backup_and_restore_continues_after_an_exception(tmp_path: Path, adapter: bool) -> None:
    """K22: what was interrupted in the third epoch ends as what was not."""
    straight = distilled(adapter)
    fitted(straight, 4)
    backup = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        fitted(distilled(adapter), 4, callbacks=[keras.callbacks.BackupAndRestore(backup), Failing()])
    resumed = distilled(adapter)
    logs = fitted(resumed, 4, callbacks=[keras.callbacks.BackupAndRestore(backup)])
    assert len(logs["loss"]) == 2
    assert_same_weights(resumed, straight, 1e-6)


def contents(path: Path) -> tuple[list[str], str]:
    """Every entry of a Keras file, those of its weights included, and its configuration."""
    entries: list[str] = []
    with zipfile.ZipFile(path) as archive:
        entries += archive.namelist()
        with archive.open("model.weights.h5") as weights, h5py.File(weights) as file:
            file.visit(entries.append)
        return entries, archive.read("config.json").decode()


def test_k23_no_file_holds_the_teacher(tmp_path: Path) -> None:
    """K23: neither its weights, nor its configuration, in a whole model and in weights alone."""
    keras.utils.set_random_seed(0)
    model = DistillModel(mlp(4), mlp(BIG, name="teacher"), [LogitsDistillation()])
    model.compile("sgd", cross_entropy(), jit_compile=False)
    fitted(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    entries, config = contents(tmp_path / "model.keras")
    assert not [entry for entry in entries if "teacher" in entry.lower() and "agreement" not in entry]
    assert json.loads(config)["config"]["teacher"] is None
    # as a number of its own: the digits of the addresses that Keras writes may contain it
    assert not re.search(rf"\b{BIG}\b", config)
    with h5py.File(tmp_path / "model.weights.h5") as file:
        sizes: list[int] = []
        file.visititems(lambda name, node: sizes.append(node.size) if isinstance(node, h5py.Dataset) else None)
    assert sizes
    assert max(sizes) < BIG
    model.student.save(tmp_path / "student.keras")
    bytes_of_teacher = 4 * model.teacher.count_params()
    without = (tmp_path / "model.keras").stat().st_size
    model.save_teacher = True
    model.save(tmp_path / "both.keras")
    assert (tmp_path / "both.keras").stat().st_size - without > 0.8 * bytes_of_teacher


def test_k23_the_teacher_is_not_part_of_the_model() -> None:
    """K23: neither among the layers, nor the weights, nor the parameters."""
    model = distilled()
    of_teacher = {id(variable) for variable in model.teacher.variables}
    assert not of_teacher & {id(variable) for variable in model.variables}
    assert model.teacher not in list(model._flatten_layers())
    own = sum(state.count_params() for state in model.term_states)
    assert model.count_params() - model.student.count_params() - own <= 1  # the task's weight


@pytest.mark.parametrize("start", ["built with it", "set later"])
def test_k23_save_teacher_keeps_the_teacher(tmp_path: Path, start: str) -> None:
    """K23: the loaded model has its teacher, and trains on without being given one."""
    straight, first = distilled(), distilled(save_teacher=True)
    if start == "set later":
        first = distilled()
        first.save_teacher = True
    straight_logs = fitted(straight, 2)
    fitted(first)
    first.save(tmp_path / "model.keras")
    second = loaded(tmp_path / "model.keras")
    assert_same_weights(second.teacher, first.teacher, 0.0)
    assert second.save_teacher
    assert len(second.trainable_variables) == len(first.trainable_variables)
    logs = fitted(second, 2, initial_epoch=1)
    assert_same_logs(logs, {key: values[1:] for key, values in straight_logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)
    second.save(tmp_path / "again.keras")
    assert_same_weights(loaded(tmp_path / "again.keras").teacher, first.teacher, 0.0)


LOADER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras_distill":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import warnings
import numpy as np
import keras
warnings.simplefilter("error")  # not before: old packages that Keras imports warn of each other
warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
inputs = np.load("inputs.npy")
np.save("outputs.npy", [keras.models.load_model(name).predict(inputs, verbose=0) for name in sys.argv[1:]])
"""


def test_k24_the_student_loads_without_this_package(tmp_path: Path) -> None:
    """K24: in another process, in which importing keras_distill raises; by hand and by StudentCheckpoint."""
    model = distilled()
    checkpoint = StudentCheckpoint(str(tmp_path / "checkpoint.keras"))
    fitted(model, callbacks=[checkpoint])
    model.student.save(tmp_path / "student.keras")
    inputs, _ = table(4)
    np.save(tmp_path / "inputs.npy", inputs)
    expected = model.predict(inputs, verbose=0)
    command = [sys.executable, "-c", LOADER, "student.keras", "checkpoint.keras"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=os.environ, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for outputs in np.load(tmp_path / "outputs.npy"):
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_k24_the_students_file_is_that_of_a_plain_student(tmp_path: Path) -> None:
    """K24: the same entries and the same configuration, but for the numbers."""
    plain = mlp(8)
    plain.save(tmp_path / "plain.keras")
    model = distilled()
    fitted(model, callbacks=[StudentCheckpoint(str(tmp_path / "student.keras"))])
    entries, config = contents(tmp_path / "student.keras")
    assert "keras_distill" not in config
    expected, _ = contents(tmp_path / "plain.keras")
    assert entries == expected
    assert not [name for layer in model.student.layers for name in vars(layer) if "distill" in name]


@pytest.mark.tensorflow
def test_k24_an_export_is_that_of_the_student(tmp_path: Path) -> None:
    """K24: `model.export` writes what serves predictions, in the precision and the structure of the inputs."""
    import tensorflow as tf

    model = distilled()
    model.export(tmp_path / "served", verbose=False)
    inputs, _ = table(4)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(inputs), model.predict(inputs, verbose=0), rtol=1e-5, atol=1e-6)
