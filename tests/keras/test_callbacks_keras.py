"""Keras' own callbacks with DistillModel, and the checkpoint of the student alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import callbacks, ops

from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, StudentCheckpoint

X, Y = nets.table(16)
HELD_OUT = nets.table(8, seed=1)


def distilled(*, rate: float = 0.1, run_eagerly: bool = True) -> DistillModel:
    """A student with a larger teacher, so that the term "hidden" has an adapter."""
    terms = [LogitsDistillation(), FeatureDistillation("hidden", "hidden")]
    model = DistillModel(nets.mlp(), nets.mlp(12, name="teacher"), terms)
    model.compile(keras.optimizers.SGD(rate), nets.cross_entropy(), metrics=["accuracy"], run_eagerly=run_eagerly)
    return model


def fitted(model: keras.Model, *made: callbacks.Callback, epochs: int = 3, **settings: Any) -> dict[str, list[float]]:
    settings = {"validation_data": HELD_OUT, "batch_size": 8, "shuffle": False, "verbose": 0, **settings}
    return model.fit(X, Y, epochs=epochs, callbacks=[*made], **settings).history


class Watch(callbacks.Callback):
    """All weights, and the student's, at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[list[Any]] = []
        self.students: list[list[Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.all.append(self.model.get_weights())
        self.students.append(getattr(self.model, "student", self.model).get_weights())


def worse_after(epoch: int) -> callbacks.Callback:
    """Steps that learn until an epoch, and far too large ones from then on."""
    return callbacks.LearningRateScheduler(lambda now: 0.1 if now < epoch else 50.0)


def same(first: list[Any], second: list[Any]) -> bool:
    return all(np.array_equal(value, other) for value, other in zip(first, second, strict=True))


# Keras' callbacks -----------------------------------------------------------------------------------------------------


def test_early_stopping_restores_the_best_epoch() -> None:
    """The student and the adapter are those of the lowest validation loss, and no epoch runs in vain."""
    model, watch = distilled(run_eagerly=False), Watch()
    stop = callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    logs = fitted(model, worse_after(2), watch, stop, epochs=6)
    assert int(np.argmin(logs["val_loss"])) == 1
    assert len(logs["val_loss"]) == 3
    assert same(model.get_weights(), watch.all[1])
    assert same(model.student.get_weights(), watch.students[1])
    assert not same(watch.students[1], watch.students[2])


FALLING = ("val_loss", "loss", "val_task_loss", "val_distillation_loss", "val_logits_loss", "val_hidden_loss")
RISING = ("val_teacher_agreement", "teacher_agreement", "val_accuracy")


@pytest.mark.parametrize("kind", ["EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint", "StudentCheckpoint"])
def test_mode_auto_finds_the_better_direction(kind: str, tmp_path: Path) -> None:
    """Losses fall and agreement rises, with and without val_, for each callback that monitors one of the logs."""
    model = distilled()
    model.train_on_batch(X, Y)
    for monitor in (*FALLING, *RISING):
        path = str(tmp_path / f"{monitor}.keras")
        own = {"filepath": path, "save_best_only": True} if kind.endswith("Checkpoint") else {}
        callback = {**vars(callbacks), "StudentCheckpoint": StudentCheckpoint}[kind](monitor=monitor, **own)
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        callback.on_epoch_end(0, {monitor: 0.5})
        assert callback.monitor_op is (ops.less if monitor in FALLING else ops.greater), monitor


def test_a_model_checkpoint_keeps_the_best_model(tmp_path: Path) -> None:
    """The file holds the weights of the epoch with the lowest divergence from the teacher, adapter and all."""
    model, watch, path = distilled(), Watch(), tmp_path / "best.keras"
    keep = callbacks.ModelCheckpoint(path, "val_logits_loss", mode="min", save_best_only=True)
    logs = fitted(model, worse_after(2), watch, keep)
    best = int(np.argmin(logs["val_logits_loss"]))
    assert best < 2
    back = keras.saving.load_model(path)
    assert isinstance(back, DistillModel)
    assert same(back.student.get_weights(), watch.students[best])
    back.teacher = model.teacher
    again = back.evaluate(*HELD_OUT, verbose=0, return_dict=True)
    assert again == pytest.approx({key: logs[f"val_{key}"][best] for key in again}, rel=1e-5)


def test_a_student_checkpoint_saves_the_weights_of_the_batch(tmp_path: Path) -> None:
    """Also in the middle of an epoch, where JAX holds the weights outside of the student."""
    weights: list[list[Any]] = []

    class Weights(callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            weights.append(self.model.student.get_weights())

    keep = StudentCheckpoint(str(tmp_path / "{epoch}_{batch}.keras"), monitor="loss", save_freq=1)
    fitted(distilled(), keep, Weights(), epochs=2)
    names = [f"{epoch}_{batch}.keras" for epoch in (1, 2) for batch in (1, 2)]
    saved = [keras.saving.load_model(tmp_path / name).get_weights() for name in names]
    assert all(same(*pair) for pair in zip(saved, weights, strict=True))
    assert not same(saved[0], saved[1])


def test_reduce_lr_on_plateau_lowers_the_rate() -> None:
    """Where the validation loss does not fall by 10 the rate is halved after each epoch but the first."""
    rate = 0.001
    plateau = callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=10.0)
    logs = fitted(distilled(rate=rate), plateau, epochs=4)
    assert logs["learning_rate"] == pytest.approx([rate, rate, rate / 2, rate / 4])


def test_a_learning_rate_scheduler_sets_the_step() -> None:
    """At rate 0 the second epoch changes nothing; the rate is logged."""
    watch = Watch()
    rates = [0.1, 0.0, 0.05]
    logs = fitted(distilled(), callbacks.LearningRateScheduler(lambda epoch: rates[epoch]), watch)
    assert logs["learning_rate"] == pytest.approx(rates)
    assert same(watch.all[0], watch.all[1])
    assert not same(watch.all[1], watch.all[2])


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_terminate_on_nan_stops_at_the_batch(run_eagerly: bool) -> None:
    """An overflow in the second batch of four ends the training there."""
    inputs = X.copy()
    inputs[5] = 3e38
    model = distilled(run_eagerly=run_eagerly)
    model.fit(inputs, Y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=[callbacks.TerminateOnNaN()])
    assert int(model.optimizer.iterations) == 2


def test_a_csv_logger_writes_every_part_of_the_loss(tmp_path: Path) -> None:
    """A column for each key of the history, a row for each epoch; a second training is appended."""
    path, model = tmp_path / "log.csv", distilled()
    logs = fitted(model, callbacks.CSVLogger(path), epochs=2)
    more = fitted(model, callbacks.CSVLogger(path, append=True), epochs=3, initial_epoch=2)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"epoch", *logs}
    assert {"task_loss", "distillation_loss", "logits_loss", "hidden_loss", "val_teacher_agreement"} <= logs.keys()
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for key in logs:
        assert [float(row[key]) for row in rows] == pytest.approx(logs[key] + more[key]), key


def test_tensorboard_draws_every_part_of_the_loss(tmp_path: Path) -> None:
    """Curves of the terms in training and validation, and histograms of the student's weights."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    logs = fitted(distilled(), callbacks.TensorBoard(tmp_path, histogram_freq=1), epochs=2)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        for key in ("loss", "task_loss", "logits_loss", "hidden_loss", "teacher_agreement"):
            drawn = [float(tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors(f"epoch_{key}")]
            assert drawn == pytest.approx(logs[prefix + key], rel=1e-6), key
    tags = EventAccumulator(str(tmp_path / "train")).Reload().Tags()["tensors"]
    assert any("histogram" in tag for tag in tags)


# The student's checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["val_loss", "val_teacher_agreement", "val_accuracy"])
def test_the_best_student_is_in_a_plain_file(monitor: str, tmp_path: Path) -> None:
    """StudentCheckpoint: of the best epoch, of no class of this package, and beside other callbacks."""
    model, watch, path = distilled(run_eagerly=monitor != "val_loss"), Watch(), tmp_path / "folder" / "student.keras"
    keep = StudentCheckpoint(path, monitor, save_best_only=True)
    logs = fitted(model, worse_after(2), keep, watch, callbacks.EarlyStopping("loss", patience=1), epochs=5)
    best = int(np.argmin(logs[monitor]) if monitor == "val_loss" else np.argmax(logs[monitor]))
    back = keras.saving.load_model(path)
    assert type(back) is type(model.student)
    assert back.name == model.student.name
    assert same(back.get_weights(), watch.students[best])
    if monitor == "val_loss":
        assert not same(back.get_weights(), model.student.get_weights())


def test_every_student_is_kept_under_a_name_of_its_own(tmp_path: Path) -> None:
    """StudentCheckpoint: epoch and logs stand in the name; weights alone are the student's alone."""
    model, watch = distilled(), Watch()
    keep = StudentCheckpoint(tmp_path / "{epoch}-{val_logits_loss:.3f}.weights.h5", save_weights_only=True)
    logs = fitted(model, keep, watch, epochs=2)
    for epoch in range(2):
        student = nets.mlp()
        student.load_weights(tmp_path / f"{epoch + 1}-{logs['val_logits_loss'][epoch]:.3f}.weights.h5")
        assert same(student.get_weights(), watch.students[epoch])


def test_a_student_is_kept_within_an_epoch(tmp_path: Path) -> None:
    """StudentCheckpoint: save_freq counts batches."""

    class Last(callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(self.model.student.get_weights())

    seen: list[Any] = []
    fitted(distilled(), Last(), StudentCheckpoint(tmp_path / "{batch}.keras", save_freq=3), epochs=1, batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["3.keras"]  # keras names batches from 1
    assert same(keras.saving.load_model(tmp_path / "3.keras").get_weights(), seen[2])


def test_a_model_without_a_student_is_kept_itself(tmp_path: Path) -> None:
    """StudentCheckpoint: the same callback serves the training of the teacher."""
    model, path = nets.mlp(), tmp_path / "teacher.keras"
    model.compile("sgd", nets.cross_entropy(), run_eagerly=True)
    fitted(model, StudentCheckpoint(path), epochs=1)
    assert same(keras.saving.load_model(path).get_weights(), model.get_weights())


@pytest.mark.parametrize("monitor", ["val_logit_loss", "val_agreement", "val_f1"])
def test_a_monitor_that_is_not_logged_is_an_error(monitor: str, tmp_path: Path) -> None:
    """StudentCheckpoint: the name is said, and the last student is not passed off as the best."""
    path = tmp_path / "student.keras"
    with pytest.raises(ValueError, match=monitor):
        fitted(distilled(), StudentCheckpoint(path, monitor, save_best_only=True), epochs=1)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:Can save best model only with val_loss available")
def test_validation_in_only_some_epochs_is_accepted(tmp_path: Path) -> None:
    """StudentCheckpoint: with validation_freq=2 the monitored key is there in every second epoch."""
    model, path = distilled(), tmp_path / "student.keras"
    fitted(model, StudentCheckpoint(path, save_best_only=True), epochs=2, validation_freq=2)
    assert same(keras.saving.load_model(path).get_weights(), model.student.get_weights())


def test_a_resumed_training_keeps_the_better_student(tmp_path: Path) -> None:
    """StudentCheckpoint: initial_value_threshold is the best value so far; without it the first epoch wins."""
    model, path = distilled(), tmp_path / "student.keras"
    logs = fitted(model, StudentCheckpoint(path, save_best_only=True), epochs=2)
    best = keras.saving.load_model(path).get_weights()
    best_value = min(logs["val_loss"])
    resumed = StudentCheckpoint(path, save_best_only=True, initial_value_threshold=best_value)
    fitted(model, worse_after(0), resumed, epochs=3, initial_epoch=2)
    assert same(keras.saving.load_model(path).get_weights(), best)
    fitted(model, StudentCheckpoint(path, save_best_only=True), epochs=4, initial_epoch=3)
    assert same(keras.saving.load_model(path).get_weights(), model.student.get_weights())


def test_a_resumed_training_saves_the_same_students_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """StudentCheckpoint: loaded after two epochs, the files of the third and fourth hold the same weights."""
    fitted(distilled(), StudentCheckpoint(tmp_path / "straight{epoch}.keras"), epochs=4)
    keras.utils.set_random_seed(0)  # the same student and teacher once more
    first = distilled()
    fitted(first, StudentCheckpoint(tmp_path / "resumed{epoch}.keras"), epochs=2)
    first.save(tmp_path / "model.keras")
    back = keras.saving.load_model(tmp_path / "model.keras")
    back.teacher = first.teacher
    fitted(back, StudentCheckpoint(tmp_path / "resumed{epoch}.keras"), epochs=4, initial_epoch=2)
    for epoch in range(1, 5):
        pair = [keras.saving.load_model(tmp_path / f"{run}{epoch}.keras") for run in ("straight", "resumed")]
        nets.assert_same_weights(*pair, tolerance=1e-6)
