"""The Keras term that reuses the teacher's classifier: published values, the student that results, words of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_loss_cases import as_array, differentiated, keras_kernel
from keras_parts_nets import Called, assert_resumes, distilled, fitted, last, network
from loss_case import golden_arrays, golden_index

from keras_distill import DistillModel, ReusedClassifierDistillation
from keras_distill.functional import feature_mse
from keras_distill.functional.vectors import resized
from keras_distill.terms.reused_classifier import Projector


@pytest.mark.parametrize("case", ["s1"])
def test_the_loss_is_the_published_one(case: str) -> None:
    """Case s2 has a larger student, whose map the reference makes smaller; the library resizes the teacher's."""
    (entry,) = [entry for entry in golden_index("simkd") if entry["case"] == case]
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float32"]
    student, teacher = last(arrays["student_feat"]), last(arrays["teacher_feat"])
    projector = Projector(teacher.shape[-1], entry["hyperparameters"]["factor"], dtype="float32")
    projector.build(student.shape)
    for index, part in enumerate(projector.parts[::2]):
        part.kernel.assign(keras_kernel(arrays[f"param_transfer.{3 * index}.weight"], 4))
        norm = projector.parts[2 * index + 1]
        norm.gamma.assign(arrays[f"param_transfer.{3 * index + 1}.weight"])
        norm.beta.assign(arrays[f"param_transfer.{3 * index + 1}.bias"])

    def value(student: Any, teacher: Any) -> Any:
        projected = projector(student, training=True)
        return ops.mean(feature_mse(projected, resized(teacher, projected.shape)))

    result = differentiated(Called(value), student, teacher, "float32")

    np.testing.assert_allclose(result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(result.student, last(arrays["grad_student_feat"]), **tolerance)


def term(**settings: Any) -> ReusedClassifierDistillation:
    return ReusedClassifierDistillation("body", "body", **settings)


def inputs(count: int = 5) -> Any:
    return np.random.default_rng(0).standard_normal((count, 3, 3, 2)).astype("float32")


def test_the_deployable_student_reads_its_projected_feature_with_the_teachers_classifier(tmp_path: Path) -> None:
    model = distilled(term(), teacher=network(5, 2, "teacher"))
    fitted(model, 1)

    deployed = model.terms[0].deployable(model.student, model.teacher)

    feature = keras.Model(model.student.input, model.student.get_layer("body").output)(inputs())
    projected = model.terms[0].adapters[0](feature, training=False)
    expected = as_array(model.teacher.get_layer("head")(ops.mean(projected, axis=(1, 2))))
    np.testing.assert_allclose(as_array(deployed(inputs())), expected, rtol=1e-5, atol=1e-6)
    deployed.save(tmp_path / "deployed.keras")
    loaded = keras.models.load_model(tmp_path / "deployed.keras")
    np.testing.assert_allclose(as_array(loaded(inputs())), expected, rtol=1e-5, atol=1e-6)


def test_training_makes_the_deployable_student_agree_with_the_teacher() -> None:
    reused = term()
    model = DistillModel(network(6, 1, "student"), network(4, 2, "teacher"), reused, task_weight=0.0)
    model.compile(keras.optimizers.Adam(0.03), "mse", jit_compile=False)
    x = 5 * inputs(64)  # so that the teacher's features vary
    [first] = model.fit(x, np.zeros((64, 3)), 64, verbose=0).history["reused_classifier_loss"]
    steps = np.tile(x, (30, 1, 1, 1))  # 30 steps in an epoch: each epoch has a cost of its own
    model.fit(steps, np.zeros((64 * 30, 3)), 64, 10, shuffle=False, verbose=0)
    end = model.train_on_batch(x, np.zeros((64, 3)), return_dict=True)["reused_classifier_loss"]

    deployed = reused.deployable(model.student, model.teacher)

    decisions = [as_array(each(x, training=False)).argmax(1) for each in (deployed, model.teacher)]
    assert end < 0.1 * first
    assert (decisions[0] == decisions[1]).mean() > 0.8


def test_a_training_goes_on_from_its_file(tmp_path: Path) -> None:
    model = distilled(term(classifier="head"))
    assert len(model.terms[0].trainable_variables) == 9
    assert len(model.student.weights) == len(network(4, 1, "plain").weights)
    assert_resumes(lambda: distilled(term(classifier="head", factor=3)), tmp_path)


def test_evaluation_uses_the_running_statistics_of_the_projector() -> None:
    model = distilled(term())
    fitted(model, 1)
    before = [as_array(weight) for weight in model.terms[0].adapters[0].weights]

    values = [model.evaluate(inputs(), np.zeros((5, 3)), verbose=0, return_dict=True) for _ in range(2)]

    assert values[0] == values[1]
    for weight, expected in zip(model.terms[0].adapters[0].weights, before, strict=True):
        np.testing.assert_array_equal(as_array(weight), expected)


def test_vectors_are_projected_by_dense_layers() -> None:
    reused = ReusedClassifierDistillation("pool", "pool")
    model = DistillModel(network(4, 1, "student"), network(5, 2, "teacher"), reused, task_weight=0.0)
    model.compile("sgd", "mse", jit_compile=False)
    fitted(model, 1)

    deployed = reused.deployable(model.student, model.teacher)

    pooled = keras.Model(model.student.input, model.student.get_layer("pool").output)(inputs())
    expected = model.teacher.get_layer("head")(reused.adapters[0](pooled, training=False))
    np.testing.assert_allclose(as_array(deployed(inputs())), as_array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: term(factor=0), r"`factor` to be at least 1\. Received: factor=0"),
        (
            lambda: ReusedClassifierDistillation(["norm", "body"], ["norm", "body"]),
            r"`student_layer` to be one layer\. Received: 2",
        ),
        (
            lambda: distilled(ReusedClassifierDistillation("body", "norm")),
            r"the teacher to have one Dense layer of 4 inputs, .* Received: 0: none",
        ),
        (
            lambda: distilled(ReusedClassifierDistillation("head", "body")),
            r"'head' and 'body' to return maps \(N, H, W, C\) or vectors\. Received: \(None, 3\) and",
        ),
        (
            lambda: term().deployable(network(4, 1, "student"), network(4, 2, "teacher")),
            r"the projector to be made\. Make a DistillModel with the term first\. Received: no model yet",
        ),
        (lambda: distilled(term(), teacher=scaled()), r"make its outputs from the average of 'body'\. Name the last"),
    ],
)
def test_places_that_do_not_fit_raise(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def scaled() -> keras.Model:
    """A teacher whose classifier does not read the average of its map."""
    teacher_inputs = keras.Input((3, 3, 2))
    maps = keras.layers.Conv2D(8, 2, 2, "same", name="body")(teacher_inputs)
    pooled = keras.layers.GlobalMaxPooling2D(name="pool")(maps)
    return keras.Model(teacher_inputs, keras.layers.Dense(3, name="head")(pooled))


def test_a_classifier_that_is_not_named_raises() -> None:
    with pytest.raises(TypeError, match=r"Expected `classifier` to be the name of a layer\. Received: classifier=3"):
        term(classifier=3)
