"""Boxes of a batch that Keras terms refuse, and the words of the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_dense_nets import BOXES, IMAGES, SCORES, TARGETS, distilled, net, value

from keras_distill import (
    DistillModel,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    ReviewDistillation,
    SolutionFlowLoss,
    Tap,
    TeacherCache,
)

ALL = Tap("neck", output="*")


def detector(**compiled: Any) -> DistillModel:
    term = FeatureDistillation(ALL, ALL, FocalGlobalLoss(), boxes="boxes")
    return distilled(term, net(5, 2, named=True), net(3, 1, named=True), **compiled)


WRONG = [
    (BOXES / 16, r"to be left, top, right and bottom in pixels of the student's input\. .* Received: shares of the im"),
    (BOXES[..., [2, 3, 0, 1]], r"Pass a function of the targets that converts them\. Received: a right edge left of"),
    (BOXES * 2, r"Received: an edge beyond the image of 16 x 16 pixels"),
    (BOXES * np.nan, r"Received: a number that is not finite"),
    (BOXES[:, 0], r"boxes='boxes' to be left, top, right and bottom of each box, shape \(N, M, 4\)\. Pad .* \(4, 4\)"),
    (BOXES[..., :3], r"rows without an area do not count\. Received: shape \(4, 3, 3\)"),
    (None, r"the targets to hold the boxes of each image at boxes='boxes'\. Pass a key .* Received: the keys \['coa"),
]


@pytest.mark.parametrize(
    ("boxes", "words"), WRONG, ids=["shares", "swapped", "large", "nan", "flat", "three", "missing"]
)
def test_wrong_boxes_are_refused_before_the_first_step(boxes: Any, words: str) -> None:
    targets = {**TARGETS, "boxes": boxes}
    targets = {name: array for name, array in targets.items() if array is not None}
    model = detector(jit_compile=True)
    before = model.get_weights()

    with pytest.raises(ValueError, match=words):
        model.fit(IMAGES, targets, verbose=0)

    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_wrong_boxes_of_a_batch_are_refused_too() -> None:
    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        detector().train_on_batch(IMAGES, {**TARGETS, "boxes": BOXES / 16})


def test_boxes_beyond_the_student_s_images_are_refused_beside_larger_pictures() -> None:
    inputs = {"images": IMAGES, "boxes": BOXES * 2, "before": np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)}
    with pytest.raises(ValueError, match=r"an edge beyond the image of 16 x 16 pixels"):
        distilled(FeatureDistillation(ALL, ALL, boxes="boxes")).fit(inputs, SCORES, verbose=0)


def test_boxes_are_looked_at_once_there_are_some() -> None:
    model = detector(run_eagerly=True)
    model.train_on_batch(IMAGES, {**TARGETS, "boxes": np.full_like(BOXES, -1)})

    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        model.train_on_batch(IMAGES, {**TARGETS, "boxes": BOXES / 16})


def test_boxes_are_looked_at_in_each_training() -> None:
    model = detector()
    model.fit(IMAGES, TARGETS, verbose=0)

    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        model.fit(IMAGES, {**TARGETS, "boxes": BOXES / 16}, verbose=0)


EMPTY = {**TARGETS, "boxes": np.full_like(BOXES, -1)}
SHARES = {**TARGETS, "boxes": BOXES / 16}


class Batches(keras.utils.PyDataset):
    """A batch without any boxes, then one with wrong boxes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return IMAGES, (EMPTY, SHARES)[index]


def together(first: Any, second: Any) -> Any:
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *first, second)


LATER = {
    "generator": lambda: ((IMAGES, targets) for targets in (EMPTY, SHARES)),
    "first of a generator": lambda: ((IMAGES, targets) for targets in (SHARES,)),
    "data set": Batches,
}


@pytest.mark.parametrize("kind", LATER)
def test_wrong_boxes_of_later_batches_are_refused_too(kind: str) -> None:
    """TensorFlow wraps an error in the making of batches, and keeps its words."""
    with pytest.raises(Exception, match=r"left, top, right and bottom in pixels of the student's input"):
        detector(jit_compile=False).fit(LATER[kind](), shuffle=False, verbose=0)


def test_wrong_boxes_behind_rows_without_any_are_refused_before_the_first_step() -> None:
    x, y = together([(IMAGES, EMPTY)] * 3, (IMAGES, SHARES))

    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        detector(jit_compile=True).fit(x, y, verbose=0)


@pytest.mark.tensorflow
def test_wrong_boxes_of_a_later_batch_of_a_data_set_are_refused_before_the_first_step() -> None:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(together([(IMAGES, EMPTY)], (IMAGES, SHARES))).batch(2)

    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        detector(jit_compile=True).fit(data, verbose=0)


def test_boxes_of_a_cached_data_set_are_looked_at_behind_a_batch_without_any(tmp_path: Path) -> None:
    def maps(channels: int) -> keras.Model:
        inputs = keras.Input(IMAGES.shape[1:])
        return keras.Model(inputs, keras.layers.Conv2D(channels, 3, strides=4, name="maps")(inputs))

    images = np.concatenate([IMAGES, IMAGES])
    cache = TeacherCache.build(maps(5), images, tmp_path, layers=["maps"], progress=False)
    for boxes in (BOXES, BOXES / 16):
        model = DistillModel(maps(3), None, FeatureDistillation("maps", "maps", boxes="boxes"), task_weight=0.0)
        model.compile("sgd", jit_compile=False)
        data = cache.attach((images, {"boxes": np.concatenate([-np.ones_like(BOXES), boxes])}), batch_size=len(IMAGES))
        if boxes is BOXES:
            model.fit(data, epochs=2, verbose=0)
            continue
        with pytest.raises(Exception, match=r"left, top, right and bottom in pixels of the student's input"):
            model.fit(data, verbose=0)
        assert data.epoch == 0


def test_a_data_set_that_is_looked_at_trains_like_the_same_arrays() -> None:
    class Right(Batches):
        seen = 0

        def __getitem__(self, index: int) -> Any:
            return IMAGES, (EMPTY, TARGETS)[index]

        def on_epoch_end(self) -> None:
            self.seen += 1

    data, arrays = Right(), together([(IMAGES, EMPTY)], (IMAGES, TARGETS))
    models = [detector(jit_compile=False) for _ in range(2)]
    models[0].fit(data, epochs=2, shuffle=False, verbose=0)
    models[1].fit(*arrays, batch_size=len(IMAGES), epochs=2, shuffle=False, verbose=0)

    for own, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    assert data.seen >= 2


@pytest.mark.tensorflow
def test_wrong_boxes_of_a_data_set_are_refused_too() -> None:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((IMAGES, {**TARGETS, "boxes": BOXES / 16})).batch(2)

    with pytest.raises(ValueError, match=r"Received: shares of the image's size"):
        detector().fit(data, verbose=0)


@pytest.mark.tensorflow
def test_ragged_boxes_are_refused_with_the_way_to_pad_them() -> None:
    import tensorflow as tf

    ragged = tf.RaggedTensor.from_row_lengths(np.ones((6, 4), "float32"), [2, 1, 3, 0])

    with pytest.raises(ValueError, match=r"as many rows of boxes for each image\. Pad them: boxes\.to_tensor\(-1\.0\)"):
        value(FeatureDistillation(ALL, ALL, boxes="boxes"), net(3, 1), net(3, 2), {"boxes": ragged})


def test_targets_that_are_missing_are_named() -> None:
    term, models = FeatureDistillation(ALL, ALL, boxes="boxes"), (net(3, 1), net(3, 2))

    with pytest.raises(ValueError, match=r"boxes of each image at boxes='boxes'\. .* Received: no targets"):
        value(term, *models)
    with pytest.raises(ValueError, match=r"at boxes='boxes'\. .* Received: a ndarray"):
        value(term, *models, SCORES)
    with pytest.raises(ValueError, match=r"at boxes=5\. .* Received: a tuple"):
        value(FeatureDistillation(ALL, ALL, boxes=5), *models, (SCORES, BOXES))


def test_boxes_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes for each of 4 images\. Received: boxes of shape \(2, 3, 4\)"):
        value(FeatureDistillation(ALL, ALL, boxes="boxes"), net(3, 1), net(3, 2), {"boxes": BOXES[:2]})


def test_boxes_need_maps() -> None:
    term = FeatureDistillation(ALL, ALL, adapter="pool", boxes="boxes")

    with pytest.raises(ValueError, match=r"term 'neck' to compare maps \(N, H, W, C\) of a known size, since it has"):
        value(term, net(3, 1), net(3, 2), TARGETS)


def test_boxes_need_images() -> None:
    def rows(seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((12,))
        maps = keras.layers.Reshape((2, 2, 3), name="maps")(inputs)
        return keras.Model(inputs, keras.layers.Dense(2)(maps))

    term = FeatureDistillation("maps", "maps", boxes="boxes")

    with pytest.raises(ValueError, match=r"to be called with images of a known height and width, which boxes are"):
        value(term, rows(1), rows(2), TARGETS, np.ones((4, 12), "float32"))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: FeatureDistillation("neck", "neck", FocalGlobalLoss()),
            ValueError,
            r"`boxes` to say where the targets keep their boxes, which FocalGlobalLoss needs\. Pass .* boxes=None",
        ),
        (
            lambda: LogitsDistillation(FocalGlobalLoss()),
            TypeError,
            r"`loss` to need no boxes\. Use it in a FeatureDistillation\(\.\.\., boxes=\.\.\.\)\. Received: a Fo",
        ),
        (
            lambda: FeatureDistillation(["a", "b"], ["a", "b"], SolutionFlowLoss(), boxes="boxes"),
            ValueError,
            r"`boxes` to be None for SolutionFlowLoss, which compares several layers at once\. .* boxes='boxes'",
        ),
        (
            lambda: FeatureDistillation("a", "a", boxes=1.5),
            TypeError,
            r"a function of the targets, a Tap, or None\. .*=1\.5",
        ),
        (lambda: FeatureDistillation("a", "a", boxes=True), TypeError, r"`boxes` to be a key, an index, .* boxes=True"),
        (
            lambda: ReviewDistillation("a", "a", boxes="boxes"),
            TypeError,
            r"Expected known settings of ReviewDistillation\. Received: boxes='boxes'",
        ),
    ],
)
def test_a_place_that_cannot_be_is_refused_when_the_term_is_made(make: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()
