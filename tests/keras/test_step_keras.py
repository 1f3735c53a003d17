"""DistillStep: custom loops, the train_step of Keras' guide, terms of several owners, several kinds of teachers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_weights, cross_entropy, kl64, mlp, numpy_of, table

from keras_distill import (
    DistillationTerm,
    DistillModel,
    DistillStep,
    DistillTargets,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
)
from keras_distill.schedules import Linear

X, Y = table(8)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def models(width: int = 5) -> tuple[keras.Model, keras.Model]:
    keras.utils.set_random_seed(7)
    return mlp(width), mlp(6, name="teacher")


def distilled(terms: Any = None, *, kind: type[DistillModel] = DistillModel, width: int = 5, **settings: Any) -> Any:
    student, teacher = models(width)
    model = kind(student, teacher, terms, **settings)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), run_eagerly=True)
    return model


def both(**settings: Any) -> list[Any]:
    return [LogitsDistillation(SoftTargetLoss(temperature=2.0), **settings), FeatureDistillation("hidden", "hidden")]


class AsInTheGuide(DistillModel):
    """The train_step and test_step of Keras' guide, without `x` in `compute_loss`."""

    def train_step(self, data: Any) -> Any:
        x, y = data[:2]
        if keras.backend.backend() == "torch":
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            loss.backward()
            variables = list(self.trainable_weights)
            self.optimizer.apply([variable.value.grad for variable in variables], variables)
        else:
            import tensorflow as tf

            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


@pytest.mark.not_jax
def test_a_train_step_as_in_keras_guide_trains_as_fit_does() -> None:
    own, usual = distilled(both(), kind=AsInTheGuide), distilled(both())
    logs, expected = (model.fit(X, Y, epochs=2, **FIT).history for model in (own, usual))
    assert_same_weights(own, usual, 1e-6)
    for key in ("loss", "task_loss", "distillation_loss", "logits_loss", "hidden_loss", "teacher_agreement"):
        np.testing.assert_allclose(logs[key], expected[key], rtol=1e-5)


@pytest.mark.tensorflow
def test_a_loop_by_hand_trains_as_fit_does() -> None:
    import tensorflow as tf

    model = distilled(both())
    model.fit(X, Y, epochs=2, **FIT)
    step = distilled(both()).step
    student = step.student
    optimizer, loss = keras.optimizers.SGD(0.1), cross_entropy()
    for _ in range(2):
        with tf.GradientTape() as tape, step.watching():
            output = student(X, training=True)
            total = loss(Y, output) + step.losses(output, labels=Y)["distillation_loss"]
        variables = student.trainable_variables + step.trainable_variables
        optimizer.apply(tape.gradient(total, variables), variables)
        watched = {id(variable) for variable in tape.watched_variables()}
        assert not watched & {id(variable.value) for variable in step.teacher.trainable_variables}
    assert_same_weights(student, model.student, 1e-6)


def scheduled_step() -> DistillStep:
    loss = SoftTargetLoss(temperature=Linear(4.0, 1.0, over="epochs", duration=3))
    student, teacher = models()
    return DistillStep(student, teacher, LogitsDistillation(loss, weight=Linear(1.0, 0.0, over="steps", duration=4)))


def test_a_loop_by_hand_advances_schedules() -> None:
    step = scheduled_step()

    def value() -> float:
        with step.watching():
            output = step.student(X, training=True)
        return float(numpy_of(ops.stop_gradient(step.losses(output)["distillation_loss"])))

    logits = numpy_of(step.student(X)), numpy_of(step.teacher(X))
    for steps, epoch, weight, temperature in [(0, 0, 1.0, 4.0), (1, 1, 0.75, 3.0), (3, 2, 0.25, 2.0), (4, 3, 0.0, 1.0)]:
        step.advance(steps, epoch)
        expected = weight * kl64(*logits, temperature).mean()
        assert value() == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.tensorflow
def test_a_graph_traced_by_hand_follows_schedules() -> None:
    import tensorflow as tf

    step = scheduled_step()
    step.advance(0, 0)

    @tf.function
    def weight_and_loss() -> Any:
        with step.watching():
            output = step.student(X, training=True)
        losses = step.losses(output)
        return losses["distillation_loss"] / losses["logits_loss"]

    ratios = [float(weight_and_loss())]
    for steps in (1, 3):
        step.advance(steps, 0)
        ratios.append(float(weight_and_loss()))
    np.testing.assert_allclose(ratios, [1.0, 0.75, 0.25], rtol=1e-5)


def test_schedules_that_a_loop_does_not_advance_are_refused() -> None:
    step = scheduled_step()
    with step.watching():
        output = step.student(X)
    with pytest.raises(ValueError, match=r"Expected a call of `advance` before a training step.*Call step\.advance"):
        step.losses(output)
    assert set(step.losses(output, training=False)) == {"distillation_loss", "logits_loss"}
    with pytest.raises(ValueError, match="epoch"):
        step.advance(2)


def test_layers_of_another_output_are_refused_and_terms_on_outputs_go_on() -> None:
    student, teacher = models()
    step = DistillStep(student, teacher, both())
    with step.watching():
        output = ops.softmax(student(X))
    with pytest.raises(ValueError, match="Expected the output that the student returned in this step"):
        step.losses(output)
    alone = DistillStep(student, teacher, LogitsDistillation(SoftTargetLoss(temperature=1.0)))
    value = float(numpy_of(ops.stop_gradient(alone.losses(output, X)["logits_loss"])))
    assert value == pytest.approx(kl64(numpy_of(output), numpy_of(teacher(X)), 1.0).mean(), rel=1e-4)


class PerExample(DistillationTerm):
    """One value for each example, as the losses of Keras return them."""

    def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(ops.square(student.output - teacher.output), axis=-1)


class Mean(PerExample):
    def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(super().compute(student, teacher))


def test_values_of_each_example_are_averaged() -> None:
    """Without that, TensorFlow's gradient is their sum, and the log shows the mean."""
    vectors, means = distilled([PerExample(name="gap")]), distilled([Mean(name="gap")])
    logs, expected = (model.fit(X, Y, **FIT).history for model in (vectors, means))
    assert logs == expected
    assert_same_weights(vectors, means, 1e-6)
    raw = LogitsDistillation(SoftTargetLoss(reduction="none"))
    usual = LogitsDistillation(SoftTargetLoss())
    assert distilled([raw]).fit(X, Y, **FIT).history == distilled([usual]).fit(X, Y, **FIT).history


def test_a_list_of_terms_serves_a_loop_over_widths() -> None:
    terms = both()
    trained = []
    for width in (5, 7, 5):
        model = distilled(terms, width=width)
        trained.append(model.fit(X, Y, epochs=2, **FIT).history)
        assert tuple(model.terms[1].adapters[0].kernel.shape) == (width, 6)
    assert trained[0] == trained[2] != trained[1]


def test_an_adapter_that_is_a_layer_is_trained_by_one_model_and_copied_by_others() -> None:
    adapter = keras.layers.Dense(6, name="own")
    terms = FeatureDistillation("hidden", "hidden", adapter=adapter)
    first, second = distilled(terms), distilled(terms, width=7)
    assert [tuple(model.terms[0].adapters[0].kernel.shape) for model in (first, second)] == [(5, 6), (7, 6)]
    assert first.terms[0].adapters == [adapter]
    for model in (first, second):
        assert any(model.terms[0].adapters[0].kernel is variable for variable in model.trainable_variables)
    before = second.terms[0].adapters[0].get_weights()
    first.fit(X, Y, **FIT)
    np.testing.assert_array_equal(before[0], second.terms[0].adapters[0].get_weights()[0])


def test_weights_of_an_adapter_that_is_built_already_are_where_each_model_starts() -> None:
    adapter = keras.layers.Dense(6, kernel_initializer="ones")
    adapter.build((None, 5))
    terms = FeatureDistillation("hidden", "hidden", adapter=adapter)
    first = distilled(terms)
    first.fit(X, Y, **FIT)
    [copy] = distilled(terms).terms[0].adapters
    assert copy is not adapter
    np.testing.assert_array_equal(copy.get_weights()[0], np.ones((5, 6)))


def test_an_assignment_to_a_term_counts_in_every_model_from_the_next_step_on() -> None:
    terms = both()
    first, second = distilled(terms), distilled(terms)
    first.fit(X, Y, **FIT)
    terms[0].weight, terms[0].temperature = 0.25, 3.0
    for model in (first, second):
        assert (model.terms[0].weight, model.terms[0].temperature) == (0.25, 3.0)
        logs = model.evaluate(X, Y, verbose=0, return_dict=True)
        expected = kl64(numpy_of(model.student(X)), numpy_of(model.teacher(X)), 3.0).mean()
        assert logs["logits_loss"] == pytest.approx(expected, rel=1e-4)
        total = 0.25 * logs["logits_loss"] + logs["hidden_loss"]
        assert logs["distillation_loss"] == pytest.approx(total, rel=1e-5)
    second.terms[0].weight = 0.0
    assert terms[0].weight == first.terms[0].weight == 0.0


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1", True])
def test_a_weight_is_checked_when_it_is_assigned(value: Any) -> None:
    model = distilled(both())
    for assign in (lambda: setattr(model.terms[0], "weight", value), lambda: setattr(model, "task_weight", value)):
        with pytest.raises((TypeError, ValueError), match=r"Expected `(task_)?weight` to be"):
            assign()
    assert model.terms[0].weight == model.task_weight == 1.0


def test_assigning_a_setting_that_has_a_schedule_raises() -> None:
    model = distilled(LogitsDistillation(weight=Linear(1.0, 0.0)), task_weight=Linear(0.0, 1.0))
    with pytest.raises(
        ValueError, match="Expected `weight` of term 'logits' not to be assigned while it has a schedule"
    ):
        model.terms[0].weight = 0.5
    with pytest.raises(ValueError, match="Expected `task_weight` not to be assigned while it has a schedule"):
        model.task_weight = 0.5


class Heated(keras.losses.Loss):
    """A user's own loss, which needs its temperature as a number."""

    def __init__(self, temperature: float = 2.0, name: str = "heated") -> None:
        super().__init__(name=name)
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.mean(ops.square(y_pred - y_true), axis=-1) * float(np.log(self.temperature))

    def get_config(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "name": self.name}


def test_a_loss_of_the_users_with_a_temperature_is_saved_loaded_and_heated(tmp_path: Any) -> None:
    student, teacher = models()
    model = DistillModel(student, teacher, LogitsDistillation(Heated(2.0)))
    model.compile("sgd", jit_compile=False)
    first = model.fit(X, **FIT).history["logits_loss"][0]
    model.optimizer.learning_rate = 0.0
    second = model.fit(X, **FIT).history["logits_loss"][0]
    model.terms[0].temperature = 4.0
    assert model.fit(X, **FIT).history["logits_loss"][0] == pytest.approx(2 * second, rel=1e-5) != first
    model.save(tmp_path / "model.keras")
    back = keras.models.load_model(tmp_path / "model.keras", custom_objects={"Heated": Heated})
    assert back.terms[0].loss.temperature == back.terms[0].temperature == 4.0


def test_targets_may_be_unlabelled_in_a_data_set() -> None:
    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return X, DistillTargets(np.zeros((8, 0)), np.ones((8, 3), "float32"))

    model = DistillModel(mlp())
    model.compile("sgd", jit_compile=False)
    logs = model.fit(Batches(), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert "task_loss" not in logs


def test_evaluate_returns_plain_floats() -> None:
    model = distilled()
    assert all(type(value) is float for value in model.evaluate(X, Y, verbose=0))
    assert all(type(value) is float for value in model.evaluate(X, Y, verbose=0, return_dict=True).values())


def test_without_distillation_the_loss_of_evaluation_is_that_of_the_task() -> None:
    model = distilled(evaluate_distillation=False, task_weight=0.0)
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(logs["task_loss"]) != 0.0
