"""The launcher for Keras: hooks in a training function of the user's own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_launch import accuracy, divergence64, launched
from keras_nets import (
    STRUCTURES,
    assert_same_weights,
    ce64,
    cross_entropy,
    log_softmax64,
    mlp,
    numpy_of,
    structured,
    table,
)

from keras_distill import Distillation
from keras_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from keras_distill import KnowledgeDistillationLoss as Knowledge

HALVES = {"temperature": 2.0, "loss_types": ["CE", "KL"], "loss_weights": [0.5, 0.5]}


def ready(criterion: Any = None, **attributes: Any) -> Distillation:
    """A launcher for a loop: by default for logits at temperature 2."""
    return launched(criterion=Knowledge(**HALVES) if criterion is None else criterion, **attributes)


def tape_loop(
    distiller: Distillation, *, epochs: int, compiled: bool = False, rate: float = 0.05
) -> Callable[..., Any]:
    """A training function with every hook, in TensorFlow's own way."""
    import tensorflow as tf

    inputs, labels = table()
    data = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8)
    optimizer = keras.optimizers.Adam(0.05)

    def train_func(student: keras.Model) -> None:
        distiller.on_train_begin()

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                output = student(x, training=True)
                loss = distiller.on_after_compute_loss(x, output, cross_entropy()(y, output))
            variables = student.trainable_variables + distiller.adapter_variables
            distiller.on_before_optimizer_step()
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return loss

        run = tf.function(step) if compiled else step
        for epoch in range(epochs):
            distiller.on_epoch_begin(epoch)
            for number, (x, y) in enumerate(data):
                distiller.on_step_begin(number)
                run(x, y)
                distiller.on_step_end()
            distiller.on_epoch_end()

    return train_func


@pytest.mark.tensorflow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "function"])
def test_a_gradient_tape_loop_trains_as_the_built_in_training_does_n12(compiled: bool) -> None:
    """N12, N1: the same weights, eagerly and in a tf.function."""
    built_in = ready(epochs=3, optimizer=keras.optimizers.Adam(0.05))
    built_in.train_dataloader = [(table()[0][:8], table()[1][:8]), (table()[0][8:], table()[1][8:])]
    distiller = ready()
    distiller.student_model.set_weights(built_in.student_model.get_weights())
    distiller.teacher_model.set_weights(built_in.teacher_model.get_weights())
    distiller.train_func = tape_loop(distiller, epochs=3, compiled=compiled)
    assert_same_weights(distiller.fit(), built_in.fit())


@pytest.mark.tensorflow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "function"])
def test_adapters_train_along_in_a_loop_n6(compiled: bool) -> None:
    """N6, N5: the optimizer updates `adapter_variables`, and the distance of the layers falls."""
    inputs, _ = table()
    distiller = ready(Intermediate([["hidden", "hidden"]], ["MSE"], add_origin_loss=True))
    values: list[float] = []

    def loop(student: keras.Model) -> None:
        tape_loop(distiller, epochs=20, compiled=compiled)(student)
        assert [tuple(variable.shape) for variable in distiller.adapter_variables] == [(8, 12), (12,)]
        values.append(float(numpy_of(distiller.on_after_compute_loss(inputs, student(inputs), 0.0))))

    distiller.on_train_begin()
    values.append(float(numpy_of(distiller.on_after_compute_loss(inputs, distiller.student_model(inputs), 0.0))))
    distiller.train_func = loop
    distiller.fit()
    assert values[1] < 0.5 * values[0]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_total_equals_its_formula_for_models_of_every_kind_n1(structure: str) -> None:
    """N1, N3, N12: `fit` is not needed; the user adds regularisation losses; each model runs once."""
    inputs, labels = table()
    distiller = ready(student_model=structured(structure), teacher_model=structured(structure, 12, name="teacher"))
    distiller.on_train_begin()
    output = distiller.student_model(inputs, training=True)
    total = distiller.on_after_compute_loss(inputs, output, cross_entropy()(labels, output))
    distiller.on_train_end()
    teacher = numpy_of(distiller.teacher_model(inputs, training=False))
    expected = 0.5 * ce64(numpy_of(output), labels).mean() + 0.5 * divergence64("KL", 2.0, numpy_of(output), teacher)
    np.testing.assert_allclose(float(numpy_of(total)), expected, rtol=2e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_are_read_in_the_users_own_call_n5(structure: str) -> None:
    """N5, N12: the features of the call that made the output, with its dropout; an older call does not count."""
    inputs, _ = table()
    student, teacher = structured(structure, dropout=0.5), structured(structure, name="teacher")
    names = ("backbone/norm", "backbone/drop") if structure == "nested" else ("norm", "drop")
    criterion = Intermediate([list(names), ["", ""]], ["L1", "MSE"], [1.0, 2.0])
    distiller = ready(criterion, student_model=student, teacher_model=teacher)
    distiller.on_train_begin()
    output = student(inputs, training=True)
    student(inputs[:3], training=False)
    total = float(numpy_of(distiller.on_after_compute_loss(None, output, 0.0)))
    call = distiller._loop  # the tensors are gone after the loss
    assert call is not None
    assert not call._calls
    distiller.close()
    assert np.isfinite(total)
    assert total > 2.0 * ((numpy_of(output) - numpy_of(teacher(inputs, training=False))) ** 2).mean()


def test_a_feature_that_is_the_teachers_costs_nothing_n5() -> None:
    inputs, _ = table()
    teacher = mlp(name="teacher")
    distiller = ready(Intermediate([["hidden", "hidden"], "logits"], ["MSE", "KL"]), teacher_model=teacher)
    distiller.student_model.set_weights(teacher.get_weights())
    distiller.on_train_begin()
    total = distiller.on_after_compute_loss(inputs, distiller.student_model(inputs), 5.0)
    np.testing.assert_allclose(float(numpy_of(total)), 0.0, atol=1e-6)
    distiller.close()


def test_a_given_teacher_output_spares_the_teacher_n8() -> None:
    """N8: logits alone, and with features; without a teacher model too."""
    inputs, _ = table()
    teacher = structured("functional", name="teacher")
    output, hidden = np.ones((16, 3), "float32"), np.full((16, 8), 3.0, "float32")
    for teacher_model in (teacher, None):
        distiller = ready(teacher_model=teacher_model)
        distiller.on_train_begin()
        student = distiller.student_model(inputs)
        total = distiller.on_after_compute_loss(inputs, student, 2.0, output)
        expected = 1.0 + 0.5 * divergence64("KL", 2.0, numpy_of(student), output)
        np.testing.assert_allclose(float(numpy_of(total)), expected, rtol=2e-5)
        distiller.criterion = Intermediate([["hidden", "hidden"]], ["L1"])
        distiller.on_train_begin()
        student = distiller.student_model(inputs)
        total = distiller.on_after_compute_loss(None, student, 2.0, {"output": output, "features": {"hidden": hidden}})
        feature = np.maximum(inputs @ distiller.student_model.get_weights()[0], 0)
        np.testing.assert_allclose(float(numpy_of(total)), np.abs(feature - 3.0).mean(), rtol=2e-5)
        distiller.close()
    assert float(teacher.get_layer("counter").calls) == 0.0


@pytest.mark.tensorflow
def test_nothing_of_the_teacher_changes_or_gets_a_gradient_n12() -> None:
    """N12: weights, BatchNorm statistics, flags; it runs once a step and in inference mode."""
    import tensorflow as tf

    inputs, _ = table()
    teacher = structured("functional", 12, dropout=0.9, name="teacher")
    before = teacher.get_weights()
    distiller = ready(teacher_model=teacher)
    distiller.on_train_begin()
    with tf.GradientTape() as tape:
        output = distiller.student_model(inputs, training=True)
        total = distiller.on_after_compute_loss(inputs, output, 0.0)
    assert tape.gradient(total, teacher.trainable_variables, unconnected_gradients="none") == [None] * 6
    assert float(teacher.get_layer("counter").calls) == 1.0
    distiller.train_func = tape_loop(distiller, epochs=2)
    distiller.fit()
    for initial, final in zip(before[1:], teacher.get_weights()[1:], strict=True):
        np.testing.assert_array_equal(initial, final)
    assert all(layer.trainable for layer in teacher.layers)
    expected = divergence64("KL", 2.0, numpy_of(output), numpy_of(teacher(inputs, training=False)))
    np.testing.assert_allclose(float(numpy_of(total)), 0.5 * expected, rtol=2e-5)


def test_a_teacher_without_weight_never_runs_in_a_loop_n3() -> None:
    teacher = structured("functional", name="teacher")
    distiller = ready(Knowledge(1.0, ["CE", "KL"], [1.0, 0.0]), teacher_model=teacher)
    distiller.on_train_begin()
    assert distiller.on_after_compute_loss(None, distiller.student_model(table()[0]), 2.0) == 2.0
    assert float(teacher.get_layer("counter").calls) == 0.0
    distiller.close()


def test_a_hard_loss_without_weight_does_not_count_n3() -> None:
    """N3: not even where it is not a number."""
    distiller = ready(Knowledge(1.0, ["CE", "KL"], [0.0, 1.0]))
    distiller.on_train_begin()
    output = distiller.student_model(table()[0])
    assert np.isfinite(float(numpy_of(distiller.on_after_compute_loss(table()[0], output, float("nan")))))
    distiller.close()


def test_probabilities_of_both_models_are_compared_n12() -> None:
    inputs, _ = table()
    models = [keras.Sequential([mlp(width), keras.layers.Softmax()]) for width in (8, 12)]
    distiller = ready(Knowledge(**HALVES, from_logits=False), student_model=models[0], teacher_model=models[1])
    distiller.on_train_begin()
    total = distiller.on_after_compute_loss(inputs, models[0](inputs), 2.0)
    logits = [log_softmax64(numpy_of(model.layers[0](inputs))) for model in models]
    np.testing.assert_allclose(float(numpy_of(total)), 1.0 + 0.5 * divergence64("KL", 2.0, *logits), rtol=2e-5)
    distiller.close()
    distiller.criterion = Knowledge(**HALVES)  # detected by the softmax at the end
    distiller.on_train_begin()
    np.testing.assert_array_equal(
        numpy_of(distiller.on_after_compute_loss(inputs, models[0](inputs), 2.0)), numpy_of(total)
    )
    distiller.close()
    distiller.criterion = Knowledge(**HALVES, from_logits=True)
    with pytest.raises(ValueError, match="output to be logits, since the loss has from_logits=True"):
        distiller.on_train_begin()


def test_a_criterion_of_the_users_own_makes_the_total_of_a_loop_n10() -> None:
    inputs, _ = table()
    distiller = ready(lambda student, teacher, loss: 3.0 * loss + ops.max(ops.abs(student - teacher)))
    distiller.on_train_begin()
    output = distiller.student_model(inputs)
    total = float(numpy_of(distiller.on_after_compute_loss(inputs, output, 2.0)))
    gap = np.abs(numpy_of(output) - numpy_of(distiller.teacher_model(inputs))).max()
    np.testing.assert_allclose(total, 6.0 + gap, rtol=1e-5)
    distiller.close()


@pytest.mark.tensorflow
def test_the_best_student_of_a_loop_is_given_back_n2() -> None:
    """N2: the same object, with its best weights; teacher and student are scored before."""
    scores = iter([0.9, 0.1, 0.2, 0.8, 0.3])
    weights: list[Any] = []

    def score(model: keras.Model) -> dict[str, float]:
        weights.append(model.get_weights())
        return {"accuracy": next(scores), "loss": 9.0}

    distiller = ready(eval_func=score)
    distiller.train_func = tape_loop(distiller, epochs=3)
    student = distiller.student_model
    assert distiller.fit() is student
    assert (distiller.scores.teacher_score, distiller.scores.first_score, distiller.best_score) == (0.9, 0.1, 0.8)
    for value, best in zip(student.get_weights(), weights[3], strict=True):
        np.testing.assert_array_equal(value, best)


@pytest.mark.tensorflow
def test_a_loop_teaches_the_student_n12() -> None:
    distiller = ready(eval_func=accuracy)
    distiller.train_func = tape_loop(distiller, epochs=30, compiled=True)
    built = launched(epochs=30, optimizer=keras.optimizers.Adam(0.05), student_model=distiller.teacher_model)
    built.criterion, built.teacher_model = Knowledge(1.0, ["CE", "CE"], [1.0, 0.0]), None
    built.fit()
    assert accuracy(distiller.fit()) > 0.9


# Hooks that stay behind -----------------------------------------------------------------------------------------------


def failing(distiller: Distillation) -> Callable[..., Any]:
    def train_func(student: keras.Model) -> None:
        distiller.on_train_begin()
        assert distiller.running
        raise RuntimeError("the user's own error")

    return train_func


def test_nothing_stays_on_the_student_after_the_end_or_an_error_n11() -> None:
    """N11: it can be prepared again, and pickles."""
    inputs, _ = table()
    distiller = ready(Intermediate(["hidden"]))
    student = distiller.student_model
    before = dict(vars(student))
    distiller.train_func = failing(distiller)
    with pytest.raises(RuntimeError, match="the user's own error"):
        distiller.fit()
    for _ in range(2):
        distiller.on_train_begin()
    distiller.on_after_compute_loss(inputs, student(inputs), 1.0)
    distiller.on_train_end()
    with distiller:
        distiller.on_train_begin()
    assert vars(student).keys() == before.keys()
    assert "call" not in vars(student)
    assert_same_weights(pickle.loads(pickle.dumps(student)), student)


def test_two_launchers_may_watch_one_student_n11() -> None:
    inputs, _ = table()
    first, second = ready(Intermediate(["hidden"])), ready(Intermediate(["logits"]))
    second.student_model = first.student_model
    first.on_train_begin()
    second.on_train_begin()
    output = first.student_model(inputs)
    values = [numpy_of(launcher.on_after_compute_loss(inputs, output, 0.0)) for launcher in (first, second)]
    assert values[0] != values[1]
    second.close()
    first.close()
    assert "call" not in vars(first.student_model)


@pytest.mark.parametrize(
    "hook",
    [
        lambda d: d.on_epoch_begin(0),
        lambda d: d.on_step_begin(0),
        lambda d: d.on_after_compute_loss(None, 1.0, 1.0),
        lambda d: d.on_before_optimizer_step(),
        lambda d: d.on_step_end(),
        lambda d: d.on_epoch_end(),
        lambda d: d.adapter_variables,
    ],
)
def test_a_hook_before_the_first_one_is_refused_n1(hook: Callable[[Distillation], Any]) -> None:
    with pytest.raises(ValueError, match="Expected `on_train_begin` to be called first"):
        hook(ready())


def test_a_training_function_without_hooks_is_refused_n1() -> None:
    with pytest.raises(ValueError, match=r"Expected `train_func` to call the hooks. Call `on_train_begin` first"):
        ready(train_func=lambda student: None).fit()


def test_a_loss_without_a_call_of_the_student_is_refused_n7() -> None:
    distiller = ready(Intermediate(["hidden"]))
    output = distiller.student_model(table()[0])
    distiller.on_train_begin()
    with pytest.raises(ValueError, match=r"the student to be called before `on_after_compute_loss`. Call it"):
        distiller.on_after_compute_loss(table()[0], output, 1.0)
    distiller.close()


def test_a_loss_without_a_teacher_is_refused_n12() -> None:
    distiller = ready(teacher_model=None)
    distiller.on_train_begin()
    with pytest.raises(ValueError, match="Expected a teacher to learn from"):
        distiller.on_after_compute_loss(table()[0], distiller.student_model(table()[0]), 1.0)
    distiller.close()


def test_a_layer_that_does_not_exist_is_refused_before_the_loop_n5() -> None:
    distiller = ready(Intermediate([["hiden", "hidden"]]))
    with pytest.raises(ValueError, match=r"`student_layer` to name one layer .* Closest: 'hidden'"):
        distiller.on_train_begin()
    assert "call" not in vars(distiller.student_model)
