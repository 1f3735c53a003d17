"""CurriculumTemperature in Keras: published numbers, gradients, trainings, files, what refuses it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_loss_cases import differentiated
from loss_case import golden_arrays, golden_index

from keras_distill import (
    CurriculumTemperature,
    DecoupledKDLoss,
    DistillModel,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    NormalizedKDLoss,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
    TeacherCache,
    WeightedSoftLabelLoss,
    losses,
)
from keras_distill.schedules import Linear

GOLDEN = golden_index("ctkd")
LEARNING = [SoftTargetLoss, SoftCrossEntropyLoss, DecoupledKDLoss, NormalizedKDLoss, WeightedSoftLabelLoss, DISTLoss]


def drawn(seed: int, *shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal(shape)


def gradient(function: Any, variable: keras.Variable) -> float:
    """The derivative of a scalar by a weight, on any backend but JAX."""
    if keras.backend.backend() == "torch":
        variable.value.grad = None
        function().backward()
        return float(variable.value.grad)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = function()
    return float(tape.gradient(value, variable.value))


@pytest.mark.tensorflow  # the others compute a float64 array in float32
@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["case"])
def test_value_temperature_and_reversed_gradient_are_the_published_ones(entry: dict[str, Any]) -> None:
    arrays, reference = golden_arrays(entry), entry["hyperparameters"]
    low, span = reference["t_start"], reference["t_end"]
    temperature = CurriculumTemperature(low, low + span, reversal_weight=-reference["lambda_"], dtype="float64")
    loss = SoftTargetLoss(temperature, dtype="float64")
    theta = loss.temperature.theta
    theta.assign(arrays["param_global_T"][0])
    assert float(loss.temperature.value) == pytest.approx(float(arrays["temperature"][0]), rel=1e-12)
    result = differentiated(loss, arrays["student_logits"], arrays["teacher_logits"], "float64")
    assert result.value == pytest.approx(float(arrays["loss"]), rel=1e-9)
    np.testing.assert_allclose(result.student, arrays["grad_student_logits"], rtol=1e-9, atol=1e-12)
    reversed_gradient = gradient(lambda: loss(arrays["teacher_logits"], arrays["student_logits"]), theta)
    assert reversed_gradient == pytest.approx(float(arrays["gradp_global_T"][0]), rel=1e-9)


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.__name__)
def test_each_loss_has_the_gradient_by_its_temperature(kind: Any) -> None:
    """Against central differences of the loss with numbers as temperatures."""
    student, teacher, labels = drawn(0, 4, 6), drawn(1, 4, 6), np.array([1, 0, 2, 5])
    target = (teacher, labels) if kind.needs_labels else teacher
    loss = kind(CurriculumTemperature(0.5, 6.0, reversal_weight=0.7, dtype="float64"), dtype="float64")
    theta = float(loss.temperature.theta)

    def at(moved: float) -> float:
        return float(kind(0.5 + 5.5 / (1 + math.exp(-moved)), dtype="float64")(target, student))

    step = 1e-4
    differences = 8 * (at(theta + step) - at(theta - step)) - at(theta + 2 * step) + at(theta - 2 * step)
    expected = -0.7 * differences / 12 / step
    assert float(loss(target, student)) == pytest.approx(at(theta), rel=1e-9)
    assert gradient(lambda: loss(target, student), loss.temperature.theta) == pytest.approx(expected, rel=1e-6)
    assert abs(expected) > 1e-6


def network(seed: int, name: str) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="scores")(inputs), name=name)


def distilled(least: float = 0.2, **settings: Any) -> DistillModel:
    weight = Linear(least, 1.0, duration=3, over="epochs")
    term = LogitsDistillation(SoftTargetLoss(CurriculumTemperature(reversal_weight=weight)), weight=0.5)
    model = DistillModel(network(1, "student"), network(2, "teacher"), term, **settings)
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


DATA = drawn(3, 16, 4).astype("float32"), np.arange(16) % 3


@pytest.mark.not_jax
@pytest.mark.parametrize("least", [0.2, 0.0])  # 0 as in the default
def test_a_training_is_the_loop_by_hand(least: float) -> None:
    model, held = distilled(least), network(2, "teacher")
    weights, theta = [np.array(w, "float64") for w in network(1, "student").get_weights()], 1.0
    logs = model.fit(*DATA, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    seen = []
    for epoch in range(2):
        for start in (0, 8):
            x, y = DATA[0][start : start + 8].astype("float64"), DATA[1][start : start + 8]
            z_t = ops.convert_to_numpy(held(x)).astype("float64")
            z_s = x @ weights[0] + weights[1]
            sigmoid = 1 / (1 + math.exp(-theta))
            temperature = 1 + 20 * sigmoid
            seen.append(temperature)

            def softmax(scores: np.ndarray) -> np.ndarray:
                exponentials = np.exp(scores - scores.max(1, keepdims=True))
                return exponentials / exponentials.sum(1, keepdims=True)

            def loss_at(t: float, z_s: np.ndarray = z_s, z_t: np.ndarray = z_t) -> float:
                p, q = softmax(z_t / t), softmax(z_s / t)
                return float(t**2 * (p * (np.log(p) - np.log(q))).sum() / len(z_s))

            slope = (loss_at(temperature + 1e-4) - loss_at(temperature - 1e-4)) / 2e-4
            by_logits = softmax(z_s) - np.eye(3)[y]
            by_logits += 0.5 * temperature * (softmax(z_s / temperature) - softmax(z_t / temperature))
            weights[0] -= 0.5 * x.T @ by_logits / 8
            weights[1] -= 0.5 * by_logits.sum(0) / 8
            reversal = least + (1 - least) * epoch / 3
            theta += 0.5 * reversal * 0.5 * slope * 20 * sigmoid * (1 - sigmoid)
    for expected, value in zip(weights, model.student.get_weights(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    assert float(model.terms[0].curriculum.theta) == pytest.approx(theta, rel=1e-4)
    means = [np.mean(seen[:2]), np.mean(seen[2:])]
    assert logs["logits_temperature"] == pytest.approx(means, rel=1e-4)
    assert len(model.student.weights) == 2


@pytest.mark.not_jax
def test_a_loaded_model_ends_where_a_straight_run_does(tmp_path: Path) -> None:
    straight, first = distilled(), distilled()
    settings: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}
    straight.fit(*DATA, epochs=3, **settings)
    first.fit(*DATA, epochs=1, **settings)
    first.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = straight.teacher
    assert float(loaded.terms[0].curriculum.theta) == float(first.terms[0].curriculum.theta) != 1
    loaded.fit(*DATA, epochs=3, initial_epoch=1, **settings)
    assert float(loaded.terms[0].curriculum.theta) == pytest.approx(float(straight.terms[0].curriculum.theta), rel=1e-5)


@pytest.mark.not_jax
def test_evaluation_learns_nothing_and_two_models_learn_numbers_of_their_own() -> None:
    term = LogitsDistillation(SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0)))
    models = [DistillModel(network(1, "student"), network(seed, "teacher"), term) for seed in (2, 3)]
    for model in models:
        model.compile(keras.optimizers.SGD(0.5))
        before = float(model.terms[0].curriculum.theta)
        results = model.evaluate(DATA[0], return_dict=True, verbose=0)
        assert float(model.terms[0].curriculum.theta) == before
        assert "logits_temperature" not in results
        model.fit(DATA[0], verbose=0)
    thetas = [float(model.terms[0].curriculum.theta) for model in models]
    assert len({1.0, *thetas}) == 3


def test_settings_are_kept_in_the_config() -> None:
    loss = DecoupledKDLoss(CurriculumTemperature(2.0, 5.0, reversal_weight=Linear(0.0, 0.5)))
    again = DecoupledKDLoss.from_config(loss.get_config())
    assert (again.temperature.minimum, again.temperature.maximum) == (2.0, 5.0)
    assert again.temperature.schedules["reversal_weight"].end == 0.5
    assert "CurriculumTemperature(minimum=2.0" in repr(loss)


def test_losses_that_do_not_learn_it_refuse_it() -> None:
    refusing = []
    for name in losses.__all__:
        kind = getattr(losses, name)
        if "temperature" in getattr(kind.__init__, "__annotations__", {}) and kind not in LEARNING:
            with pytest.raises(TypeError, match=f"`temperature` of {name} to be a number or a schedule"):
                kind(temperature=CurriculumTemperature())
            refusing.append(name)
    assert {"ReverseKLLoss", "ChannelWiseLoss", "MinifinetuningLoss", "BinarySoftTargetLoss"} <= set(refusing)


def likeliest(tmp_path: Path) -> Any:
    cache = TeacherCache.build(network(2, "teacher"), DATA[0], tmp_path, top_k=2)
    model = DistillModel(network(1, "student"), None, distilled().terms[0])
    model.compile("sgd", run_eagerly=True)
    return model.fit(cache.attach(DATA[0], batch_size=8), verbose=0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: CurriculumTemperature(0.0), ValueError, "`minimum` to be greater than 0"),
        (lambda path: CurriculumTemperature(4.0, 4.0), ValueError, "`maximum` to be greater than `minimum`"),
        (lambda path: CurriculumTemperature(reversal_weight=-1), ValueError, "`reversal_weight` to be at least 0"),
        (
            lambda path: FeatureDistillation("a", "b", SoftTargetLoss(CurriculumTemperature())),
            ValueError,
            "temperature of SoftTargetLoss to be a number or a schedule in a term on layers.* LogitsDistillation",
        ),
        (
            lambda path: DistillModel(
                network(1, "student"),
                [network(2, "first"), network(3, "second")],
                distilled().terms[0],
                mix="probabilities",
            ),
            ValueError,
            "as the temperature of term 'logits' with mix='probabilities'",
        ),
        (likeliest, ValueError, "a cache of full outputs for term 'logits', whose temperature is learned"),
    ],
)
def test_bad_settings_and_places_are_refused(make: Any, error: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path)
