"""The layers or `Tap(layout=...)` distinguish maps, tokens and attention scores; the rank does not."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import numpy_of

from keras_distill import AttentionMapLoss, AttentionRelationLoss, DistillModel, DistillStep, FeatureDistillation, Tap

layers = keras.layers
TOKENS = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
IMAGES = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype("float32")


def attention(heads: int, *, name: str, width: int = 4) -> keras.Model:
    inputs = keras.Input((6, 8))
    mixed, _ = layers.MultiHeadAttention(heads, width, name="mha")(inputs, inputs, return_attention_scores=True)
    return keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization(name="norm")(mixed)), name=name)


def value_of(step: DistillStep, x: Any, name: str) -> float:
    with step.watching():
        value = step.losses(step.student(x))[f"{name}_loss"]
    return float(numpy_of(ops.stop_gradient(value)))


SCORES = Tap("mha", output=1)


def test_attention_maps_of_other_numbers_of_heads_are_not_interpolated() -> None:
    student, teacher = attention(2, name="student"), attention(4, name="teacher")
    with pytest.raises(ValueError, match="to have equal shapes"):
        DistillStep(student, teacher, FeatureDistillation(SCORES, SCORES, AttentionMapLoss())).build(TOKENS)


def test_attention_maps_do_not_depend_on_the_image_format() -> None:
    step = DistillStep(
        attention(2, name="student"),
        attention(2, name="teacher"),
        FeatureDistillation(SCORES, SCORES, AttentionMapLoss("kl")),
    )
    last = value_of(step, TOKENS, "mha")
    keras.config.set_image_data_format("channels_first")
    again = DistillStep(step.student, step.teacher, FeatureDistillation(SCORES, SCORES, AttentionMapLoss("kl")))
    assert value_of(again, TOKENS, "mha") == pytest.approx(last, rel=1e-6)


def test_queries_of_several_heads_are_merged_into_tokens() -> None:
    query = Tap("mha/query")
    student, teacher = attention(2, name="student"), attention(4, name="teacher")
    terms = [
        FeatureDistillation(query, query, name="query"),
        FeatureDistillation(query, query, AttentionRelationLoss(relation_heads=2), adapter=None, name="relation"),
    ]
    step = DistillStep(student, teacher, terms)
    assert np.isfinite(value_of(step, TOKENS, "relation"))
    assert tuple(step.terms[0].adapters[0].kernel.shape) == (8, 16)


def test_attention_scores_are_not_compared_with_tokens() -> None:
    with pytest.raises(ValueError, match="to be of one kind"):
        DistillStep(
            attention(2, name="student"), attention(2, name="teacher"), FeatureDistillation(Tap("norm"), SCORES)
        ).build(TOKENS)
    with pytest.raises(ValueError, match="Expected two attention maps for AttentionMapLoss"):
        DistillStep(
            attention(2, name="student"),
            attention(2, name="teacher"),
            FeatureDistillation("norm", "norm", AttentionMapLoss()),
        ).build(TOKENS)


class Raw(keras.Model):
    """A sum of tensors without a layer, so that the meaning of the axes is unknown."""

    def __init__(self, filters: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.first, self.second = (layers.Conv2D(filters, 3, padding="same") for _ in range(2))
        self.act, self.pool, self.out = layers.ReLU(name="act"), layers.GlobalAveragePooling2D(), layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.out(self.pool(self.act(self.first(x) + self.second(x))))


def halved(filters: int, name: str) -> keras.Model:
    inputs = keras.Input((6, 6, 3))
    model = Raw(filters, name="raw")
    small = layers.AveragePooling2D(2)(inputs)
    return keras.Model(inputs, model(small), name=name)


def test_unknown_axes_are_refused_if_they_matter() -> None:
    student, teacher = Raw(4, name="student"), halved(4, "teacher")
    student(IMAGES)
    with pytest.raises(ValueError, match=r"Pass Tap\('act', layout=\.\.\.\)"):
        DistillStep(student, teacher, FeatureDistillation("act", "act")).build(IMAGES)
    taps = [Tap("act", layout="channels_last"), Tap("act", layout="channels_last")]
    step = DistillStep(student, teacher, FeatureDistillation(*taps))
    assert np.isfinite(value_of(step, IMAGES, "act"))
    same = DistillStep(student, Raw(5, name="teacher"), FeatureDistillation("act", "act"))
    assert np.isfinite(value_of(same, IMAGES, "act"))  # positions agree: an adapter of the last axis is safe


def test_a_map_with_channels_first_is_known_from_its_layer() -> None:
    """Whatever Keras' own image format is; the teacher's map of another size is resized along its positions."""

    def network(filters: int, data_format: str, name: str, strides: int = 1) -> keras.Model:
        inputs = keras.Input((3, 6, 6) if data_format == "channels_first" else (6, 6, 3))
        hidden = layers.MaxPooling2D(1, strides, data_format=data_format, name="map")(inputs)
        return keras.Model(inputs, layers.Flatten()(hidden), name=name)

    student = network(3, "channels_first", "student")
    teacher = network(3, "channels_first", "teacher", strides=2)
    step = DistillStep(student, teacher, FeatureDistillation("map", "map"))
    images = np.moveaxis(IMAGES, -1, 1)
    other = DistillStep(
        network(3, "channels_last", "a"), network(3, "channels_last", "b", strides=2), FeatureDistillation("map", "map")
    )
    step.build(images)
    other.build(IMAGES)
    term = step.terms[0]
    assert term.get_shapes()["pairs"][0][2:] == ["channels_first", "channels_first"]
    assert term.get_shapes()["pairs"][0][:2] == other.terms[0].get_shapes()["pairs"][0][:2]


def test_the_meaning_of_the_axes_is_saved_and_loaded() -> None:
    tap = Tap("mha", output=1, layout="scores")
    term = FeatureDistillation(tap, tap, AttentionMapLoss())
    back = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(term))
    assert back.student_taps == term.student_taps
    assert Tap.of(back.student_taps[0]).layout == "scores"
    with pytest.raises(ValueError, match="Expected `layout` to be one of"):
        Tap("mha", layout="maps")


def test_masks_of_both_models_hide_positions() -> None:
    """Masked equals sliced, and numbers that are not finite do no harm where they are hidden."""

    def network(width: int, name: str, mask_zero: bool) -> keras.Model:
        inputs = keras.Input((4,), dtype="int32")
        hidden = layers.Dense(5, name="hidden")(layers.Embedding(9, width, mask_zero=mask_zero)(inputs))
        return keras.Model(inputs, hidden, name=name)

    ids = np.array([[1, 2, 0, 0], [3, 4, 5, 6]], "int32")
    for student_masks, teacher_masks in ((True, False), (False, True)):
        student, teacher = network(3, "student", student_masks), network(4, "teacher", teacher_masks)
        step = DistillStep(student, teacher, FeatureDistillation("hidden", "hidden"))
        gap = np.square(numpy_of(student(ids)) - numpy_of(teacher(ids)))[ids > 0].mean()
        assert value_of(step, ids, "hidden") == pytest.approx(gap, rel=1e-5)


class Looped(keras.layers.Layer):
    """Runs another layer inside of a function of TensorFlow's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.inner = layers.Dense(4, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return tf.function(self.inner)(x)


@pytest.mark.tensorflow
def test_a_layer_in_a_loop_or_a_function_of_its_own_is_refused_with_a_clear_error() -> None:
    def looped(name: str) -> keras.Model:
        inputs = keras.Input((8,))
        return keras.Model(inputs, layers.Dense(3)(Looped(name="loop")(inputs)), name=name)

    with pytest.raises(ValueError, match="to have an output that can be read from outside"):
        DistillModel(looped("student"), looped("teacher"), FeatureDistillation("loop/inner", "loop/inner"))
