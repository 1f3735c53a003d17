"""A weight of 0, fixed or scheduled, skips the work: one graph for each set of working terms, chosen in Python."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_weights

from keras_distill import DistillationScheduler, DistillModel, FeatureDistillation, LogitsDistillation
from keras_distill.schedules import Step

IMAGES = np.random.default_rng(0).standard_normal((32, 4)).astype("float32")
LABELS = np.arange(32) % 3
WAYS = [
    pytest.param({"jit_compile": False}, id="graph"),
    pytest.param({"jit_compile": True}, marks=pytest.mark.tensorflow, id="XLA"),
    pytest.param({"run_eagerly": True}, id="eager"),
]
SETTINGS: dict[str, Any] = {"batch_size": 8, "verbose": 0, "shuffle": False}


class Poison(keras.layers.Layer):
    """Passes its input on, but for rows that begin with a 7, which become minus infinity."""

    def call(self, inputs: Any) -> Any:
        return ops.where(inputs[:, :1] == 7.0, -np.inf, inputs)


def network(width: int, *, poisoned: bool = False) -> keras.Model:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(width, name="hidden")(Poison()(inputs) if poisoned else inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden))


def made(*terms: Any, way: dict[str, Any], poisoned: bool = True, **settings: Any) -> DistillModel:
    keras.utils.set_random_seed(1)
    model = DistillModel(network(5), network(6, poisoned=poisoned), [*terms], **settings)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), **way)
    return model


def images() -> Any:
    """The third of four batches would poison a teacher that runs."""
    poisonous = IMAGES.copy()
    poisonous[16:24, 0] = 7.0
    return poisonous


def third_step_off(before: int = 0) -> Step:
    return Step([1.0, 0.0, 1.0], boundaries=[before + 2, before + 3], over="steps")


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_does_not_run_where_all_weights_are_scheduled_to_0(way: dict[str, Any]) -> None:
    """A teacher that ran in the third step would return NaN, and 0 times NaN is NaN."""
    model = made(LogitsDistillation(), way=way)
    logs = model.fit(
        images(), LABELS, callbacks=[DistillationScheduler("weight", third_step_off())], **SETTINGS
    ).history
    assert np.isfinite([values[0] for values in logs.values()]).all()
    assert all(np.isfinite(weight).all() for weight in model.student.get_weights())
    model = made(LogitsDistillation(), way=way)
    logs = model.fit(images(), LABELS, **SETTINGS).history
    assert not np.isfinite(logs["loss"][0])  # so the check above can fail


@pytest.mark.parametrize("way", WAYS)
def test_one_term_rests_while_another_works(way: dict[str, Any]) -> None:
    """The feature of a teacher that runs is finite; the resting term's loss of it is not."""

    def exploding(student: Any, teacher: Any) -> Any:
        return ops.mean(ops.square(student - teacher)) / ops.min(ops.cast(student > 1e9, "float32"))

    feature = FeatureDistillation("hidden", "hidden", exploding, weight=0.0)
    model = made(LogitsDistillation(), feature, way=way, poisoned=False)
    plain = made(LogitsDistillation(), way=way, poisoned=False)
    logs, expected = (network.fit(IMAGES, LABELS, **SETTINGS).history for network in (model, plain))
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(logs["teacher_agreement"], expected["teacher_agreement"], rtol=1e-6)
    assert "hidden_loss" not in logs
    assert_same_weights(model.student, plain.student, 1e-5)
    model = made(LogitsDistillation(), FeatureDistillation("hidden", "hidden", exploding), way=way, poisoned=False)
    assert not np.isfinite(model.fit(IMAGES, LABELS, **SETTINGS).history["loss"][0])


@pytest.mark.parametrize("way", WAYS)
def test_a_term_that_rested_works_again_as_if_it_had_never_rested(way: dict[str, Any]) -> None:
    """The steps in which the weight is not 0 are those of a model that has no branch for resting."""
    model, plain = (made(LogitsDistillation(), way=way, poisoned=False) for _ in range(2))
    values = [0.5, 2.0, 1.0, 0.25]
    schedule = DistillationScheduler("weight", Step(values, boundaries=[1, 2, 3], over="steps"))
    model.fit(IMAGES, LABELS, callbacks=[schedule], **SETTINGS)
    for value, start in zip(values, range(0, 32, 8), strict=True):
        plain.terms[0].weight = value
        plain.fit(IMAGES[start : start + 8], LABELS[start : start + 8], **SETTINGS)
    assert_same_weights(model.student, plain.student, 1e-6)


def test_the_logs_are_means_of_the_steps_in_which_a_term_worked() -> None:
    model = made(LogitsDistillation(), way={"jit_compile": False}, poisoned=False)
    model.optimizer.learning_rate = 0.0
    schedule = DistillationScheduler("weight", Step([0.0, 1.0, 0.0], boundaries=[1, 2], over="steps"))
    logs = model.fit(IMAGES, LABELS, callbacks=[schedule], **SETTINGS).history
    second = model.evaluate(IMAGES[8:16], LABELS[8:16], verbose=0, return_dict=True)
    assert logs["logits_loss"][0] == pytest.approx(second["logits_loss"], rel=1e-5)
    assert logs["teacher_agreement"][0] == pytest.approx(second["teacher_agreement"], rel=1e-6)
    assert logs["distillation_loss"][0] == pytest.approx(second["logits_loss"] / 4, rel=1e-5)


def test_evaluation_measures_a_term_of_weight_0() -> None:
    model = made(LogitsDistillation(weight=0.0), way={"jit_compile": False}, poisoned=False)
    logs = model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)
    assert logs["logits_loss"] > 0
    assert logs["distillation_loss"] == 0


def test_a_schedule_for_a_model_that_has_trained_already_rests_too() -> None:
    model = made(LogitsDistillation(), way={"jit_compile": False})
    assert np.isfinite(model.fit(IMAGES, LABELS, **SETTINGS).history["loss"]).all()
    logs = model.fit(
        images(), LABELS, callbacks=[DistillationScheduler("weight", third_step_off(4))], **SETTINGS
    ).history
    assert np.isfinite(logs["loss"]).all()


def test_the_state_of_an_adapter_moves_only_in_steps_in_which_its_term_works() -> None:
    adapter = keras.Sequential([keras.layers.Dense(6), keras.layers.BatchNormalization()])
    term = FeatureDistillation("hidden", "hidden", weight=0.0, adapter=adapter)
    model = made(term, LogitsDistillation(), way={}, poisoned=False)
    model.fit(IMAGES, LABELS, **SETTINGS)
    assert not np.any(ops.convert_to_numpy(adapter.layers[1].moving_mean))
    term.weight = 1.0
    model.fit(IMAGES, LABELS, **SETTINGS)
    assert np.any(ops.convert_to_numpy(adapter.layers[1].moving_mean) != 0)


@pytest.mark.tensorflow
def test_a_weight_that_crosses_0_often_is_traced_twice_at_most() -> None:
    calls = []

    def counted(student: Any, teacher: Any) -> Any:
        calls.append(1)
        return ops.mean(ops.square(student - teacher))

    model = made(LogitsDistillation(counted), LogitsDistillation(name="other"), way={}, poisoned=False)
    crossing = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: setattr(model.terms[0], "weight", float(batch % 2))
    )
    model.fit(IMAGES, LABELS, epochs=2, callbacks=[crossing], **SETTINGS)
    traced = len(calls)
    model.fit(IMAGES, LABELS, epochs=3, callbacks=[crossing], **SETTINGS)
    assert len(calls) == traced
    assert len(model.train_function.made) == 2


def test_the_key_of_a_term_is_absent_from_an_epoch_in_which_it_never_worked() -> None:
    model = made(LogitsDistillation(), FeatureDistillation("hidden", "hidden"), way={}, poisoned=False)
    seen: list[Any] = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    warm_up = DistillationScheduler("weight", lambda epoch: float(epoch > 0), term="logits")
    model.fit(IMAGES, LABELS, epochs=2, callbacks=[warm_up, watch], **SETTINGS)
    assert "logits_loss" not in seen[0]
    assert seen[1]["logits_loss"] > 0
    assert all({"hidden_loss", "distillation_loss", "loss"} <= set(logs) for logs in seen)


def test_an_adapter_is_in_training_mode_in_training_and_only_there() -> None:
    adapter = keras.Sequential([keras.layers.Dense(6), keras.layers.Dropout(0.5, seed=1)])
    model = made(FeatureDistillation("hidden", "hidden", adapter=adapter), way={"jit_compile": False}, poisoned=False)
    model.optimizer.learning_rate = 0.0
    first, second = model.fit(IMAGES, LABELS, epochs=2, **SETTINGS).history["hidden_loss"]
    assert first != second  # the dropout draws a new mask
    evaluated = [model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)["hidden_loss"] for _ in range(2)]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_student_that_learns_from_nothing_for_a_while_stays_as_it_is(way: dict[str, Any]) -> None:
    """Without labels and with all weights 0 the step has no gradient, and still runs."""
    model = made(LogitsDistillation(), FeatureDistillation("hidden", "hidden"), way=way, poisoned=False)
    before = model.student.get_weights()
    both = [DistillationScheduler("weight", lambda epoch: 0.0, term=name) for name in ("logits", "hidden")]
    logs = model.fit(IMAGES, callbacks=both, **SETTINGS).history
    assert logs["loss"] == [0.0]
    for weight, same in zip(model.student.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)


@pytest.mark.tensorflow
def test_terms_rest_on_several_replicas_and_in_several_steps_at_once() -> None:
    import tensorflow as tf

    with tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices("CPU")]).scope():
        together = made(LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=0.0), way={})
    logs = together.fit(
        images(), LABELS, callbacks=[DistillationScheduler("weight", third_step_off(), term="logits")], **SETTINGS
    ).history
    assert np.isfinite(logs["loss"]).all()
    assert "hidden_loss" not in logs
