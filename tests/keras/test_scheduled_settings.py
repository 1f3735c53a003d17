"""Schedules given in the place of a number, as in the Lightning half: ``fit`` follows, logs and resumes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_weights

from keras_distill import (
    ChannelWiseLoss,
    DecoupledKDLoss,
    DistillationScheduler,
    DistillationTerm,
    DistillModel,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    NormalizedKDLoss,
    RelationalLoss,
    SoftTargetLoss,
)
from keras_distill.losses import relations
from keras_distill.schedules import Cosine, Linear, Schedule, Step, WarmUp

IMAGES = np.random.default_rng(0).standard_normal((16, 4)).astype("float32")
LABELS = np.arange(16) % 3
OVER_STEPS = Linear(1.0, 0.0, duration=8, over="steps")


def network(width: int) -> keras.Model:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(width, name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden))


def made(*terms: DistillationTerm, **settings: Any) -> DistillModel:
    keras.utils.set_random_seed(1)
    model = DistillModel(network(5), network(6), [*terms], **settings)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class Watch(keras.callbacks.Callback):
    """The numbers at the end of each batch."""

    def __init__(self, read: Callable[[], tuple[float, ...]]) -> None:
        super().__init__()
        self.read, self.seen = read, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(self.read())


def fitted(model: DistillModel, *callbacks: Any, **settings: Any) -> dict[str, list[float]]:
    settings = {"batch_size": 4, "shuffle": False, "verbose": 0, **settings}
    return model.fit(IMAGES, LABELS, callbacks=[*callbacks], **settings).history


def test_weights_and_temperatures_follow_steps_epochs_and_the_fraction() -> None:
    loss = SoftTargetLoss(Step([4.0, 2.0], boundaries=[1]))
    model = made(LogitsDistillation(loss, weight=OVER_STEPS), task_weight=Linear(0.0, 1.0))
    term = model.terms[0]
    watch = Watch(lambda: (term.weight, term.temperature, model.task_weight))
    logs = fitted(model, watch, epochs=2)
    expected = [(1 - step / 8, 4.0 if step < 4 else 2.0, step / 8) for step in range(8)]
    np.testing.assert_allclose(watch.seen, expected, rtol=1e-6)
    assert logs["logits_weight"] == pytest.approx([5 / 8, 1 / 8])
    assert logs["logits_temperature"] == [4.0, 2.0]
    assert logs["task_weight"] == pytest.approx([3 / 8, 7 / 8])


def test_a_training_equals_one_whose_schedules_are_callbacks() -> None:
    held = made(LogitsDistillation(SoftTargetLoss(Linear(4.0, 1.0)), weight=OVER_STEPS), task_weight=Cosine(1.0, 0.5))
    told = made(LogitsDistillation())
    callbacks = [
        DistillationScheduler(name, schedule)
        for name, schedule in (
            ("weight", OVER_STEPS),
            ("temperature", Linear(4.0, 1.0)),
            ("task_weight", Cosine(1.0, 0.5)),
        )
    ]
    logs, expected = fitted(held, epochs=2), fitted(told, *callbacks, epochs=2)
    assert logs.keys() == expected.keys()
    for key, values in expected.items():
        assert logs[key] == pytest.approx(values, rel=1e-6), key
    assert_same_weights(held.student, told.student, 1e-7)


LOSSES = {
    "dist": (DISTLoss, {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0}),
    "dkd": (DecoupledKDLoss, {"target_weight": 1.0, "nontarget_weight": 8.0, "temperature": 4.0}),
    "nkd": (NormalizedKDLoss, {"nontarget_weight": 1.5, "temperature": 1.0}),
    "relational": (RelationalLoss, {"distance_weight": 25.0, "angle_weight": 50.0}),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_weight_within_a_loss_may_be_a_schedule(kind: str) -> None:
    """In each epoch the loss is that with the epoch's numbers in the constructor."""
    loss, settings = LOSSES[kind]
    schedules = {name: Step([value, 3.0, 0.5], boundaries=[1, 2]) for name, value in settings.items()}
    model = made(FeatureDistillation("logits", "logits", loss(**schedules), name="term"))
    model.optimizer.learning_rate = 0.0
    logs = fitted(model, batch_size=16, epochs=3)
    teacher, student = (network.predict(IMAGES, verbose=0) for network in (model.teacher, model.student))
    target = (teacher, LABELS) if loss.needs_labels else teacher
    for epoch, numbers in enumerate([settings, dict.fromkeys(settings, 3.0), dict.fromkeys(settings, 0.5)]):
        assert logs["term_loss"][epoch] == pytest.approx(float(loss(**numbers)(target, student)), rel=1e-5)
        assert {name: logs[f"term_{name}"][epoch] for name in settings} == numbers


def test_a_feature_term_has_the_temperature_of_its_loss() -> None:
    student, teacher = (
        keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(3, 1, name="maps"), keras.layers.Flatten()])
        for _ in range(2)
    )
    loss = ChannelWiseLoss(temperature=Step([4.0, 2.0], boundaries=[1]))
    model = DistillModel(student, teacher, FeatureDistillation("maps", "maps", loss))
    model.compile(keras.optimizers.SGD(0.0))
    images = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype("float32")
    values = model.fit(images, epochs=2, verbose=0).history["maps_loss"]
    calls = [network.predict(images, verbose=0).reshape((-1, 4, 4, 3)) for network in (teacher, student)]
    expected = [float(ChannelWiseLoss(temperature=temperature)(*calls)) for temperature in (4.0, 2.0)]
    assert values == pytest.approx(expected, rel=1e-5)
    assert loss.temperature == 4.0  # another term may have been given the same loss


def test_a_weight_of_zero_within_a_loss_skips_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula that returns NaN if it is computed, and 0 times NaN is NaN."""
    monkeypatch.setattr(relations, "relational_angle", lambda student, teacher: np.nan * ops.sum(student))

    def training(schedule: Any) -> list[float]:
        loss = RelationalLoss(angle_weight=schedule)
        return fitted(made(FeatureDistillation("hidden", "hidden", loss)), batch_size=16)["hidden_loss"]

    assert np.isfinite(training(Step([0.0, 1.0], boundaries=[1]))).all()
    assert np.isnan(training(Step([1.0, 0.0], boundaries=[1]))).all()


@pytest.mark.tensorflow
def test_new_numbers_in_every_step_need_no_new_trace() -> None:
    model, traces = made(LogitsDistillation(SoftTargetLoss(Linear(4.0, 1.0)), weight=Cosine(1.0, 0.1))), []
    call = model.student.layers[1].call
    model.student.layers[1].call = lambda *args, **kwargs: (traces.append(1), call(*args, **kwargs))[1]
    fitted(model)
    once = len(traces)
    fitted(model, epochs=3)
    assert len(traces) == once


@keras.saving.register_keras_serializable(package="test_scheduled_settings")
def halving(epoch: float) -> float:
    return 0.5**epoch


def everything() -> DistillModel:
    return made(
        LogitsDistillation(SoftTargetLoss(Step([4.0, 2.0], boundaries=[1])), weight=OVER_STEPS),
        FeatureDistillation(
            "logits", "logits", DISTLoss(inter_weight=WarmUp(2.0)), weight=Schedule(halving, over="epochs"), name="dist"
        ),
        task_weight=Cosine(1.0, 0.5),
    )


def test_k25_schedules_come_back_from_json() -> None:
    """K25: a file keeps the schedule itself and not the number that it had given last."""
    model = everything()
    before = json.loads(json.dumps(model.get_config()))
    fitted(model)
    config = json.loads(json.dumps(model.get_config()))
    assert config == before
    back = DistillModel.from_config(config)
    again = json.loads(json.dumps(back.get_config()))
    assert again["terms"] == config["terms"]
    assert again["task_weight"] == config["task_weight"]
    assert back.terms[1].schedules["weight"].function is halving
    assert back.terms[0].schedules["temperature"].get_config() == model.terms[0].schedules["temperature"].get_config()


def test_k22_a_loaded_model_continues_its_schedules(tmp_path: Path) -> None:
    """K22: the loaded model has the schedules, and trains as one that was never interrupted."""
    whole, first = everything(), everything()
    logs = fitted(whole, epochs=2)
    fitted(first, StopAfterOne(), epochs=2)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    second.teacher = first.teacher
    resumed = fitted(second, initial_epoch=1, epochs=2)
    assert {key: values[0] for key, values in resumed.items()} == pytest.approx(
        {key: values[1] for key, values in logs.items()}, rel=1e-5
    )
    assert_same_weights(second.student, whole.student, 1e-6)


class StopAfterOne(keras.callbacks.Callback):
    """As if the process had ended."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = True


def test_callbacks_of_the_user_see_the_numbers_in_the_logs(tmp_path: Path) -> None:
    model = made(LogitsDistillation(weight=Step([1.0, 0.5], boundaries=[1])))
    fitted(model, keras.callbacks.CSVLogger(tmp_path / "log.csv"), epochs=2)
    with (tmp_path / "log.csv").open() as file:
        assert [float(row["logits_weight"]) for row in csv.DictReader(file)] == [1.0, 0.5]


def test_a_callback_list_of_keras_is_restored_after_fit() -> None:
    model = made(LogitsDistillation(weight=OVER_STEPS))
    watch = Watch(lambda: (model.terms[0].weight,))
    callbacks = keras.callbacks.CallbackList([watch], add_history=True, model=model, epochs=1, steps=4)
    model.fit(IMAGES, LABELS, batch_size=4, verbose=0, callbacks=callbacks)
    assert [weight for (weight,) in watch.seen] == pytest.approx([1.0, 0.875, 0.75, 0.625])
    assert watch in callbacks.callbacks
    assert len(callbacks.callbacks) == 2


def test_a_schedule_that_leaves_the_allowed_numbers_raises() -> None:
    with pytest.raises(ValueError, match=r"^Expected `temperature` to be greater than 0\. Received: temperature=0\.0$"):
        SoftTargetLoss(WarmUp(4.0))
    with pytest.raises(ValueError, match=r"^Expected `task_weight` to be at least 0\. Received: task_weight=-1\.0$"):
        made(LogitsDistillation(), task_weight=Linear(-1.0, 0.0))
    with pytest.raises(TypeError, match=r"^Expected `weight` to be an int or a float\. Received: weight=<function"):
        LogitsDistillation(weight=lambda step: 1.0)
    with pytest.raises(ValueError, match=r"Expected `weight` to be at least 0\. Received: weight=-1\.0"):
        fitted(made(LogitsDistillation(weight=Schedule(lambda step: 1.0 - step))))
