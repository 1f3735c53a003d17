"""Keras' losses on candidates, boxes, pixels and layers: several inputs, weights, and the words of their errors."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras_loss_cases import as_array, fill
from learned_golden import focal_global_parameters, focal_global_settings, published_weights
from loss_case import golden_arrays, golden_index

import lightning_distill
from keras_distill import (
    ActivationBoundaryLoss,
    AlphaBetaLoss,
    DistillModel,
    FeatureDistillation,
    FocalGlobalLoss,
    HardTargetLoss,
    ListwiseKLLoss,
    LocalizationLoss,
    MarginMSELoss,
    MinifinetuningLoss,
    PixelRelationLoss,
    SimpleRecipeLoss,
    SolutionFlowLoss,
    TAIDLoss,
    functional,
)
from keras_distill.terms.weighing import weigh


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Nothing of what other tests need: no test here trains a model, and each clean-up would take a second."""


def drawn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("entry", golden_index("fsp"), ids=lambda entry: entry["case"])
def test_flow_between_two_layers_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    """In case s2 the first map is larger: it is averaged down."""
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float32"]
    student, teacher = (
        [np.moveaxis(arrays[f"{side}_{layer}"], 1, -1) for layer in range(2)] for side in ("student", "teacher")
    )

    np.testing.assert_allclose(as_array(SolutionFlowLoss()(teacher, student)), arrays["loss"], **tolerance)


def test_flow_through_three_layers_is_the_sum_of_two_flows() -> None:
    student, teacher = ([drawn(2, 3, 3, width, seed=seed + width) for width in (2, 3, 4)] for seed in (0, 10))

    value = as_array(functional.solution_flow(student, teacher))

    parts = [functional.solution_flow(student[part], teacher[part]) for part in (slice(0, 2), slice(1, 3))]
    np.testing.assert_allclose(value, sum(map(as_array, parts)), rtol=1e-5)


def test_boxes_of_weight_zero_do_not_count_in_a_term() -> None:
    student, teacher = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    weights = np.array([[1, 0, 1], [0, 0, 1]], "float32")
    loss = LocalizationLoss(3.0, reduction="sum")

    value = float(weigh(loss, ops.convert_to_tensor(student), ops.convert_to_tensor(teacher), sample_weight=weights))

    counted = weights.astype(bool)
    assert value == pytest.approx(float(loss(teacher[counted], student[counted])), rel=1e-5)


def test_boxes_of_a_map_have_their_edges_and_bins_in_one_dimension() -> None:
    student, teacher = drawn(2, 5, 6, 4 * 3), drawn(2, 5, 6, 4 * 3, seed=1)
    with pytest.raises(ValueError, match=r"Pass bins=<number of bins> for the output of a head, \(N, H, W, 4 B\)"):
        LocalizationLoss()(teacher, student)

    value = float(LocalizationLoss(bins=3)(teacher, student))

    boxes = [ops.reshape(bins, (-1, 5, 6, 4, 3)) for bins in (teacher, student)]
    assert value == pytest.approx(float(LocalizationLoss()(*boxes)), rel=1e-6)


def test_other_numbers_of_bins_are_refused() -> None:
    words = r"Expected `student_bins` and `teacher_bins` to have 4 bins for each of 4 edges in the last dimension"
    with pytest.raises(ValueError, match=words):
        LocalizationLoss(bins=4)(drawn(2, 12), drawn(2, 12))


def test_weights_of_boxes_are_those_of_the_other_half() -> None:
    boxes = np.array(
        [[[0, 0, 9, 17], [3, 4, 30, 20], [5, 5, 5, 9]], [[8, 8, 16, 16], [-1, -1, -1, -1], [0, 0, 32, 24]]]
    )

    weights = as_array(functional.foreground_weights(ops.convert_to_tensor(boxes), (24, 32), (6, 7)))

    expected = lightning_distill.functional.foreground_weights(torch.tensor(boxes), (24, 32), (6, 7))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert (weights == 0).any()


def test_images_may_have_different_numbers_of_boxes() -> None:
    boxes = [np.array([[0.0, 0.0, 8.0, 8.0]], "float32"), np.zeros((0, 4), "float32")]

    weights = as_array(functional.foreground_weights(boxes, (16, 16), (2, 2)))

    assert weights.tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("entry", golden_index("fgd"), ids=lambda entry: entry["case"])
def test_focal_and_global_distillation_equals_the_published_implementation(entry: dict) -> None:
    """Where the channels differ, the reference's own alignment is an adapter: here it is applied first."""
    arrays, settings = golden_arrays(entry), entry["hyperparameters"]
    student, teacher = (np.moveaxis(arrays[f"{side}_feat"], 1, -1) for side in ("student", "teacher"))
    if "param_align.weight" in arrays:
        student = student @ arrays["param_align.weight"][:, :, 0, 0].T + arrays["param_align.bias"]
    loss = FocalGlobalLoss(**focal_global_settings(settings), dtype="float32")
    loss.build(student.shape, teacher.shape)
    fill(loss, focal_global_parameters(arrays))

    value = loss((teacher.astype("float32"), published_weights(arrays).numpy()), student.astype("float32"))

    np.testing.assert_allclose(float(value), arrays["loss"], **entry["tolerance_suggested"]["float32"])


def test_a_ramp_is_part_of_the_config_and_its_number_is_not() -> None:
    loss = TAIDLoss(start=0.2, end=0.8, duration=3, over="epochs")

    config = loss.get_config()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))

    assert {name: config[name] for name in ("start", "end", "duration", "over")} == {
        "start": 0.2,
        "end": 0.8,
        "duration": 3.0,
        "over": "epochs",
    }
    assert "interpolation" not in config
    assert repr(again.schedules["interpolation"]) == repr(loss.schedules["interpolation"])


def test_a_batch_of_one_example_teaches_the_simple_recipe_nothing() -> None:
    loss = SimpleRecipeLoss()
    loss.build((None, 4), (None, 3))

    assert float(loss(drawn(1, 3), drawn(1, 4))) == 0


FLOW = SolutionFlowLoss().call
REFUSED: dict[str, tuple[Any, str]] = {
    "scores of other candidates": (
        lambda: MarginMSELoss()(drawn(4, 6), drawn(4, 5)),
        r"`student_scores` and `teacher_scores` to have equal shapes\. Both models must score the same candidates",
    ),
    "one candidate": (
        lambda: ListwiseKLLoss()(drawn(20, 1), drawn(20, 1)),
        r"a row for each query with 2 candidates or more, shape \(N, K\)\. Reshape the scores .* \(20, 1\)",
    ),
    "temperature": (lambda: ListwiseKLLoss(teacher_temperature=0), r"`teacher_temperature` to be greater than 0"),
    "exponent": (lambda: AlphaBetaLoss(alpha=float("inf")), r"`alpha` to be finite\. Received: alpha=inf"),
    "start": (lambda: TAIDLoss(start=0.0), r"`start` to be greater than 0\. Received: start=0\.0"),
    "end": (lambda: TAIDLoss(end=1.5), r"`end` to be from 0 to 1\. Received: end=1\.5"),
    "share": (
        lambda: functional.interpolated_kl(drawn(2, 3), drawn(2, 3), interpolation=2.0),
        r"`interpolation` to be from 0 to 1\. Received: interpolation=2\.0",
    ),
    "threshold": (lambda: MinifinetuningLoss(threshold=1.0), r"`threshold` to be .* Received: threshold=1\.0"),
    "bins": (
        lambda: LocalizationLoss()(drawn(2, 4, 6), drawn(2, 4, 5)),
        r"`student_bins` and `teacher_bins` to have equal shapes\. Both models must have the same boxes and bins",
    ),
    "rows of bins": (
        lambda: LocalizationLoss()(drawn(8, 5), drawn(8, 5)),
        r"2 bins or more for each of 4 edges, shape \(N, \.\.\., 4, B\)\. .* Received: shape \(8, 5\)",
    ),
    "pixels": (
        lambda: PixelRelationLoss()(drawn(2, 3, 3, 4), drawn(2, 2, 2, 4)),
        r"the same examples and positions, with more than one position\. Resize the teacher's",
    ),
    "margin": (lambda: ActivationBoundaryLoss(margin=0.0), r"`margin` to be greater than 0\. Received: margin=0\.0"),
    "one layer": (
        lambda: FLOW([drawn(2, 3, 3, 4)], [drawn(2, 3, 3, 4)]),
        r"to be lists of as many features, at least 2\. Name two layers or more\. Received: 1 and 1",
    ),
    "vectors": (lambda: FLOW([drawn(2, 3)] * 2, [drawn(2, 3)] * 2), r"to be maps \(N, H, W, C\) or tokens \(N, L, C\)"),
    "tokens": (
        lambda: FLOW([drawn(2, 4, 3), drawn(2, 5, 3)], [drawn(2, 4, 3), drawn(2, 4, 3)]),
        r"the same positions, or to be maps \(N, H, W, C\)\. Received: \(2, 4, 3\) and \(2, 5, 3\)",
    ),
    "channels": (
        lambda: FLOW([drawn(2, 3, 3, 4)] * 2, [drawn(2, 3, 3, 4), drawn(2, 3, 3, 5)]),
        r"to have equal shapes\. Map the student's features to the teacher's channels with adapters",
    ),
    "power": (lambda: SimpleRecipeLoss(power=0.5), r"`power` to be at least 1\. Received: power=0\.5"),
    "eps": (lambda: SimpleRecipeLoss(eps=0.0), r"`eps` to be greater than 0\. Received: eps=0\.0"),
    "examples": (
        lambda: functional.log_sum_distance(drawn(4, 5), drawn(3, 5), projection=lambda rows: rows),
        r"the same number of examples and a dimension of channels\. Received: \(4, 5\) and \(3, 5\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_and_settings_that_make_no_sense_raise_in_words(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        make()


def test_a_distillation_head_learns_the_decisions_of_the_teacher() -> None:
    inputs = keras.Input((4,))
    heads = [keras.layers.Dense(3, name=name)(inputs) for name in ("task", "distilled")]
    student = keras.Model(inputs, heads)
    teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="scores")])
    term = FeatureDistillation("distilled", "scores", HardTargetLoss(), adapter=None, name="decisions")
    model = DistillModel(student, teacher, term, teacher_metrics=[])
    model.compile("sgd", [keras.losses.SparseCategoricalCrossentropy(from_logits=True), None])
    x, labels = drawn(8, 4), np.arange(8) % 3

    scores = as_array(student(x)[1])
    logs = model.fit(x, labels, batch_size=8, verbose=0).history

    decisions = as_array(teacher(x)).argmax(-1)
    expected = keras.losses.sparse_categorical_crossentropy(decisions, scores, from_logits=True)
    assert logs["decisions_loss"] == pytest.approx([as_array(expected).mean()], rel=1e-5)
