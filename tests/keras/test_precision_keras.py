"""Precisions: what is narrower than float32 is widened in time, and what is wider stays (K19)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, mlp, table

from keras_distill import (
    DistillModel,
    FactorTransferLoss,
    FeatureDistillation,
    LogitsDistillation,
    MaskedGenerativeLoss,
    VariationalInformationLoss,
)
from keras_distill.functional import focal_global

INPUTS, LABELS = table(16)


def compiled(model: DistillModel, rate: float = 0.1) -> DistillModel:
    model.compile(keras.optimizers.SGD(rate), cross_entropy(), run_eagerly=True)
    return model


def test_k19_a_loss_of_the_users_own_is_given_features_in_float32() -> None:
    """K19: the square of 1e4 is finite in a plain function too, without an adapter."""
    keras.config.set_dtype_policy("mixed_float16")
    student = mlp(8)
    keras.config.set_dtype_policy("float32")
    large = student.get_layer("hidden")
    large.set_weights([large.get_weights()[0], np.full(8, 1e4, "float32")])
    term = FeatureDistillation("hidden", "hidden", lambda a, b: ops.square(a - b), adapter=None)
    model = compiled(DistillModel(student, mlp(8, name="teacher"), term))
    assert 9e7 < model.evaluate(INPUTS, verbose=0, return_dict=True)["hidden_loss"] < 1.1e8


def test_k19_the_inputs_reach_the_student_as_they_are() -> None:
    """K19: its first layer may be float32, because its inputs are not float16."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((6,))
    student = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Rescaling(1e-5, dtype="float32")(inputs)))
    keras.config.set_dtype_policy("float32")
    model = compiled(DistillModel(student, mlp(8, name="teacher")), rate=1e-9)
    large = np.full((4, 6), 1e5, "float32")
    assert np.isfinite(model.predict(large, verbose=0)).all()
    assert np.isfinite(model.fit(large, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("loss", [VariationalInformationLoss, MaskedGenerativeLoss, FactorTransferLoss])
def test_k19_a_teacher_in_float64_is_compared_by_learned_parts_in_float32(loss: Any) -> None:
    """K19: with the value for the same teacher in float32."""
    values, settings = [], {"mask": "channel", "mask_ratio": 0.0} if loss is MaskedGenerativeLoss else {}
    narrow = mlp(8, name="teacher")
    for policy in ("float32", "float64"):
        keras.config.set_dtype_policy(policy)
        teacher = mlp(8, name="teacher")
        keras.config.set_dtype_policy("float32")
        teacher.set_weights(narrow.get_weights())
        keras.utils.set_random_seed(5)
        model = compiled(DistillModel(mlp(8), teacher, FeatureDistillation("hidden", "hidden", loss(**settings))))
        values.append(model.evaluate(INPUTS, LABELS, verbose=0, return_dict=True)["hidden_loss"])
        assert np.isfinite(model.fit(INPUTS, LABELS, verbose=0).history["loss"]).all()
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_k19_contexts_in_float32_are_added_to_differences_in_float64() -> None:
    """K19: as the networks of FocalGlobalLoss are."""
    generator = np.random.default_rng(0)
    student, teacher, foreground = (generator.normal(size=(2, 4, 4, 3)[:rank]) for rank in (4, 4, 3))

    def context(feature: Any) -> Any:
        return ops.tanh(ops.cast(feature, "float32"))

    wide, narrow = (
        focal_global(
            *(ops.convert_to_tensor(array, dtype) for array in (student, teacher, abs(foreground))),
            student_context=context, teacher_context=context, context_weight=1.0,
        )
        for dtype in ("float64", "float32")
    )  # fmt: skip
    np.testing.assert_allclose(ops.convert_to_numpy(wide), ops.convert_to_numpy(narrow), rtol=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher", "everything"])
def test_k19_a_model_in_float64_works_too(who: str) -> None:
    """K19: logs are those of float32, whichever of the two is wider."""
    models = {"student": mlp(8), "teacher": mlp(12, name="teacher")}

    def made(wide: bool) -> DistillModel:
        both: dict[str, Any] = {}
        for name, narrow in models.items():
            keras.config.set_dtype_policy("float64" if wide and who in (name, "everything") else "float32")
            both[name] = mlp(narrow.get_layer("hidden").units, name=name)
            both[name].set_weights(narrow.get_weights())
        keras.config.set_dtype_policy("float32")
        keras.utils.set_random_seed(5)  # of the adapter
        own = LogitsDistillation(lambda a, b: ops.mean(ops.square(ops.cast(a, b.dtype) - b)), name="own")
        return compiled(
            DistillModel(**both, terms=[LogitsDistillation(), FeatureDistillation("hidden", "hidden"), own])
        )

    wide, narrow = made(True), made(False)
    logs = [network.evaluate(INPUTS, LABELS, verbose=0, return_dict=True) for network in (wide, narrow)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert np.isfinite(wide.fit(INPUTS, LABELS, verbose=0).history["loss"]).all()


def test_k19_keras_may_compute_in_float64() -> None:
    """K19: with `set_floatx` the task loss and the terms are float64, those of a user's own function too."""
    keras.config.set_floatx("float64")
    try:
        own = LogitsDistillation(lambda a, b: ops.mean(ops.square(a - b)), name="own")
        terms = [LogitsDistillation(weight=0.5), own]
        model = compiled(DistillModel(mlp(8), mlp(12, name="teacher"), terms, task_weight=0.7))
        logs = model.fit(INPUTS, LABELS, batch_size=16, verbose=0).history
    finally:
        keras.config.set_floatx("float32")
    parts = 0.7 * logs["task_loss"][0] + 0.5 * logs["logits_loss"][0] + logs["own_loss"][0]
    assert logs["loss"][0] == pytest.approx(parts, rel=1e-6)
