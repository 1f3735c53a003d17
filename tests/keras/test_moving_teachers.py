"""A teacher that is the moving average of the student, against averages in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import cross_entropy, kl64, mlp, numpy_of, table, with_and_without_interruption

from keras_distill import (
    CallableTeacher,
    DistillationScheduler,
    DistillModel,
    DistillStep,
    DistillTargets,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    ReusedClassifierDistillation,
    SoftmaxRegressionLoss,
    SoftTargetLoss,
)
from keras_distill.schedules import Linear

X, Y = table(16)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def student(dtype: str | None = None) -> keras.Model:
    """With statistics of a batch normalisation and a dropout, which the teacher must not apply."""
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, "tanh", name="hidden", dtype=dtype)(inputs)
    normal = keras.layers.BatchNormalization(momentum=0.5, dtype=dtype)(hidden)
    dropped = keras.layers.Dropout(0.3, seed=1, dtype=dtype)(normal)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits", dtype=dtype)(dropped))


def distilled(decay: Any = 0.9, terms: Any = None, optimizer: Any = None, **compiled: Any) -> DistillModel:
    keras.utils.set_random_seed(4)
    model = DistillModel(student(), EMATeacher(decay), terms)
    optimizer = optimizer or keras.optimizers.SGD(0.5, momentum=0.9)
    model.compile(optimizer, cross_entropy(), **(compiled or {"run_eagerly": True}))
    return model


class Averages(keras.callbacks.Callback):
    """Averages by hand; the teacher's after each batch must be the same."""

    def __init__(self, decay: float, every: int = 1) -> None:
        super().__init__()
        self.decay, self.every, self.batches = decay, every, 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.weights = [weight.astype("float64") for weight in self.model.student.get_weights()]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches % self.every == 0:
            now = self.model.student.get_weights()
            self.weights = [
                self.decay * own + (1 - self.decay) * other for own, other in zip(self.weights, now, strict=True)
            ]
        for own, expected in zip(averages(self.model), self.weights, strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-7)


def averages(model: Any) -> list[Any]:
    return [numpy_of(average) for _, average in model.teacher.pairs()]


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}])
def test_it_follows_every_step_weights_and_statistics(compiled: dict[str, Any]) -> None:
    if compiled.get("jit_compile") and keras.backend.backend() == "torch":
        compiled = {"jit_compile": False}
    distilled(0.9, **compiled).fit(X, Y, epochs=2, callbacks=[Averages(0.9)], **FIT)


def test_it_follows_only_the_steps_in_which_an_accumulating_optimizer_changes_weights() -> None:
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    model = distilled(0.9, optimizer=optimizer)
    model.fit(X, Y, epochs=2, callbacks=[Averages(0.9, every=2)], **FIT)
    assert int(model.teacher.state.updates) == 2


@pytest.mark.not_jax  # Keras' loss scaling on JAX does not skip steps of plain SGD
def test_it_stays_where_a_step_overflows() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = distilled(0.9)
    before = averages(model)
    model.fit(np.full_like(X, np.inf), Y, **FIT)
    assert int(model.teacher.state.updates) == 0
    for own, expected in zip(averages(model), before, strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.tensorflow
def test_several_steps_of_one_execution_count_one_by_one() -> None:
    single, double = distilled(0.8, jit_compile=False), distilled(0.8, steps_per_execution=2, jit_compile=False)
    for model in (single, double):
        model.fit(X, Y, epochs=2, **FIT)
    for own, expected in zip(averages(double), averages(single), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_divergence_to_the_averaged_model_in_inference_mode() -> None:
    model = distilled(0.5, LogitsDistillation(SoftTargetLoss(temperature=2.0)))
    model.fit(X, Y, epochs=2, **FIT)
    copy = model.teacher.averaged()
    teacher, own = (np.asarray(each.predict(X, verbose=0), "float64") for each in (copy, model.student))
    assert np.abs(teacher - own).max() > 0.01
    value = model.evaluate(X, Y, verbose=0, return_dict=True)["logits_loss"]
    np.testing.assert_allclose(value, kl64(own, teacher, 2.0).mean(), rtol=1e-4)


def test_layers_of_the_average_can_be_compared() -> None:
    model = distilled(0.5, FeatureDistillation("hidden", "hidden"))
    model.fit(X, Y, epochs=2, **FIT)
    features = [
        np.asarray(keras.Model(net.input, net.get_layer("hidden").output).predict(X, verbose=0), "float64")
        for net in (model.teacher.averaged(), model.student)
    ]
    value = model.evaluate(X, Y, verbose=0, return_dict=True)["hidden_loss"]
    np.testing.assert_allclose(value, np.square(features[0] - features[1]).mean(), rtol=1e-4)


def test_the_teachers_call_changes_nothing_in_the_student() -> None:
    """Neither statistics nor gradients: the step is that of a separate teacher of the same weights."""
    keras.utils.set_random_seed(4)
    separate = DistillModel(student(), student())
    separate.teacher.set_weights(separate.student.get_weights())
    separate.compile(keras.optimizers.SGD(0.5, momentum=0.9), cross_entropy(), run_eagerly=True)
    model = distilled(1.0)
    model.student.set_weights(separate.student.get_weights())
    for each in (model, separate):
        each.fit(X, Y, epochs=2, **FIT)
    for own, expected in zip(model.student.get_weights(), separate.student.get_weights(), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_losses_of_layers_survive_the_teachers_call() -> None:
    inputs = keras.Input((6,))
    net = keras.Model(inputs, keras.layers.Dense(3, activity_regularizer="l2")(inputs))
    step = DistillStep(net, EMATeacher(0.9))
    with step.watching():
        output = net(X, training=True)
    [before] = net.losses
    step.losses(output)
    [after] = net.losses
    assert float(after) == float(before) > 0


def test_weights_that_are_loaded_after_the_model_was_made_are_where_the_average_begins() -> None:
    model = distilled(1.0)
    model.student.set_weights([weight + 1.0 for weight in model.student.get_weights()])
    expected = model.student.get_weights()
    model.fit(X, Y, **FIT)
    for own, other in zip(averages(model), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)


def resumed_from_file(model: Any, folder: Path) -> Any:
    model.save(folder / "model.keras")
    again = keras.models.load_model(folder / "model.keras")
    again.run_eagerly = True
    return again


def resumed_from_weights(model: Any, folder: Path) -> Any:
    model.save_weights(folder / "model.weights.h5")
    again = distilled(0.9, optimizer=keras.optimizers.SGD(0.5))
    again.load_weights(folder / "model.weights.h5")
    return again


@pytest.mark.parametrize("resumed", [resumed_from_file, resumed_from_weights])
def test_a_saved_average_continues_bit_for_bit(resumed: Callable[..., Any], tmp_path: Path) -> None:
    model = distilled(0.9, optimizer=keras.optimizers.SGD(0.5))
    model.fit(X, Y, epochs=2, **FIT)
    again = resumed(model, tmp_path)
    assert again.teacher.decay == 0.9
    for own, expected in zip(averages(again), averages(model), strict=True):
        np.testing.assert_array_equal(own, expected)
    model.student.layers[3].seed_generator.state.assign(again.student.layers[3].seed_generator.state)
    for each in (model, again):
        each.fit(X, Y, epochs=3, initial_epoch=2, **FIT)
    for own, expected in zip(averages(again), averages(model), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_an_interrupted_training_continues_from_its_backup(tmp_path: Path) -> None:
    def plain() -> DistillModel:
        keras.utils.set_random_seed(1)
        model = DistillModel(mlp(), EMATeacher(0.9))
        model.compile(keras.optimizers.Adam(0.05), cross_entropy(), run_eagerly=True)
        return model

    whole, resumed = with_and_without_interruption(plain, tmp_path, X, Y, **FIT)
    for own, expected in zip(averages(resumed), averages(whole), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_the_students_file_does_not_hold_the_average(tmp_path: Path) -> None:
    model = distilled()
    model.fit(X, Y, **FIT)
    model.student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    assert len(loaded.weights) == len(student().weights)
    assert model.count_params() == student().count_params() * 2 + 5  # two numbers of the term, three of the model


def test_the_decay_follows_a_schedule_which_is_logged_and_saved(tmp_path: Path) -> None:
    model = distilled(Linear(0.5, 1.0, duration=2, over="epochs"))
    logs = model.fit(X, Y, epochs=3, **FIT).history
    assert logs["teacher_decay"] == [0.5, 0.75, 1.0]
    again = resumed_from_file(model, tmp_path)
    assert again.teacher.schedules["decay"].end == 1.0


def test_a_callback_sets_the_decay() -> None:
    model = distilled(0.5)
    scheduler = DistillationScheduler("decay", lambda epoch: 0.5 + 0.1 * epoch)
    logs = model.fit(X, Y, epochs=2, callbacks=[scheduler], **FIT).history
    np.testing.assert_allclose(logs["teacher_decay"], [0.5, 0.6])
    assert model.teacher.decay == 0.6


def test_averages_of_half_precision_are_kept_in_float32() -> None:
    model = DistillModel(student("bfloat16"), EMATeacher(0.999))
    model.compile(keras.optimizers.SGD(0.5), cross_entropy(), run_eagerly=True)
    assert {keras.backend.standardize_dtype(average.dtype) for _, average in model.teacher.pairs()} == {"float32"}
    before = averages(model)
    model.fit(X, Y, epochs=2, **FIT)
    assert any((own != other).any() for own, other in zip(averages(model), before, strict=True))


def test_a_student_that_builds_itself_on_the_first_batch() -> None:
    net = keras.Sequential([keras.layers.Dense(5, "relu"), keras.layers.Dense(3)])
    model = DistillModel(net, EMATeacher(0.9))
    model.compile(keras.optimizers.SGD(0.5), cross_entropy())
    model.fit(X, Y, epochs=2, **FIT)
    assert len(averages(model)) == 4
    assert any((own != other).any() for own, other in zip(averages(model), net.get_weights(), strict=True))


def test_in_your_own_loop_the_average_moves_when_the_step_is_asked() -> None:
    net = mlp()
    step = DistillStep(net, EMATeacher(0.9))
    before = net.get_weights()
    net.set_weights([weight + 1.0 for weight in before])
    step.update_teacher()
    for (_, average), weight in zip(step.teacher.pairs(), before, strict=True):
        np.testing.assert_allclose(numpy_of(average), weight + 0.1, rtol=1e-5, atol=1e-6)
    step.update_teacher(stepped=False)
    np.testing.assert_allclose(numpy_of(step.teacher.pairs()[0][1]), before[0] + 0.1, rtol=1e-5, atol=1e-6)


class OwnStep(DistillModel):
    """A step that never calls Keras' own."""

    def train_step(self, data: Any) -> Any:
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        output = self(x, training=True)
        self.compute_loss(x, y, output, weights)
        return self.compute_metrics(x, y, output)


def own_step() -> None:
    model = OwnStep(student(), EMATeacher(0.9))
    model.compile("sgd", cross_entropy(), run_eagerly=True)
    model.fit(X, Y, **FIT)


def stateful() -> keras.Model:
    inputs = keras.Input(batch_shape=(8, 6))
    hidden = keras.layers.Reshape((6, 1))(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.SimpleRNN(4, stateful=True)(hidden)))


def on_stored() -> None:
    distilled().fit(X, DistillTargets(Y, np.zeros((16, 3), "float32")), **FIT)


def changed() -> None:
    model = distilled()
    model.student.get_layer("hidden").enable_lora(2)
    model.fit(X, Y, **FIT)


def put_later() -> None:
    DistillModel(student(), student()).teacher = EMATeacher(0.9)


def put_away() -> None:
    distilled().teacher = student()


def set_by_hand() -> None:
    distilled(Linear(0.5, 1.0)).teacher.decay = 0.7


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "a decay of 2": (ValueError, lambda: EMATeacher(2.0), "Expected `decay` to be"),
    "a decay in words": (TypeError, lambda: EMATeacher("slow"), "Expected `decay` to be"),
    "saved as a teacher": (
        ValueError,
        lambda: DistillModel(student(), EMATeacher(0.9), save_teacher=True),
        "Expected `save_teacher` to be False with an EMATeacher, whose average is saved in any case.",
    ),
    "stored outputs": (ValueError, on_stored, "because the weights of an EMATeacher change"),
    "outputs to store": (
        ValueError,
        lambda: distilled().teacher_targets(X),
        "Expected a teacher that does not change, for stored outputs.",
    ),
    "assigned later": (ValueError, put_later, "passed to DistillModel or DistillStep when it is made"),
    "replaced": (ValueError, put_away, "when it is made, and to stay its teacher"),
    "new weights": (ValueError, changed, "Change the student first, then make the DistillModel."),
    "a stateful student": (
        ValueError,
        lambda: DistillModel(stateful(), EMATeacher(0.9)),
        "Expected a student of Keras layers without a state between batches, for an EMATeacher.",
    ),
    "a custom step": (ValueError, own_step, "Expected the step to update the EMATeacher. Call super().train_step(...)"),
    "a loss that takes its numbers": (
        ValueError,
        lambda: DistillModel(
            student(), EMATeacher(0.9), FeatureDistillation("hidden", "hidden", SoftmaxRegressionLoss())
        ),
        "Expected a teacher whose weights stay for term 'hidden', which takes numbers from its layers.",
    ),
    "its classifier reused": (
        ValueError,
        lambda: DistillModel(student(), EMATeacher(0.9), ReusedClassifierDistillation("hidden", "hidden")),
        "Expected a teacher whose weights stay for term 'reused_classifier', which takes numbers from its layers.",
    ),
    "a decay beside a schedule": (ValueError, set_by_hand, "Expected `decay` not to be assigned while it has a"),
    "a mixture of one": (
        ValueError,
        lambda: DistillModel(student(), EMATeacher(0.9), mix="logits"),
        "Expected `teacher` to be a list of two or more teachers",
    ),
    "the decay of another teacher": (
        ValueError,
        lambda: fitted_with_decay(),
        "Expected an EMATeacher, whose `decay` is scheduled.",
    ),
    "no model": (ValueError, lambda: EMATeacher(0.9).averaged(), "Expected an EMATeacher of a model."),
    "a function of it": (TypeError, lambda: CallableTeacher(EMATeacher(0.9), (3,)), "to be a function of arrays"),
}


def fitted_with_decay() -> None:
    model = DistillModel(student(), student())
    model.compile("sgd", run_eagerly=True)
    model.fit(X, callbacks=[DistillationScheduler("decay", lambda epoch: 0.5)], **FIT)


if keras.backend.backend() == "jax":
    del REFUSED["a custom step"]  # its step has other arguments there


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_that_cannot_be_right_is_refused_in_words(name: str) -> None:
    kind, act, words = REFUSED[name]
    with pytest.raises(kind, match=re.escape(words)):
        act()


def test_an_evaluation_among_the_first_accumulated_batches_leaves_the_average_alone() -> None:
    """The statistics of the batch normalisation have moved by then, but the average begins with the training."""

    def trained(callbacks: list[Any]) -> list[Any]:
        keras.utils.set_random_seed(1)
        model = DistillModel(student(), EMATeacher(0.7))
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3), cross_entropy(), jit_compile=False)
        model.fit(X, Y, epochs=2, callbacks=callbacks, **FIT)
        return list(model.teacher.averaged().get_weights())

    class Evaluation(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.evaluate(X, Y, verbose=0)

    for own, expected in zip(trained([Evaluation()]), trained([]), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-6)


def test_an_average_begins_with_weights_that_were_set_beside_an_optimizer_that_has_stepped_before() -> None:
    model = DistillModel(student(), EMATeacher(1.0))
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    model.optimizer.iterations.assign(7)
    model.student.set_weights([weight + 1.0 for weight in model.student.get_weights()])
    expected = model.student.get_weights()[0]
    model.fit(X, Y, **FIT)
    np.testing.assert_allclose(model.teacher.averaged().get_weights()[0], expected, rtol=1e-6)
