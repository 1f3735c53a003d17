"""Moving averages of the student in a list of teachers: their losses, their updates, files and resumed trainings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import (
    assert_same_weights,
    cross_entropy,
    kl64,
    mlp,
    numpy_of,
    table,
    with_and_without_interruption,
)

from keras_distill import (
    DistillationScheduler,
    DistillModel,
    DistillStep,
    DistillTargets,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
)
from keras_distill.schedules import Linear

X, Y = table(16)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def network() -> keras.Model:
    keras.utils.set_random_seed(11)
    return mlp(5, name="teacher")


def distilled(teachers: Any = None, terms: Any = None, compiled: Any = None, **settings: Any) -> DistillModel:
    teachers = [EMATeacher(0.9), network()] if teachers is None else teachers
    keras.utils.set_random_seed(4)
    model = DistillModel(mlp(), teachers, terms, **settings)
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    model.compile(optimizer, cross_entropy(), **(compiled or {"run_eagerly": True}))
    return model


def averages(model: Any, index: int = 0) -> list[Any]:
    return [numpy_of(average) for _, average in model.step.averages[index].pairs()]


def outputs(model: keras.Model) -> Any:
    return np.asarray(model.predict(X, verbose=0), "float64")


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"jit_compile": False}], ids=["eager", "graph"])
def test_each_average_follows_every_step_with_its_own_decay(compiled: dict[str, Any]) -> None:
    class ByHand(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.weights = [[weight.astype("float64") for weight in self.model.student.get_weights()]] * 2

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = self.model.student.get_weights()
            for index, decay in enumerate((0.9, 0.5)):
                pairs = zip(self.weights[index], now, strict=True)
                self.weights[index] = [decay * own + (1 - decay) * other for own, other in pairs]

    by_hand = ByHand()
    model = distilled([EMATeacher(0.9), network(), EMATeacher(0.5)], compiled=compiled)
    model.fit(X, Y, epochs=2, callbacks=[by_hand], **FIT)
    for index in (0, 1):
        for own, expected in zip(averages(model, index), by_hand.weights[index], strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-7)
    assert [type(each).__name__ for each in model.teacher] == ["EMATeacher", "Functional", "EMATeacher"]


@pytest.mark.parametrize("mix", ["losses", "probabilities"])
def test_the_loss_is_the_weighted_mean_over_the_teachers(mix: str) -> None:
    loss = LogitsDistillation(SoftTargetLoss(temperature=1.0))
    model = distilled(terms=loss, teacher_weights=[0.25, 0.75], mix=mix)
    model.fit(X, Y, epochs=2, **FIT)
    own, *others = (outputs(each) for each in (model.student, model.teacher[0].averaged(), model.teacher[1]))
    if mix == "losses":
        expected = sum(share * kl64(own, other, 1.0) for share, other in zip((0.25, 0.75), others, strict=True))
    else:
        shares = [np.exp(other) / np.exp(other).sum(-1, keepdims=True) for other in others]
        expected = kl64(own, np.log(0.25 * shares[0] + 0.75 * shares[1]), 1.0)
    value = model.evaluate(X, Y, verbose=0, return_dict=True)["logits_loss"]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-4)


def test_features_of_each_teacher_have_an_adapter_of_their_own() -> None:
    model = distilled(terms=FeatureDistillation("hidden", "hidden"))
    model.fit(X, Y, **FIT)
    assert [tuple(weight.shape) for weight in model.step.trainable_variables] == [(8, 5), (5,)]  # none of the student's


def test_a_route_may_lead_to_the_average() -> None:
    model = distilled(terms=LogitsDistillation(SoftTargetLoss(temperature=1.0)), route=lambda x: np.arange(16) % 2)
    value = model.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True)["logits_loss"]
    own, other = outputs(model.student), outputs(model.teacher[1])  # the average is still the student
    np.testing.assert_allclose(value, kl64(own, other, 1.0)[1::2].sum() / 16, rtol=1e-4)


def from_file(model: Any, folder: Path) -> Any:
    model.save(folder / "model.keras")
    again = keras.models.load_model(folder / "model.keras")
    assert again.teacher[1] is None
    assert again.teacher[0].decay == 0.9
    again.teacher = [again.teacher[0], network()]
    again.run_eagerly = True
    return again


def from_weights(model: Any, folder: Path) -> Any:
    model.save_weights(folder / "model.weights.h5")
    again = distilled()
    again.optimizer.build(again.trainable_variables)  # the file holds its state, too
    again.load_weights(folder / "model.weights.h5")
    return again


@pytest.mark.parametrize("resumed", [from_file, from_weights])
def test_a_resumed_training_continues_bit_for_bit(resumed: Callable[..., Any], tmp_path: Path) -> None:
    straight = distilled()
    straight.fit(X, Y, epochs=3, **FIT)
    model = distilled()
    model.fit(X, Y, epochs=2, **FIT)
    again = resumed(model, tmp_path)
    again.fit(X, Y, epochs=3, initial_epoch=2, **FIT)
    assert_same_weights(again, straight, 0.0)
    for own, expected in zip(averages(again), averages(straight), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_an_interrupted_training_continues_from_its_backup(tmp_path: Path) -> None:
    whole, resumed = with_and_without_interruption(distilled, tmp_path, X, Y, **FIT)
    for own, expected in zip(averages(resumed), averages(whole), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_a_model_that_is_not_compiled_is_saved_too(tmp_path: Path) -> None:
    model = DistillModel(mlp(), [EMATeacher(0.9), network()], teacher_weights=[0.3, 0.7])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    again.teacher = [again.teacher[0], network()]
    assert_same_weights(again.student, model.student, 0.0)


def test_a_file_may_hold_the_networks_too(tmp_path: Path) -> None:
    model = distilled(save_teacher=True)
    model.fit(X, Y, **FIT)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_weights(again.teacher[1], network(), 0.0)
    again.fit(X, Y, **FIT)


def test_the_logs_number_the_decays(tmp_path: Path) -> None:
    decay = Linear(0.5, 1.0, duration=2, over="epochs")
    logs = distilled([network(), EMATeacher(decay)]).fit(X, Y, epochs=3, **FIT).history
    assert logs["teacher_1_decay"] == [0.5, 0.75, 1.0]
    scheduler = DistillationScheduler("decay", lambda epoch: 0.5 + 0.1 * epoch)
    logs = distilled().fit(X, Y, epochs=2, callbacks=[scheduler], **FIT).history
    np.testing.assert_allclose(logs["teacher_0_decay"], [0.5, 0.6])


def test_in_your_own_loop_all_averages_move() -> None:
    step = DistillStep(mlp(), [EMATeacher(0.9), network(), EMATeacher(0.5)])
    before = step.student.get_weights()[0]
    step.student.set_weights([weight + 1.0 for weight in step.student.get_weights()])
    step.update_teacher()
    for average, share in zip(step.averages, (0.1, 0.5), strict=True):
        np.testing.assert_allclose(numpy_of(average.pairs()[0][1]), before + share, rtol=1e-5, atol=1e-6)


def of_a_file(folder: Path) -> Any:
    distilled().save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def trained_without(folder: Path) -> None:
    model = of_a_file(folder)
    model.run_eagerly = True
    model.fit(X, Y, **FIT)


def assigned(teacher: Any) -> None:
    distilled().teacher = teacher


def two_callbacks(folder: Path) -> None:
    scheduler = DistillationScheduler("decay", lambda epoch: 0.5)
    distilled([EMATeacher(0.9), EMATeacher(0.5)]).fit(X, Y, callbacks=[scheduler], **FIT)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a gap in training": (trained_without, "Received: teacher=[EMATeacher(decay=0.9), None]"),
    "its place taken": (lambda folder: assigned(network()), "Keep it in the list: model.teacher = [model.teacher[0]"),
    "another average": (lambda folder: assigned([EMATeacher(0.9), network()]), "and to stay its teacher"),
    "stored outputs": (
        lambda folder: distilled().fit(X, DistillTargets(Y, np.zeros((16, 3), "float32")), **FIT),
        "because the weights of an EMATeacher change",
    ),
    "two decays in one callback": (two_callbacks, "Pass each a schedule of its own"),
    "a balanced weight": (
        lambda folder: distilled(terms=LogitsDistillation(weight="balanced")),
        "to be a number or a schedule",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_that_cannot_be_right_is_refused_in_words(name: str, tmp_path: Path) -> None:
    act, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        act(tmp_path)
