"""A frozen encoder that both models share, and teachers whose policy is half precision."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import cross_entropy, kl64, mlp, table

from keras_distill import DistillModel, EMATeacher, FeatureDistillation, LogitsDistillation, SoftTargetLoss

X, Y = table(16)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def heads(encoder: keras.Model) -> list[keras.Model]:
    models = []
    for name, width in (("student", 4), ("teacher", 8)):
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(width, "tanh", name="hidden")(encoder(inputs))
        models.append(keras.Model(inputs, keras.layers.Dense(3)(hidden), name=name))
    return models


def encoder() -> keras.Model:
    inputs = keras.Input((6,))
    normal = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(5, "tanh")(inputs))
    return keras.Model(inputs, normal, name="encoder")


@pytest.mark.parametrize("eager", [True, False])
def test_a_frozen_encoder_of_both_models_trains_the_head_as_two_copies_of_it_do(eager: bool) -> None:
    keras.utils.set_random_seed(5)
    common = encoder()
    common.trainable = False
    student, teacher = heads(common)
    apart = [keras.models.clone_model(model) for model in (student, teacher)]
    for copy, model in zip(apart, (student, teacher), strict=True):
        copy.set_weights(model.get_weights())
        copy.get_layer("encoder").trainable = False
    before = common.get_weights()
    trained = []
    for pair in ((student, teacher), apart):
        model = DistillModel(*pair, [LogitsDistillation(), FeatureDistillation("hidden", "hidden", adapter="linear")])
        model.terms[1].adapters[0].set_weights([np.full((4, 8), 0.1), np.zeros(8)])
        model.compile(keras.optimizers.SGD(0.1), cross_entropy(), run_eagerly=eager, jit_compile=False)
        model.fit(X, Y, epochs=2, **FIT)
        trained.append(pair[0].get_weights())
    for own, expected in zip(*trained, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)
    for own, expected in zip(common.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, expected)


def test_the_average_of_a_student_with_a_frozen_encoder_keeps_the_encoder() -> None:
    common = encoder()
    common.trainable = False
    student, _ = heads(common)
    model = DistillModel(student, EMATeacher(0.5))
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), run_eagerly=True)
    model.fit(X, Y, **FIT)
    averaged = model.teacher.averaged().get_layer("encoder")
    for own, expected in zip(averaged.get_weights(), common.get_weights(), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-6)


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("eager", [True, False])
def test_a_teacher_in_half_precision_is_compared_in_float32(policy: str, eager: bool) -> None:
    keras.config.set_dtype_policy(policy)
    teacher = mlp(6, name="teacher")
    keras.config.set_dtype_policy("float32")
    model = DistillModel(mlp(), teacher, LogitsDistillation(SoftTargetLoss(temperature=2.0)), task_weight=0.0)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=eager)
    z = np.asarray(model.student.predict(X, verbose=0), "float64")
    target = keras.ops.convert_to_numpy(keras.ops.cast(teacher(X, training=False), "float32"))
    value = model.evaluate(X, verbose=0, return_dict=True)["logits_loss"]
    # XLA may keep more digits between the layers of a teacher than steps that are executed one by one
    np.testing.assert_allclose(value, kl64(z, target, 2.0).mean(), rtol=2e-4 if eager else 3e-2)
    dtypes = {keras.backend.standardize_dtype(weight.dtype) for weight in teacher.weights}
    assert np.isfinite(model.fit(X, **FIT).history["loss"]).all()
    assert dtypes == {teacher.dtype_policy.variable_dtype}
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.student.weights} == {"float32"}


def test_large_features_of_a_teacher_in_float16_stay_finite() -> None:
    keras.config.set_dtype_policy("float16")
    teacher = mlp(8, name="teacher")
    keras.config.set_dtype_policy("float32")
    teacher.set_weights([np.abs(weight) * 1e3 for weight in teacher.get_weights()])
    model = DistillModel(mlp(8), teacher, FeatureDistillation("hidden", "hidden", adapter=None), task_weight=0.0)
    model.compile(keras.optimizers.SGD(1e-9), run_eagerly=True)
    logs = model.evaluate(X, verbose=0, return_dict=True)
    assert np.isfinite(logs["hidden_loss"])
    assert logs["hidden_loss"] > 65504  # the largest float16
