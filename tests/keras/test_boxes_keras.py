"""Boxes of a batch in Keras terms: values by hand, where batches keep them, graphs, files, wrong boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import oracle_learned
import pytest
from keras import ops
from keras_dense_nets import (
    BOXES,
    IMAGES,
    SCORES,
    TARGETS,
    adapted,
    as_double,
    distilled,
    maps_of,
    net,
    task,
    value,
    weights_by_hand,
)
from keras_nets import assert_same_logs, assert_same_weights

from keras_distill import (
    BinarySoftTargetLoss,
    DistillModel,
    DistillStep,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    Tap,
)
from keras_distill.recording import Recorder
from keras_distill.schedules import Linear

ALL = Tap("neck", output="*")
LARGE = dict.fromkeys(("foreground_weight", "background_weight", "attention_weight", "context_weight"), 0.01)


def focal(**settings: Any) -> FeatureDistillation:
    return FeatureDistillation(ALL, ALL, FocalGlobalLoss(**{**LARGE, **settings}), boxes="boxes")


def parameters_of(loss: Any) -> dict[str, Any]:
    """The contexts' numbers by the names of the oracle."""
    kinds = {"attention": ("kernel", "bias"), "reduce": ("kernel", "bias"), "expand": ("kernel", "bias")}
    named = {}
    for side in ("student_context", "teacher_context"):
        context = getattr(loss.layer, side)
        for layer, (weight, bias) in {**kinds, "norm": ("gamma", "beta")}.items():
            part = getattr(context, layer)
            named[f"{side}.{layer}.weight"] = as_double(getattr(part, weight)).T
            named[f"{side}.{layer}.bias"] = as_double(getattr(part, bias))
    return named


def focal_by_hand(student: keras.Model, teacher: keras.Model, term: Any, **settings: Any) -> float:
    values, pairs = [], zip(maps_of(student)[::-1], maps_of(teacher)[::-1], strict=True)
    for adapter, loss, (own, other) in zip(term.adapters, term.learned, pairs, strict=True):
        first = [np.moveaxis(feature, -1, 1) for feature in (adapted(adapter, own), other)]
        foreground = weights_by_hand(BOXES, own.shape[1:3])
        settings = {**LARGE, **settings}
        values.append(
            oracle_learned.focal_global(*first, parameters=parameters_of(loss), foreground=foreground, **settings)
        )
    return sum(values) / len(values)


def inside_by_hand(student: keras.Model, teacher: keras.Model, boxes: Any = BOXES) -> float:
    """The mean square of the positions in boxes, one by one, averaged over both levels."""
    values = []
    for own, other in zip(maps_of(student), maps_of(teacher), strict=True):
        inside, total, count = weights_by_hand(boxes, own.shape[1:3]), 0.0, 0
        for n, i, j in np.ndindex(*inside.shape):
            if inside[n, i, j] > 0:
                total, count = total + float(np.mean((own[n, i, j] - other[n, i, j]) ** 2)), count + 1
        values.append(total / count)
    return sum(values) / 2


@keras.saving.register_keras_serializable(package="dense")
def doubled(targets: Any) -> Any:
    """Boxes of a batch that has them in pixels of images of half the size."""
    return 2.0 * targets["boxes"]


def test_each_level_of_a_pyramid_has_its_own_weights_of_the_boxes() -> None:
    student, teacher = net(3, 1), net(5, 2)

    total, term = value(focal(), student, teacher, TARGETS)

    assert total == pytest.approx(focal_by_hand(student, teacher, term), rel=1e-5)


def test_trained_contexts_count_too() -> None:
    student, teacher = net(3, 1), net(5, 2)
    _, term = value(focal(context_weight=1.0), student, teacher, TARGETS)
    random = np.random.default_rng(0)
    for loss in term.learned:
        loss.layer.set_weights([random.normal(size=weight.shape) for weight in loss.layer.get_weights()])
    calls = [
        Recorder(model, [ALL], who).forward(IMAGES, training=False)
        for model, who in ((student, "student"), (teacher, "teacher"))
    ]

    total = float(term.compute(*calls, labels=TARGETS))

    assert total == pytest.approx(focal_by_hand(student, teacher, term, context_weight=1.0), rel=1e-4)


def test_other_losses_count_the_positions_in_boxes_alone() -> None:
    student, teacher = net(3, 1), net(3, 2)

    total, _ = value(FeatureDistillation(ALL, ALL, "mse", boxes="boxes"), student, teacher, TARGETS)

    assert total == pytest.approx(inside_by_hand(student, teacher), rel=1e-5)


@pytest.mark.parametrize(
    ("place", "labels", "x"),
    [
        ("boxes", TARGETS, IMAGES),
        (1, (SCORES, BOXES), IMAGES),
        (-1, [SCORES, BOXES.astype("float64")], IMAGES),
        (doubled, {"boxes": BOXES / 2}, IMAGES),
        ("boxes", SCORES, {"images": IMAGES, "boxes": BOXES}),
        ("boxes", TARGETS, {"images": IMAGES, "boxes": BOXES[::-1]}),
    ],
    ids=["key", "index", "index from the end", "function", "key of the inputs", "targets before inputs"],
)
def test_boxes_are_read_where_the_batch_keeps_them(place: Any, labels: Any, x: Any) -> None:
    student, teacher = net(3, 1), net(3, 2)

    total, _ = value(FeatureDistillation(ALL, ALL, boxes=place), student, teacher, labels, x)

    assert total == pytest.approx(inside_by_hand(student, teacher), rel=1e-5)


@pytest.mark.parametrize("padding", [0.0, -1.0, -7.5])
def test_padding_does_not_count(padding: float) -> None:
    student, teacher = net(3, 1), net(3, 2)
    boxes = np.concatenate([BOXES, np.full((4, 5, 4), padding)], axis=1)

    total, _ = value(FeatureDistillation(ALL, ALL, boxes="boxes"), student, teacher, {"boxes": boxes})

    assert total == pytest.approx(inside_by_hand(student, teacher), rel=1e-5)


def test_a_batch_without_any_box_is_zero_for_other_losses_and_all_background_for_focal_distillation() -> None:
    student, teacher, none = net(3, 1), net(3, 2), {"boxes": np.zeros((4, 1, 4))}

    assert value(FeatureDistillation(ALL, ALL, boxes="boxes"), student, teacher, none)[0] == 0
    total, term = value(focal(), student, teacher, none)
    values = []
    for loss, own, other in zip(term.learned, maps_of(student)[::-1], maps_of(teacher)[::-1], strict=True):
        first = [np.moveaxis(feature, -1, 1) for feature in (own, other)]
        empty = np.zeros(own.shape[:3])
        values.append(oracle_learned.focal_global(*first, parameters=parameters_of(loss), foreground=empty, **LARGE))
    assert total == pytest.approx(sum(values) / 2, rel=1e-5)


def test_sample_weights_are_factors_of_the_images() -> None:
    student, teacher, weights = net(3, 1), net(3, 2), np.array([1.0, 0.0, 2.0, 0.0], "float32")
    step = DistillStep(student, teacher, FeatureDistillation(ALL, ALL, "mse", boxes="boxes"))
    with step.watching():
        output = student(IMAGES)

    total = float(step.losses(output, IMAGES, TARGETS, weights)["neck_loss"])

    values = []
    for own, other in zip(maps_of(student), maps_of(teacher), strict=True):
        inside = weights_by_hand(BOXES, own.shape[1:3]) > 0
        apart = np.mean((own - other) ** 2, axis=-1)
        values.append((apart * inside * weights[:, None, None]).sum() / inside.sum())
    assert total == pytest.approx(sum(values) / 2, rel=1e-5)


def test_maps_with_channels_first_are_weighed_at_the_same_positions() -> None:
    def with_layout(seed: int, layout: str) -> keras.Model:
        keras.utils.set_random_seed(seed)
        images = keras.Input((16, 16, 3))
        maps = keras.layers.Conv2D(3, 3, 2, "same", name="maps")(images)
        permuted = keras.layers.Permute((3, 1, 2), name="first")(maps)
        return keras.Model(images, keras.layers.Flatten()(permuted if layout == "first" else maps))

    plain = [with_layout(seed, "last") for seed in (1, 2)]
    turned = [with_layout(seed, "first") for seed in (1, 2)]
    tap = Tap("first", layout="channels_first")
    arguments = {"boxes": "boxes", "name": "maps"}

    values = [
        value(FeatureDistillation(layer, layer, **arguments), *models, TARGETS)[0]
        for layer, models in (("maps", plain), (tap, turned))
    ]

    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_scheduled_setting_of_the_loss_is_followed() -> None:
    settings = {"foreground_weight": Linear(0.0, 1.0, duration=2, over="steps"), "temperature": 2.0}
    term = focal(**settings)
    student, teacher = net(3, 1), net(3, 2)
    step = DistillStep(student, teacher, term)
    for number in (0, 1):
        step.advance(number)
        with step.watching():
            output = student(IMAGES)
        total = float(step.losses(output, IMAGES, TARGETS)["neck_loss"])
        expected = focal_by_hand(student, teacher, step.terms[0], foreground_weight=number / 2, temperature=2.0)
        assert total == pytest.approx(expected, rel=1e-5)


# In a training --------------------------------------------------------------------------------------------------------


def detector(term: Any, **compiled: Any) -> DistillModel:
    return distilled(term, net(5, 2, named=True), net(3, 1, named=True), **compiled)


def fitted(model: DistillModel, targets: Any = TARGETS, x: Any = IMAGES, **settings: Any) -> dict[str, list[float]]:
    arguments = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0, **settings}
    return model.fit(x, targets, **arguments).history


@pytest.mark.tensorflow
@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_graphs_train_contexts_and_adapters_as_eager_steps_do(compiled: dict[str, Any]) -> None:
    model, reference = detector(focal(), **compiled), detector(focal(), run_eagerly=True)
    before = [ops.convert_to_numpy(variable) for variable in model.terms[0].trainable_variables]

    logs = [fitted(each) for each in (model, reference)]

    assert_same_logs(*logs, 1e-4)
    assert_same_weights(model, reference, 1e-5)
    after = [ops.convert_to_numpy(variable) for variable in model.terms[0].trainable_variables]
    changed = [not np.allclose(old, new) for old, new in zip(before, after, strict=True)]
    assert sum(changed) >= 2 * 4  # adapters, and the wide layers of both contexts of each level


def test_the_boxes_beside_the_targets_are_not_for_the_compiled_loss() -> None:
    with_boxes, without = (detector(term, run_eagerly=True) for term in (focal(), FeatureDistillation(ALL, ALL)))
    scores = {name: TARGETS[name] for name in ("fine", "coarse")}

    assert fitted(with_boxes, epochs=1, batch_size=4)["task_loss"] == pytest.approx(
        fitted(without, scores, epochs=1, batch_size=4)["task_loss"], rel=1e-6
    )
    alone = distilled(focal(), run_eagerly=True)
    assert fitted(alone, {"scores": SCORES, "boxes": BOXES}, epochs=1)["task_loss"][0] > 0


def test_compiled_metrics_and_evaluation_do_not_see_the_boxes_either() -> None:
    model = detector(focal())
    model.compile("sgd", "mse", metrics={"fine": ["mae"], "coarse": ["mae"]}, run_eagerly=True)

    logs = model.evaluate(IMAGES, TARGETS, batch_size=4, verbose=0, return_dict=True)

    assert logs["fine_mae"] == pytest.approx(float(np.abs(SCORES - ops.convert_to_numpy(model(IMAGES)["fine"])).mean()))
    assert logs["neck_loss"] == pytest.approx(focal_by_hand(model.student, model.teacher, model.terms[0]), rel=1e-5)


@pytest.mark.parametrize("place", [1, -1, "boxes"])
def test_targets_of_one_output_may_be_a_pair_with_the_boxes(place: Any) -> None:
    model, plain = (distilled(FeatureDistillation(ALL, ALL, boxes=each), run_eagerly=True) for each in (place, "boxes"))
    model.compile("sgd", task, metrics=["mae"], run_eagerly=True)
    plain.compile("sgd", task, metrics=["mae"], run_eagerly=True)
    plain.set_weights(model.get_weights())
    targets = {"scores": SCORES, "boxes": BOXES} if isinstance(place, str) else (SCORES, BOXES)
    weights = np.array([0.0, 1.0, 2.0, 0.5], "float32")

    logs = model.evaluate(IMAGES, targets, sample_weight=weights, batch_size=4, verbose=0, return_dict=True)

    inputs = {"images": IMAGES, "boxes": BOXES}  # where the targets are the scores alone
    expected = plain.evaluate(inputs, SCORES, sample_weight=weights, batch_size=4, verbose=0, return_dict=True)
    assert logs == pytest.approx(expected, rel=1e-6)


def test_a_function_may_find_the_boxes_beside_the_targets_of_named_outputs() -> None:
    by_function, named = (
        detector(FeatureDistillation(ALL, ALL, boxes=each)) for each in (lambda y: y["objects"], "boxes")
    )
    targets = {name: array for name, array in TARGETS.items() if name != "boxes"}

    logs = [fitted(by_function, {**targets, "objects": BOXES}, epochs=1), fitted(named, epochs=1)]

    assert_same_logs(*logs, 1e-6)


def test_weights_of_the_outputs_may_have_an_entry_beside_the_boxes() -> None:
    terms = [FeatureDistillation(ALL, ALL, boxes="boxes"), LogitsDistillation(BinarySoftTargetLoss())]
    model = detector(terms, run_eagerly=True)
    weights = {"fine": np.ones((4, 8, 8)), "coarse": np.ones((4, 4, 4)), "boxes": np.ones(4)}
    model.compile("sgd", {"fine": "mse", "coarse": "mse"}, run_eagerly=True)

    weighted = model.evaluate(IMAGES, TARGETS, sample_weight=weights, verbose=0, return_dict=True)

    assert weighted == pytest.approx(model.evaluate(IMAGES, TARGETS, verbose=0, return_dict=True), rel=1e-6)


def test_a_batch_may_hold_other_pictures_than_the_student_s() -> None:
    model = distilled(FeatureDistillation(ALL, ALL, boxes="boxes"))
    inputs = {"images": IMAGES, "boxes": BOXES, "crop": IMAGES[:, ::2, ::2]}  # "crop" comes before "images"

    assert fitted(model, SCORES, inputs, epochs=1)["neck_loss"][0] > 0


def test_stored_targets_hold_the_boxes_among_their_labels() -> None:
    live, stored = (detector(focal(), run_eagerly=True) for _ in range(2))
    targets = live.teacher_targets(IMAGES, TARGETS)
    stored.teacher = None

    logs = [fitted(model, y, epochs=1, batch_size=4) for model, y in ((live, TARGETS), (stored, targets))]

    assert_same_logs(*logs, 1e-5)


def test_a_loss_of_one_s_own_gets_the_boxes_too() -> None:
    seen = []

    class Detector(DistillModel):
        def task_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
            seen.append(sorted(y))
            return ops.mean(ops.square(y_pred["fine"]))

    model = Detector(net(3, 1, named=True), net(5, 2, named=True), focal())
    model.compile("sgd", run_eagerly=True)

    assert fitted(model, epochs=1)["neck_loss"][0] > 0
    assert seen[0] == ["boxes", "coarse", "fine"]


def test_boxes_of_the_inputs_serve_a_model_with_one_output() -> None:
    model = distilled(FeatureDistillation(ALL, ALL, boxes="boxes", adapter="auto"), run_eagerly=True)

    assert fitted(model, SCORES, {"images": IMAGES, "boxes": BOXES}, epochs=1)["neck_loss"][0] > 0


def test_a_loaded_model_ends_where_a_straight_run_does(tmp_path: Path) -> None:
    def make() -> DistillModel:
        term = FeatureDistillation(ALL, ALL, FocalGlobalLoss(**LARGE), boxes=doubled)
        return detector(term, run_eagerly=True)

    targets = {**TARGETS, "boxes": BOXES / 2}
    straight, first = make(), make()
    for model in (straight, first):
        model.task_loss = lambda x, y, y_pred, sample_weight, training: ops.mean(ops.square(y_pred["fine"]))
    logs = fitted(straight, targets)
    fitted(first, targets, epochs=1)
    del first.task_loss
    first.save(tmp_path / "model.keras")

    second = keras.models.load_model(tmp_path / "model.keras")
    assert second.terms[0].boxes is doubled
    second.task_loss = straight.task_loss
    second.teacher, second.run_eagerly = first.teacher, True
    again = fitted(second, targets, initial_epoch=1)

    assert_same_logs(again, {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)
