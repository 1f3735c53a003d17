"""The levels of a feature pyramid in one Keras term: values by hand, pairs, files, stored targets, wrong structures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_dense_nets import IMAGES, SCORES, adapted, distilled, maps_of, mean_square, net, value
from keras_nets import assert_same_logs, assert_same_weights

from keras_distill import (
    DistillModel,
    DistillTargets,
    FeatureDistillation,
    MarginReLULoss,
    ReviewDistillation,
    SelfDistillation,
    Tap,
)
from keras_distill.recording import Call

ALL = Tap("neck", output="*")


def by_hand(student: keras.Model, teacher: keras.Model, adapters: Any) -> float:
    """The mean over both levels; the adapters are those of the names in the order of the alphabet."""
    pairs = zip(adapters, maps_of(student)[::-1], maps_of(teacher)[::-1], strict=True)
    return sum(mean_square(adapted(adapter, own), other) for adapter, own, other in pairs) / 2


def test_named_levels_are_compared_through_an_adapter_each() -> None:
    student, teacher = net(3, 1), net(5, 2)

    total, term = value(FeatureDistillation(ALL, ALL), student, teacher)

    assert [tuple(adapter.kernel.shape) for adapter in term.adapters] == [(1, 1, 3, 5)] * 2
    assert total == pytest.approx(by_hand(student, teacher, term.adapters), rel=1e-5)


@pytest.mark.parametrize("kind", ["list", "tuple"])
def test_levels_without_names_are_compared_in_their_order(kind: str) -> None:
    student, teacher = net(3, 1, kind), net(5, 2, "list")

    total, term = value(FeatureDistillation(ALL, ALL), student, teacher)

    assert total == pytest.approx(by_hand(student, teacher, term.adapters[::-1]), rel=1e-5)


def test_one_term_on_all_levels_equals_a_term_that_names_them() -> None:
    student, teacher = net(3, 1), net(3, 2)
    named = [Tap("neck", output=name) for name in ("coarse", "fine")]

    assert value(FeatureDistillation(ALL, ALL, "l1"), student, teacher)[0] == pytest.approx(
        value(FeatureDistillation(named, named, "l1"), student, teacher)[0], rel=1e-6
    )


def test_named_levels_are_paired_by_their_names_whatever_their_order() -> None:
    student, teacher = net(3, 1), net(3, 2, names=("coarse", "fine"))

    total, _ = value(FeatureDistillation(ALL, ALL, adapter=None), student, teacher)

    (fine, coarse), (large, small) = maps_of(student), maps_of(teacher)  # the teacher calls its large map "coarse"
    down = large.reshape(4, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    up = np.asarray(keras.ops.convert_to_numpy(keras.ops.image.resize(small.astype("float32"), (8, 8))), "float64")
    assert total == pytest.approx((mean_square(coarse, down) + mean_square(fine, up)) / 2, rel=1e-4)


def test_the_input_of_a_head_may_be_a_list_of_maps() -> None:
    student, teacher = net(3, 1), net(3, 2)
    into_head = Tap("head", output="*", where="input")

    total, term = value(FeatureDistillation(into_head, into_head), student, teacher)

    assert total == pytest.approx(by_hand(student, teacher, term.adapters), rel=1e-5)


def test_the_path_to_a_pyramid_may_be_nested() -> None:
    student, teacher = net(3, 1, "nested"), net(3, 2)

    total, term = value(FeatureDistillation(Tap("neck", output=("maps", "*")), ALL), student, teacher)

    assert total == pytest.approx(by_hand(student, teacher, term.adapters), rel=1e-5)


def test_a_single_map_is_a_pyramid_of_one_level() -> None:
    student, teacher = net(3, 1), net(3, 2)
    fine = Tap("neck/level0", output="*")

    total, _ = value(FeatureDistillation(fine, fine, name="fine"), student, teacher)

    assert total == pytest.approx(mean_square(maps_of(student)[0], maps_of(teacher)[0]), rel=1e-5)


def test_a_loss_with_several_layers_gets_the_lists_of_levels() -> None:
    levels = [Tap("head", output=index, where="input") for index in (0, 1)]
    into_head = Tap("head", output="*", where="input")
    student, teacher = net(3, 1), net(3, 2)

    class Counting(keras.losses.Loss):
        several_layers = True

        def call(self, y_true: Any, y_pred: Any) -> Any:
            return 10.0 * len(y_pred) + len(y_true) + 0.0 * keras.ops.mean(y_pred[0])

    assert value(FeatureDistillation(into_head, into_head, Counting()), student, teacher)[0] == 22
    assert value(FeatureDistillation(levels, levels, Counting()), student, teacher)[0] == 22


def test_a_review_fuses_the_levels_of_a_pyramid() -> None:
    student, teacher = net(3, 1, "list"), net(5, 2, "list")
    named = [Tap("neck", output=index) for index in (0, 1)]
    values = []
    for layers in (ALL, named):
        keras.utils.set_random_seed(0)
        values.append(value(ReviewDistillation(layers, layers, "mse"), student, teacher)[0])

    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_levels_of_one_network_can_teach_those_of_another_layer() -> None:
    term = SelfDistillation(ALL, Tap("head", output="*", where="input"), adapter=None)

    assert value(term, net(3, 1, "list"), None)[0] == 0  # the same maps


@pytest.mark.parametrize("widths", [(4, 5), (5, 5)])
def test_each_of_several_teachers_is_compared_at_every_level(widths: tuple[int, int]) -> None:
    student, teachers = net(3, 1), [net(width, seed) for width, seed in zip(widths, (2, 7), strict=True)]

    total, term = value(FeatureDistillation(ALL, ALL), student, teachers)

    assert len(term.adapters) == (4 if widths[0] != widths[1] else 2)
    each = [by_hand(student, teacher, part) for teacher, part in zip(teachers, _halves(term.adapters), strict=True)]
    assert total == pytest.approx(sum(each) / 2, rel=1e-5)


def _halves(adapters: list[Any]) -> list[list[Any]]:
    return [adapters[:2], adapters[-2:]]


@keras.saving.register_keras_serializable(package="dense")
def by_corner(images: Any) -> Any:
    return keras.ops.cast(images[:, 0, 0, 0] > 0, "int32")


@pytest.mark.parametrize("widths", [(4, 5), (5, 5)])
def test_a_route_gives_each_image_the_levels_of_its_own_teacher(widths: tuple[int, int]) -> None:
    student, teachers = net(3, 1), [net(width, seed) for width, seed in zip(widths, (2, 7), strict=True)]
    model = DistillModel(student, teachers, FeatureDistillation(ALL, ALL), route=by_corner)
    model.compile("sgd", run_eagerly=True)

    total = model.evaluate(IMAGES, verbose=0, return_dict=True)["neck_loss"]

    expected, chosen = 0.0, (IMAGES[:, 0, 0, 0] > 0).astype(int)
    for number, teacher in enumerate(teachers):
        rows = chosen == number
        maps, targets = maps_of(student)[::-1], maps_of(teacher)[::-1]
        for adapter, own, other in zip(_halves(model.terms[0].adapters)[number], maps, targets, strict=True):
            expected += rows.sum() / 4 * mean_square(adapted(adapter, own[rows]), other[rows]) / 2
    assert 0 < chosen.sum() < 4
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.tensorflow
@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {}, {"jit_compile": True}], ids=["eager", "graph", "xla"])
def test_fit_trains_the_adapters_of_all_levels_alike_in_every_way(compiled: dict[str, Any]) -> None:
    model, reference = (distilled(FeatureDistillation(ALL, ALL), **each) for each in (compiled, {"run_eagerly": True}))
    untrained = [adapter.get_weights()[0] for adapter in model.terms[0].adapters]

    logs = [each.fit(IMAGES, SCORES, 2, 1, shuffle=False, verbose=0).history for each in (model, reference)]

    assert_same_logs(*logs, 1e-4)
    assert_same_weights(model, reference, 1e-5)
    trained = [adapter.get_weights()[0] for adapter in model.terms[0].adapters]
    assert not any(np.allclose(before, after) for before, after in zip(untrained, trained, strict=True))


def test_a_loaded_model_ends_where_a_straight_run_does(tmp_path: Path) -> None:
    straight, first = (distilled(FeatureDistillation(ALL, ALL), run_eagerly=True) for _ in range(2))
    arguments = {"batch_size": 2, "shuffle": False, "verbose": 0}
    logs = straight.fit(IMAGES, SCORES, epochs=2, **arguments).history
    first.fit(IMAGES, SCORES, epochs=1, **arguments)
    first.save(tmp_path / "model.keras")

    second = keras.models.load_model(tmp_path / "model.keras")
    assert second.terms[0].student_taps == second.terms[0].teacher_taps == [ALL]
    second.teacher, second.run_eagerly = first.teacher, True
    again = second.fit(IMAGES, SCORES, epochs=2, initial_epoch=1, **arguments).history

    assert_same_logs(again, {key: values[1:] for key, values in logs.items()}, 1e-5)
    assert_same_weights(second, straight, 1e-6)


def test_a_nested_path_comes_back_from_a_file() -> None:
    term = FeatureDistillation(Tap("neck", output=("maps", "*")), ALL)

    config = keras.saving.serialize_keras_object(term)
    copy = keras.saving.deserialize_keras_object(keras.tree.map_structure(lambda leaf: leaf, config))

    assert (copy.student_taps, copy.teacher_taps) == (term.student_taps, term.teacher_taps)


def test_stored_targets_hold_the_levels_by_their_names() -> None:
    live, stored = (distilled(FeatureDistillation(ALL, ALL), run_eagerly=True) for _ in range(2))
    targets = live.teacher_targets(IMAGES, SCORES)
    stored.teacher = None

    assert sorted(targets.teacher["features"]) == ["neck['coarse']", "neck['fine']"]
    logs = [model.fit(IMAGES, y, 4, 1, verbose=0).history for model, y in ((live, SCORES), (stored, targets))]
    assert_same_logs(*logs, 1e-6)


def test_a_model_without_a_teacher_learns_its_levels_from_the_targets() -> None:
    targets = distilled(FeatureDistillation(ALL, ALL)).teacher_targets(IMAGES, SCORES)
    numpy = DistillTargets(SCORES, keras.tree.map_structure(keras.ops.convert_to_numpy, targets.teacher))
    model = DistillModel(net(3, 1), None, FeatureDistillation(ALL, ALL))
    model.compile("sgd", "mse", run_eagerly=True)

    model.fit(IMAGES, numpy, 4, 1, verbose=0)

    assert [adapter.kernel.shape[-1] for adapter in model.terms[0].adapters] == [5, 5]


def test_more_than_ten_levels_keep_their_order() -> None:
    features = {f"neck[{index}]": np.full((2, 3), float(index)) for index in reversed(range(12))}
    call = Call(None, features=features, who="teacher")

    assert [level.output for level in call.levels(ALL)] == list(range(12))


def test_a_balanced_weight_is_measured_at_all_levels() -> None:
    model = distilled(FeatureDistillation(ALL, ALL, weight="balanced"), run_eagerly=True)

    model.fit(IMAGES, SCORES, 2, 1, verbose=0)

    assert model.terms[0].weight > 0


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (
            {"names": ("p3", "pool")},
            {},
            r"Expected student layer 'neck' and teacher layer 'neck' to return the same levels for output='\*'\. Name"
            r" the levels to compare: \[Tap\('neck', output='p3'\), \.\.\.\]\. Received: \['p3', 'pool'\] and \['coa",
        ),
        (
            {},
            {"kind": "list"},
            r"to return the same levels for output='\*'\..* Received: \['coarse', 'fine'\] and \[0, 1\]",
        ),
        (
            {"kind": "nested"},
            {},
            r"Expected the output of student layer 'neck' to hold a dict, list or tuple of tensors for output='\*'\."
            r" Pass the path to it, such as output=\('feature_maps', '\*'\), .* Received: a dict of \['maps', 'more'\]",
        ),
    ],
    ids=["other names", "a dict and a list", "no pyramid"],
)
def test_other_levels_are_refused_when_the_model_is_made(student: Any, teacher: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillModel(net(3, 1, **student), net(3, 2, **teacher), FeatureDistillation(ALL, ALL))


def test_pyramids_of_other_depths_are_refused() -> None:
    fine = Tap("neck/level0", output="*")

    with pytest.raises(ValueError, match=r"to return the same levels .* Received: \['coarse', 'fine'\] and \[None\]"):
        DistillModel(net(3, 1), net(3, 2), FeatureDistillation(ALL, fine))


def test_a_path_to_nothing_is_refused() -> None:
    missing = Tap("neck", output=("maps", "*"))

    with pytest.raises(
        ValueError, match=r"tensors for output=\('maps', '\*'\)\. .* Received: a dict of \['coarse', 'f"
    ):
        DistillModel(net(3, 1), net(3, 2), FeatureDistillation(missing, ALL))


def test_one_layer_cannot_be_the_adapter_of_several_levels() -> None:
    term = FeatureDistillation(ALL, ALL, adapter=keras.layers.Conv2D(5, 1))

    with pytest.raises(ValueError, match=r"`adapter` not to be one layer for several pairs\. Pass a function"):
        DistillModel(net(3, 1), net(5, 2), term)


def test_a_new_teacher_with_other_levels_is_refused() -> None:
    model = distilled(FeatureDistillation(ALL, ALL))

    with pytest.raises(ValueError, match=r"to return the same levels for output='\*'"):
        model.teacher = net(5, 2, names=("fine", "other"))
    assert model.fit(IMAGES, SCORES, 4, 1, verbose=0).history["neck_loss"][0] > 0  # with the teacher that it had


def test_a_loss_that_reads_the_teacher_s_layers_takes_single_layers() -> None:
    with pytest.raises(
        ValueError, match=r"Expected single layers for MarginReLULoss, which takes numbers from the tea"
    ):
        FeatureDistillation(ALL, ALL, MarginReLULoss())
