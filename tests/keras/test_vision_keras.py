"""Vision models of several families teach each other in Keras: grids of patches, pooled vectors, errors in words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import keras_vision as vision
import numpy as np
import pytest
from keras import layers, ops

from keras_distill import DistillModel, DistillStep, FeatureDistillation, Tap

pytestmark = pytest.mark.tensorflow


@dataclass(frozen=True)
class Family:
    """A model, the place of its feature, and how many tokens stand before the patches; None for a map."""

    make: Callable[[], keras.Model]
    layer: str
    prefix: int | None = None
    side: int = 0  # patches in a row

    def by_hand(self, output: Any) -> Any:
        """The feature as a map, one patch after the other, or as the layer returned it."""
        if self.prefix is None:
            return output
        rows = [
            ops.stack([output[:, self.prefix + row * self.side + i] for i in range(self.side)], 1)
            for row in range(self.side)
        ]
        return ops.stack(rows, 1)


def until(model: keras.Model, layer: str) -> keras.Model:
    """A large model up to one of its layers."""
    return keras.Model(model.input, model.get_layer(layer).output)


@functools.cache
def beginning_of(name: str, layer: str, **settings: Any) -> keras.Model:
    """A model of ``keras.applications`` up to one of its first layers; the rest takes long to make."""
    make = getattr(keras.applications, name)
    shape = (vision.SIZE, vision.SIZE, 3)
    return until(make(input_shape=shape, weights=None, include_preprocessing=False, **settings), layer)


def of_applications(name: str, layer: str, **settings: Any) -> Family:
    def make() -> keras.Model:
        return keras.models.clone_model(beginning_of(name, layer, **settings))

    return Family(make, layer)


FAMILIES = {
    "vit": Family(lambda: vision.vit(1), "tokens", 1, 4),
    "registers": Family(lambda: vision.vit(5), "tokens", 5, 4),
    "cnn": Family(vision.cnn, "maps"),
    "mobilenet": of_applications("MobileNetV3Small", "expanded_conv_2_add", alpha=0.25, minimalistic=True),
    "efficientnet": of_applications("EfficientNetV2B0", "block1a_project_activation"),
    "convnext": of_applications("ConvNeXtTiny", "convnext_tiny_stage_0_block_0_identity"),
}


@functools.cache
def teacher_of(name: str) -> keras.Model:
    """A teacher, which no test changes: some take long to make."""
    return FAMILIES[name].make()


PAIRS = [*itertools.product(FAMILIES, repeat=2)]


def images(size: Any = vision.SIZE, count: int = 2) -> np.ndarray:
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(3).standard_normal((count, height, width, 3)).astype("float32")


def resized_by_hand(student: Any, teacher: Any, both_maps: bool) -> tuple[Any, Any]:
    import tensorflow as tf

    sizes = [tuple(feature.shape[1:3]) for feature in (student, teacher)]
    if sizes[0] == sizes[1]:
        return student, teacher
    if both_maps:  # the student's size: averaged down, interpolated up
        if sizes[1] > sizes[0]:
            factor = sizes[1][0] // sizes[0][0]
            return student, tf.nn.avg_pool2d(teacher, factor, factor, "VALID")
        return student, tf.image.resize(teacher, sizes[0])
    smaller = min(sizes)
    return tuple(tf.image.resize(feature, smaller, antialias=True) for feature in (student, teacher))


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
def test_two_steps_equal_a_loop_by_hand(student_name: str, teacher_name: str) -> None:
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    pair = FAMILIES[student_name], FAMILIES[teacher_name]
    if student_name == teacher_name:  # tokens of equal number are compared one by one
        pair = tuple(replace(family, prefix=None) for family in pair)
    student, teacher, batch = pair[0].make(), teacher_of(teacher_name), images()
    model = DistillModel(student, teacher, FeatureDistillation(pair[0].layer, pair[1].layer))
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    own, others = (until(each, family.layer) for each, family in zip((student, teacher), pair, strict=True))
    target = pair[1].by_hand(others(batch, training=False))
    adapter = model.terms[0].adapters[0]
    before = [np.array(variable) for variable in student.non_trainable_variables]
    for _ in range(2):
        with tf.GradientTape() as tape:
            feature = pair[0].by_hand(own(batch, training=True))
            both_maps = pair[0].prefix is None and pair[1].prefix is None and len(feature.shape) == 4
            feature, resized = (
                resized_by_hand(feature, target, both_maps) if len(feature.shape) == 4 else (feature, target)
            )
            expected = ops.mean(ops.square((feature if adapter is None else adapter(feature)) - resized))
        gradients = tape.gradient(expected, own.trainable_variables)
        stepped = [
            np.array(variable) - (0.0 if gradient is None else 0.01 * np.array(gradient))
            for variable, gradient in zip(own.trainable_variables, gradients, strict=True)
        ]
        for variable, value in zip(student.non_trainable_variables, before, strict=True):
            variable.assign(value)
        logs = model.train_on_batch(batch, return_dict=True)
        before = [np.array(variable) for variable in student.non_trainable_variables]
        model.reset_metrics()
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-4)
        for variable, value in zip(own.trainable_variables, stepped, strict=True):
            np.testing.assert_allclose(np.array(variable), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("swapped", [False, True], ids=["student", "teacher"])
def test_a_vector_for_positions_says_what_to_pass(name: str, swapped: bool) -> None:
    family = FAMILIES[name]
    pair, names = (family.make(), vision.cnn(name="pooled")), (family.layer, "pool")
    pair, names = (pair[::-1], names[::-1]) if swapped else (pair, names)
    with pytest.raises(ValueError, match=r'Pass adapter="pool", .* or name the pooling layer that follows'):
        DistillModel(*pair, FeatureDistillation(*names))
    step = DistillStep(*pair, FeatureDistillation(*names, adapter="pool"))
    batch = images()
    with step.watching():
        output = pair[0](batch, training=False)
    features = [until(each, layer)(batch, training=False) for each, layer in zip(pair, names, strict=True)]
    first, second = (
        feature
        if len(feature.shape) == 2
        else ops.mean(family.by_hand(feature) if len(feature.shape) == 3 else feature, (1, 2))
        for feature in features
    )
    adapter = step.terms[0].adapters[0]
    expected = ops.mean(ops.square((first if adapter is None else adapter(first)) - second))
    np.testing.assert_allclose(step.losses(output, batch)["distillation_loss"], expected, rtol=1e-4)


def value_of(student: keras.Model, teacher: keras.Model, term: FeatureDistillation, batch: Any) -> tuple[float, Any]:
    step = DistillStep(student, teacher, term)
    with step.watching():
        output = student(batch, training=False)
    return float(step.losses(output, batch)["distillation_loss"]), step


def test_images_that_are_not_square_keep_their_proportions() -> None:
    import tensorflow as tf

    size = (16, 32)
    student, teacher, batch = vision.cnn(8, size), vision.vit(1, 8, size), images(size)
    value, _ = value_of(student, teacher, FeatureDistillation("maps", "tokens"), batch)
    tokens = until(teacher, "tokens")(batch)[:, 1:]
    small = tf.image.resize(until(student, "maps")(batch), (2, 4), antialias=True)
    assert value == pytest.approx(float(ops.mean(ops.square(small - ops.reshape(tokens, (2, 2, 4, 8))))), rel=1e-5)


def test_more_prefix_tokens_than_are_tried_are_named() -> None:
    student, teacher, batch = vision.cnn(), vision.vit(9), images()
    with pytest.raises(ValueError, match=r"teacher feature 'tokens' .* Pass Tap\(layer, prefix_tokens"):
        DistillModel(student, teacher, FeatureDistillation("maps", "tokens"))
    value, _ = value_of(student, teacher, FeatureDistillation("maps", Tap("tokens", prefix_tokens=9)), batch)
    assert value > 0


def test_prefix_tokens_of_a_tap_are_left_out() -> None:
    student, teacher, batch = vision.vit(1, name="student"), vision.vit(1, name="teacher"), images()
    tap = Tap("tokens", prefix_tokens=1)
    value, _ = value_of(student, teacher, FeatureDistillation(tap, tap), batch)
    patches = [until(model, "tokens")(batch, training=False)[:, 1:] for model in (student, teacher)]
    assert value == pytest.approx(float(ops.mean(ops.square(patches[0] - patches[1]))), rel=1e-5)
    assert Tap(**tap.get_config()) == tap
    with pytest.raises(ValueError, match=r"feature 'maps' to have more than 2 tokens, .* Correct `prefix_tokens`"):
        DistillModel(vision.cnn(), student, FeatureDistillation(Tap("maps", prefix_tokens=2), "tokens"))


@pytest.mark.parametrize(
    ("prefix", "error", "words"),
    [(-1, ValueError, "`prefix_tokens` to be at least 0"), (1.5, TypeError, "`prefix_tokens` to be an int")],
)
def test_a_tap_checks_its_prefix_tokens(prefix: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Tap("tokens", prefix_tokens=prefix)


def test_sizes_that_are_not_known_are_refused() -> None:
    anything = keras.Input((None, None, 3))
    student = keras.Model(anything, layers.Conv2D(4, 3, name="maps")(anything))
    with pytest.raises(ValueError, match=r"the height and width of .* to be known\. Declare the size"):
        DistillStep(student, vision.vit(1), FeatureDistillation("maps", "tokens")).build(
            keras.KerasTensor((2, 32, 32, 3))
        )


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
def test_a_model_that_was_saved_continues_with_its_grids(tmp_path: Path) -> None:
    student, teacher, batch = vision.vit(5), vision.cnn(), images()
    model = DistillModel(student, teacher, FeatureDistillation("tokens", "maps"))
    model.compile(keras.optimizers.SGD(0.01))
    model.fit(batch, batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = teacher
    expected = model.evaluate(batch, return_dict=True, verbose=0)["distillation_loss"]
    assert loaded.evaluate(batch, return_dict=True, verbose=0)["distillation_loss"] == pytest.approx(expected, rel=1e-6)


def by_name(model: keras.Model) -> keras.Model:
    """The model with a dict of its inputs."""
    images = keras.Input((vision.SIZE, vision.SIZE, 3), name="pixel_values")
    return keras.Model({"pixel_values": images}, model(images))


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@pytest.mark.parametrize("form", ["array", "dict", "dataset"])
def test_images_alone_train_without_labels_and_loss(form: str) -> None:
    student, teacher, batch = vision.cnn(name="student"), vision.cnn(8, name="teacher"), images(count=4)
    inputs: Any = batch
    if form == "dict":
        inputs = {"pixel_values": batch}
        student, teacher = (by_name(model) for model in (student, teacher))
    if form == "dataset":
        import tensorflow as tf

        inputs = tf.data.Dataset.from_tensor_slices(batch).batch(2)
    model = DistillModel(student, teacher, FeatureDistillation("maps", "maps", name="maps"))
    model.compile("adam")
    before = [np.array(variable) for variable in student.trainable_variables]
    history = model.fit(inputs, epochs=2, shuffle=form != "dataset", verbose=0).history
    assert sorted(history) == ["distillation_loss", "loss", "maps_loss"]
    assert history["loss"] == history["distillation_loss"]
    assert history["loss"][1] < history["loss"][0]
    changed = zip(before, student.trainable_variables, strict=True)
    assert any(not np.array_equal(value, np.array(variable)) for value, variable in changed)


def test_agreement_with_the_teacher_needs_no_labels() -> None:
    student, teacher, batch = vision.cnn(name="student"), vision.cnn(8, name="teacher"), images(count=4)
    model = DistillModel(student, teacher)
    model.compile("adam")
    model.fit(batch, verbose=0)
    agreement = np.mean(
        np.argmax(student.predict(batch, verbose=0), 1) == np.argmax(teacher.predict(batch, verbose=0), 1)
    )
    assert model.evaluate(batch, return_dict=True, verbose=0)["teacher_agreement"] == pytest.approx(agreement)
