"""The student's features through the teacher's frozen head in Keras: values by hand, gradients, files, wrong use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_dense_nets import (
    BOXES,
    FROM_HEAD,
    IMAGES,
    INTO_HEAD,
    NAMES,
    SCORES,
    TARGETS,
    adapted,
    as_double,
    distilled,
    head_by_hand,
    maps_of,
    mean_of_squares,
    net,
    scores_by_hand,
    tower_by_hand,
    value,
    weights_by_hand,
)
from keras_nets import assert_same_logs, assert_same_weights

from keras_distill import (
    CrossHeadDistillation,
    DistillModel,
    DistillStep,
    EMATeacher,
    SoftTargetLoss,
    Tap,
)


def quality(student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any]) -> float:
    """CrossKD's loss of the scores, number by number."""
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        p, q = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t))
        total -= abs(p - q) * (q * math.log(p) + (1 - q) * math.log(1 - p))
    return total / student.size


def by_hand(student: keras.Model, teacher: keras.Model, adapters: Any, loss: Any = quality) -> float:
    """The mean over both levels, the fine one first."""
    head, values = teacher.get_layer("head"), []
    for adapter, own, other in zip(adapters, maps_of(student), maps_of(teacher), strict=True):
        values.append(loss(head_by_hand(head, adapted(adapter, own)), head_by_hand(head, other)))
    return sum(values) / len(values)


def test_the_predictions_of_all_levels_are_compared() -> None:
    student, teacher = net(3, 1), net(5, 2)

    total, term = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), student, teacher)

    assert [tuple(adapter.kernel.shape) for adapter in term.adapters] == [(1, 1, 3, 5)] * 2
    assert total == pytest.approx(by_hand(student, teacher, term.adapters), rel=1e-4)


def test_named_levels_go_into_the_places_of_their_names() -> None:
    student, teacher = net(3, 1, named=True), net(5, 2, named=True, names=NAMES)

    total, term = value(CrossHeadDistillation(Tap("neck", output="*"), FROM_HEAD, "mse"), student, teacher)

    assert total == pytest.approx(by_hand(student, teacher, term.adapters[::-1], mean_of_squares), rel=1e-4)


def test_a_head_may_be_cut_where_each_level_runs_through_it() -> None:
    """CrossKD's own form: the student's tower, then the teacher's last layer, level by level."""
    student, teacher = net(3, 1), net(5, 2)
    towers = [Tap("head/tower", call=level) for level in range(2)]
    scores = [Tap("head/scores", call=level) for level in range(2)]

    total, term = value(CrossHeadDistillation(towers, scores, "mse"), student, teacher)

    own, other = ([as_double(w) for w in model.get_layer("head").tower.weights] for model in (student, teacher))
    last = [as_double(weight) for weight in teacher.get_layer("head").scores.weights]
    values = []
    for adapter, feature, target in zip(term.adapters, maps_of(student), maps_of(teacher), strict=True):
        crossed = scores_by_hand(adapted(adapter, tower_by_hand(feature, *own)), *last)
        values.append(mean_of_squares(crossed, scores_by_hand(tower_by_hand(target, *other), *last)))
    assert term.name == "cross_head_scores"
    assert total == pytest.approx(sum(values) / 2, rel=1e-4)


def test_the_loss_may_compare_classes() -> None:
    student, teacher = net(3, 1), net(3, 2)

    total, term = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, SoftTargetLoss(1.0)), student, teacher)

    def kl(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
        logs = [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (first, second)]
        return float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1).mean())

    assert term.adapters == [None, None]
    assert total == pytest.approx(by_hand(student, teacher, term.adapters, kl), rel=1e-4)


def test_equal_networks_make_equal_predictions() -> None:
    assert value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), net(3, 1), net(3, 1))[0] == 0


def test_positions_in_boxes_count_alone() -> None:
    student, teacher = net(3, 1), net(3, 2)

    total, _ = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse", boxes="boxes"), student, teacher, TARGETS)

    def inside(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
        counted = weights_by_hand(BOXES, first.shape[1:3]) > 0
        return float(((first - second) ** 2).mean(-1)[counted].mean())

    assert total == pytest.approx(by_hand(student, teacher, [None, None], inside), rel=1e-4)


@pytest.mark.parametrize("widths", [(4, 5), (5, 5)])
def test_several_teachers_have_a_head_and_adapters_each(widths: tuple[int, int]) -> None:
    student, teachers = net(3, 1), [net(width, seed) for width, seed in zip(widths, (2, 7), strict=True)]

    total, term = value(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse"), student, teachers)

    adapters = term.adapters
    assert [adapter.kernel.shape[-1] for adapter in adapters] == [widths[0]] * 2 + [widths[1]] * 2
    first, second = (
        by_hand(student, teacher, pair, mean_of_squares)
        for teacher, pair in zip(teachers, (adapters[:2], adapters[2:]), strict=True)
    )
    assert total == pytest.approx((first + second) / 2, rel=1e-4)


@keras.saving.register_keras_serializable(package="dense")
def by_first_pixel(images: Any) -> Any:
    return ops.cast(images[:, 0, 0, 0] > 0, "int32")


def test_a_route_sends_each_image_through_the_head_of_its_own_teacher() -> None:
    student, teachers = net(3, 1), [net(5, 2), net(5, 7)]
    term = CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse")
    model = DistillModel(student, teachers, term, route=by_first_pixel)
    model.compile("sgd", run_eagerly=True)

    total = model.evaluate(IMAGES, verbose=0, return_dict=True)["cross_head_loss"]

    expected, second = 0.0, IMAGES[:, 0, 0, 0] > 0
    for rows, teacher, pair in zip(
        (~second, second), teachers, (model.terms[0].adapters[:2], model.terms[0].adapters[2:]), strict=True
    ):
        parts = [[level[rows] for level in maps_of(each)] for each in (student, teacher)]
        for adapter, own, other in zip(pair, *parts, strict=True):
            crossed, target = (head_by_hand(teacher.get_layer("head"), m) for m in (adapted(adapter, own), other))
            expected += rows.sum() / 4 * mean_of_squares(crossed, target) / 2
    assert total == pytest.approx(expected, rel=1e-4)


def test_the_head_of_a_moving_average_has_the_averaged_weights() -> None:
    student, average = net(3, 1), net(3, 2)
    step = DistillStep(student, EMATeacher(0.5), CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse"))
    before = [as_double(weight) for weight in student.get_weights()]
    step.averages[0].begin()
    random = np.random.default_rng(0)
    student.set_weights([weight + random.normal(size=weight.shape) for weight in student.get_weights()])
    step.update_teacher()
    average.set_weights([(a + as_double(b)) / 2 for a, b in zip(before, student.get_weights(), strict=True)])
    with step.watching():
        output = student(IMAGES, training=True)

    total = float(step.losses(output, IMAGES)["cross_head_loss"])

    assert total == pytest.approx(by_hand(student, average, [None, None], mean_of_squares), rel=1e-3)


# JAX has float64 only after `jax.config.update("jax_enable_x64", True)`
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.not_jax)])
def test_a_teacher_in_another_precision_reads_the_features_in_its_own(dtype: str) -> None:
    kinds = []
    student, teacher = net(3, 1), net(3, 1)

    class Noting(type(teacher.get_layer("head").scores)):
        def call(self, inputs: Any) -> Any:
            kinds.append(keras.backend.standardize_dtype(inputs.dtype))
            return super().call(inputs)

    teacher.get_layer("head").scores.__class__ = Noting
    step = DistillStep(student, teacher, CrossHeadDistillation(INTO_HEAD, FROM_HEAD, "mse"), teacher_dtype=dtype)
    with step.watching():
        output = student(IMAGES)
    kinds.clear()

    total = float(step.losses(output, IMAGES)["cross_head_loss"])

    assert kinds == [dtype] * 4  # the teacher's own call, and the crossing
    assert 0 <= total < 1e-4
    assert teacher.get_layer("head").scores.dtype_policy.name == "float32"


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.tensorflow
def test_gradients_reach_the_features_and_adapters_and_neither_head() -> None:
    import tensorflow as tf

    student, teacher = net(3, 1), net(5, 2)
    step = DistillStep(student, teacher, CrossHeadDistillation(INTO_HEAD, FROM_HEAD))
    parts = [student.get_layer("neck"), step.terms[0].state, student.get_layer("head"), teacher]
    with tf.GradientTape() as tape, step.watching():
        loss = step.losses(student(IMAGES, training=True), IMAGES)["distillation_loss"]
    flat = [variable for part in parts for variable in part.trainable_variables]
    known = dict(zip(map(id, flat), tape.gradient(loss, flat), strict=True))
    kinds = [{known[id(variable)] is not None for variable in part.trainable_variables} for part in parts]

    assert kinds == [{True}, {True}, {False}, {False}]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # for the student's own head, without a task loss
def test_a_step_leaves_teacher_and_the_student_s_head_as_they_were() -> None:
    model = DistillModel(net(3, 1), net(5, 2), CrossHeadDistillation(INTO_HEAD, FROM_HEAD, weight=10.0))
    model.compile("sgd", run_eagerly=True)
    kept = [*model.teacher.weights, *model.student.get_layer("head").weights]
    moved = [*model.student.get_layer("neck").weights, *model.terms[0].state.trainable_variables]
    before = [[ops.convert_to_numpy(variable) for variable in part] for part in (kept, moved)]

    model.fit(IMAGES, batch_size=4, verbose=0)

    equal = [
        [np.array_equal(old, ops.convert_to_numpy(new)) for old, new in zip(olds, part, strict=True)]
        for olds, part in zip(before, (kept, moved), strict=True)
    ]
    assert all(equal[0])
    assert not any(equal[1])
    if keras.backend.backend() == "torch":
        assert all(variable.value.grad is None for variable in model.teacher.weights)


def test_a_head_with_normalisation_and_dropout_runs_in_inference_mode() -> None:
    def model(seed: int, width: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        images = keras.Input((8, 8, 3))
        maps = keras.layers.Conv2D(width, 1, name="maps")(images)
        inputs = keras.Input((8, 8, width))
        inner = keras.layers.BatchNormalization()(keras.layers.Dropout(0.5, seed=1)(inputs))
        head = keras.Model(inputs, keras.layers.Conv2D(2, 1)(inner), name="head")
        return keras.Model(images, head(maps), name=f"model{seed}")

    student, teacher = model(1, 4), model(2, 4)
    before = [as_double(weight) for weight in teacher.weights]
    term = CrossHeadDistillation("maps", "head", "mse")

    first, second = (value(term, student, teacher, x=IMAGES[:, :8, :8])[0] for _ in range(2))

    assert first == second
    assert all(np.array_equal(old, as_double(new)) for old, new in zip(before, teacher.weights, strict=True))
    crossed = teacher.get_layer("head")(student.get_layer("maps")(IMAGES[:, :8, :8]), training=False)
    assert first == pytest.approx(mean_of_squares(as_double(crossed), as_double(teacher(IMAGES[:, :8, :8]))), rel=1e-4)


# In a training --------------------------------------------------------------------------------------------------------


@pytest.mark.tensorflow
@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_graphs_train_as_eager_steps_do(compiled: dict[str, Any]) -> None:
    term = CrossHeadDistillation(INTO_HEAD, FROM_HEAD, weight=10.0)
    model, reference = (distilled(term, **each) for each in (compiled, {"run_eagerly": True}))

    logs = [each.fit(IMAGES, SCORES, 2, 1, shuffle=False, verbose=0).history for each in (model, reference)]

    assert_same_logs(*logs, 1e-4)
    assert_same_weights(model, reference, 1e-5)


def test_a_loaded_model_ends_where_a_straight_run_does(tmp_path: Path) -> None:
    def make() -> DistillModel:
        return distilled(CrossHeadDistillation(INTO_HEAD, FROM_HEAD, weight=10.0), run_eagerly=True)

    straight, first = make(), make()
    arguments = {"batch_size": 2, "shuffle": False, "verbose": 0}
    logs = straight.fit(IMAGES, SCORES, epochs=2, **arguments).history
    first.fit(IMAGES, SCORES, epochs=1, **arguments)
    first.save(tmp_path / "model.keras")

    second = keras.models.load_model(tmp_path / "model.keras")
    [term] = second.terms
    assert (type(term), term.name, type(term.loss).__name__) == (
        CrossHeadDistillation,
        "cross_head",
        "QualityFocalLoss",
    )
    assert [tap for pair in term.pairs for tap in pair] == [INTO_HEAD, FROM_HEAD]
    second.teacher, second.run_eagerly = first.teacher, True
    again = second.fit(IMAGES, SCORES, epochs=2, initial_epoch=1, **arguments).history

    assert_same_logs(again, {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)


def test_the_student_s_file_holds_neither_head_nor_adapters_of_the_teacher(tmp_path: Path) -> None:
    model = distilled(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), run_eagerly=True)
    model.fit(IMAGES, SCORES, 4, 1, verbose=0)

    model.student.save(tmp_path / "student.keras")

    loaded = keras.models.load_model(tmp_path / "student.keras")
    assert len(loaded.weights) == len(net(3, 1).weights)
