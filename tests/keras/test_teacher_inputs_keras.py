"""Teachers that expect other images than the student, in Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_vision as vision
import numpy as np
import pytest
from keras import ops

from keras_distill import CacheError, DistillModel, FeatureDistillation, Normalize, TeacherCache

STUDENT = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEACHER = ((0.5, 0.25, 0.75), (0.5, 0.125, 0.25))


def images(count: int = 2, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, size, size, 3)).astype("float32")


def by_hand(batch: np.ndarray) -> np.ndarray:
    raw = batch.astype("float64") * STUDENT[1] + STUDENT[0]
    return (raw - np.array(TEACHER[0])) / TEACHER[1]


@keras.saving.register_keras_serializable(package="tests")
def darken(batch: Any) -> Any:
    return batch * 0.5


def value(result: Any) -> np.ndarray:
    return ops.convert_to_numpy(result)


def test_between_undoes_the_students_statistics_and_applies_the_teachers() -> None:
    change = Normalize.between(STUDENT, TEACHER)
    np.testing.assert_allclose(value(change(ops.array(images()))), by_hand(images()), rtol=1e-5, atol=1e-5)
    keras.config.set_image_data_format("channels_first")
    first = change(ops.array(np.moveaxis(images(), -1, 1)))
    np.testing.assert_allclose(np.moveaxis(value(first), 1, -1), by_hand(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [5, 16, (3, 6)])
def test_it_resizes_as_the_half_for_pytorch_does(size: Any) -> None:
    torch = pytest.importorskip("torch", reason="compares with the half for PyTorch")
    lightning_distill = pytest.importorskip("lightning_distill", reason="compares with the half for PyTorch")
    own = Normalize.between(STUDENT, TEACHER, size)(ops.array(images()))
    other = lightning_distill.Normalize.between(STUDENT, TEACHER, size)(torch.tensor(images()).movedim(-1, 1))
    np.testing.assert_allclose(value(own), other.movedim(1, -1).numpy(), rtol=1e-4, atol=1e-5)


def test_it_takes_the_forms_of_a_models_inputs() -> None:
    change, batch, other = Normalize.between(STUDENT, TEACHER), ops.array(images()), ops.ones((2,))
    expected = value(change(batch))
    np.testing.assert_array_equal(value(change((batch, other))[0]), expected)
    entries = change({"pixel_values": batch, "scale": other})
    np.testing.assert_array_equal(value(entries["pixel_values"]), expected)
    assert entries["scale"] is other
    half = change(ops.cast(batch, "float16"))
    assert keras.backend.standardize_dtype(half.dtype) == "float16"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Normalize.between(STUDENT, ((0.5,), (0.5,))),
            ValueError,
            "same number of channels. Received: 3 and 1",
        ),
        (
            lambda: Normalize.between(((0.5,), (0,)), ((0.5,), (1,))),
            ValueError,
            r"`student\[1\]\[0\]` to be greater than",
        ),
        (lambda: Normalize.between(STUDENT, TEACHER)(ops.ones((2, 3, 8, 8))), ValueError, "3 channels in dimension 3"),
        (
            lambda: Normalize.between(STUDENT, TEACHER)(ops.ones((2, 8, 8, 3), "uint8")),
            TypeError,
            "`images` to be a floating point tensor",
        ),
    ],
)
def test_wrong_settings_and_images_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


class Hooked(DistillModel):
    def teacher_inputs(self, x: Any, call: Any) -> Any:
        return darken(x)


def evaluated(model: DistillModel, batch: np.ndarray) -> float:
    model.compile("sgd")
    return float(model.evaluate(batch, return_dict=True, verbose=0)["distillation_loss"])


def test_the_argument_equals_the_method_and_other_images_by_hand() -> None:
    student, teacher, batch = vision.cnn(name="student"), vision.cnn(name="teacher"), images(2, vision.SIZE)
    term = FeatureDistillation("maps", "maps")
    by_argument = evaluated(DistillModel(student, teacher, term, teacher_inputs=darken), batch)
    features = [
        keras.Model(model.input, model.get_layer("maps").output)(inputs)
        for model, inputs in ((student, batch), (teacher, darken(batch)))
    ]
    assert by_argument == pytest.approx(float(ops.mean(ops.square(features[0] - features[1]))), rel=1e-5)
    assert evaluated(Hooked(student, teacher, term), batch) == pytest.approx(by_argument, rel=1e-6)
    model = DistillModel(student, teacher, term, teacher_inputs=lambda x, call: darken(x))
    assert evaluated(model, batch) == pytest.approx(by_argument, rel=1e-6)


def test_a_teacher_of_another_size_gets_resized_images() -> None:
    student, teacher = vision.cnn(name="student"), vision.vit(1, size=48, name="teacher")
    change = Normalize.between(STUDENT, TEACHER, size=48)
    model = DistillModel(student, teacher, FeatureDistillation("maps", "tokens"), teacher_inputs=change)
    assert np.isfinite(evaluated(model, images(2, vision.SIZE)))
    with pytest.raises(ValueError, match=r"teacher 'teacher' to take inputs of shape .*teacher_inputs"):
        DistillModel(student, teacher, FeatureDistillation("maps", "tokens"))


@pytest.mark.parametrize("hook", [darken, Normalize.between(STUDENT, TEACHER)], ids=["function", "Normalize"])
def test_the_argument_is_saved_with_the_model(hook: Any, tmp_path: Path) -> None:
    student, teacher, batch = vision.cnn(name="student"), vision.cnn(name="teacher"), images(2, vision.SIZE)
    model = DistillModel(student, teacher, FeatureDistillation("maps", "maps"), teacher_inputs=hook)
    expected = evaluated(model, batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = teacher
    assert evaluated(loaded, batch) == pytest.approx(expected, rel=1e-6)


def test_two_makers_of_inputs_and_other_objects_are_refused() -> None:
    student, teacher = vision.cnn(name="student"), vision.cnn(name="teacher")
    with pytest.raises(ValueError, match=r"`teacher_inputs` to be None in a subclass that overrides the method"):
        Hooked(student, teacher, teacher_inputs=darken)
    for wrong in ("pixel_values", Normalize):
        with pytest.raises(TypeError, match=r"`teacher_inputs` to be a function of the batch's inputs, or None"):
            DistillModel(student, teacher, teacher_inputs=wrong)


def test_a_cache_is_built_from_the_teachers_inputs(tmp_path: Path) -> None:
    teacher, batch, change = vision.cnn(), images(3, vision.SIZE), Normalize.between(STUDENT, TEACHER)
    cache = TeacherCache.build(teacher, batch, tmp_path, teacher_inputs=change, dtype="float32")
    expected = value(teacher(change(ops.array(batch)), training=False))
    np.testing.assert_allclose(cache.reader.read(range(3))["output"], expected, rtol=1e-4, atol=1e-5)
    TeacherCache.open(tmp_path, teacher=teacher, teacher_inputs=change)
    with pytest.raises(CacheError, match=r"to be of teacher_inputs=None, but it was built with Normalize\("):
        TeacherCache.open(tmp_path, teacher=teacher)
    with pytest.raises(CacheError, match="was begun with teacher="):
        TeacherCache.build(teacher, batch, tmp_path, teacher_inputs=darken, dtype="float32")
    with pytest.raises(CacheError, match="`teacher_inputs` to have a name that a cache can keep"):
        TeacherCache.build(teacher, batch, tmp_path / "other", teacher_inputs=lambda x: x)


def named(*names: str, kind: type = dict) -> keras.Model:
    inputs = {name: keras.Input((4,), name=name) for name in names}
    output = keras.layers.Dense(3)(keras.layers.Concatenate()(list(inputs.values())))
    return keras.Model(inputs if kind is dict else list(inputs.values()), output, name="_".join(names))


@pytest.mark.parametrize("kind", [dict, list])
def test_inputs_that_have_other_names_in_the_teacher_are_refused_by_name(kind: type) -> None:
    rows = {name: np.ones((2, 4), "float32") for name in ("ids", "mask")}
    expected = "'words', 'zeros', which the model 'words_zeros' takes. Let a batch .* by `teacher_inputs`."

    def fit(model: DistillModel) -> Any:
        model.compile("sgd")
        return model.fit(rows, verbose=0).history

    with pytest.raises(ValueError, match=f"{expected} Received: 'ids', 'mask'"):
        fit(DistillModel(named("ids", "mask"), named("words", "zeros", kind=kind)))
    renamed = DistillModel(
        named("ids", "mask"),
        named("words", "zeros", kind=kind),
        teacher_inputs=lambda inputs: {"words": inputs["ids"], "zeros": inputs["mask"]},
    )
    assert np.isfinite(fit(renamed)["loss"][0])
