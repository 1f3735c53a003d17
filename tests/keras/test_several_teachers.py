"""Several teachers: their weights, what is averaged, and a teacher for each example, against NumPy in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops
from keras_nets import cross_entropy, kl64, log_softmax64, numpy_of
from keras_several import FIT, HEAT, SOURCE, Situation, X, Y, compiled, entropy, mlp, probabilities, soft, teachers

import lightning_distill
from keras_distill import (
    DistillModel,
    DistillStep,
    DISTLoss,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SelfDistillation,
    SoftTargetLoss,
    functional,
)
from keras_distill.schedules import Linear


def close(value: float, expected: Any) -> None:
    np.testing.assert_allclose(value, float(expected), rtol=2e-5)


def test_weights_are_divided_by_their_sum_and_multiply_the_losses() -> None:
    case = Situation(teacher_weights=[2.1, 0.9])
    close(case.value(), 0.7 * kl64(case.z, case.a, HEAT).mean() + 0.3 * kl64(case.z, case.b, HEAT).mean())


def test_probabilities_is_one_divergence_to_the_weighted_mean_of_the_softened_probabilities() -> None:
    case = Situation(teacher_weights=[0.7, 0.3], mix="probabilities")
    target = 0.7 * probabilities(case.a, HEAT) + 0.3 * probabilities(case.b, HEAT)
    rows = (target * (np.log(target) - log_softmax64(case.z / HEAT))).sum(-1)
    close(case.value(), HEAT**2 * rows.mean())


def test_the_divergence_to_the_mean_is_not_the_mean_of_the_divergences() -> None:
    """They differ by the entropies of the teachers, which do not depend on the student."""
    mixture, mean = Situation(mix="probabilities"), Situation()
    assert mixture.value() < mean.value() - 0.01
    target = (probabilities(mean.a, HEAT) + probabilities(mean.b, HEAT)) / 2
    gap = -(target * np.log(target)).sum(-1)
    for logits in (mean.a, mean.b):
        p = probabilities(logits, HEAT)
        gap = gap + (p * np.log(p)).sum(-1) / 2
    close(mean.value() - mixture.value(), HEAT**2 * gap.mean())


def test_logits_is_one_loss_to_the_weighted_mean_of_the_logits() -> None:
    case = Situation(LogitsDistillation(LogitMSELoss()), teacher_weights=[0.25, 0.75], mix="logits")
    close(case.value(), np.square(case.z - 0.25 * case.a - 0.75 * case.b).mean())
    case = Situation(teacher_weights=[0.25, 0.75], mix="logits")
    close(case.value(), kl64(case.z, 0.25 * case.a + 0.75 * case.b, HEAT).mean())


def confidence(case: Situation) -> list[Any]:
    certainty = np.exp(-np.stack([entropy(case.a), entropy(case.b)]))
    return list(certainty / certainty.sum(0))


def test_entropy_weighs_the_teachers_in_each_example() -> None:
    case = Situation(teacher_weights="entropy")
    first, second = confidence(case)
    close(case.value(), (first * kl64(case.z, case.a, HEAT) + second * kl64(case.z, case.b, HEAT)).mean())
    assert first.max() - first.min() > 0.2  # the weights differ from example to example


def test_entropy_multiplies_the_sample_weights() -> None:
    case, weights = Situation(teacher_weights="entropy"), np.arange(8.0, dtype="float32")
    first, second = confidence(case)
    rows = first * kl64(case.z, case.a, HEAT) + second * kl64(case.z, case.b, HEAT)
    close(case.value(sample_weight=weights), (weights * rows).mean())
    close(case.value(sample_weight=weights[:, None]), (weights * rows).mean())


def test_entropy_weighs_the_probabilities_of_a_mixture() -> None:
    case = Situation(teacher_weights="entropy", mix="probabilities")
    first, second = confidence(case)
    target = first[:, None] * probabilities(case.a, HEAT) + second[:, None] * probabilities(case.b, HEAT)
    rows = (target * (np.log(target) - log_softmax64(case.z / HEAT))).sum(-1)
    close(case.value(), HEAT**2 * rows.mean())


def test_three_teachers_are_weighed_by_the_number_of_classes_that_each_hesitates_between() -> None:
    logits = [np.random.default_rng(seed).normal(size=(4, 5)) * (seed + 1) for seed in range(3)]
    certainty = np.exp(-np.stack([entropy(each) for each in logits]))
    weights = functional.confidence_weights([ops.convert_to_tensor(each.astype("float32")) for each in logits])
    np.testing.assert_allclose(numpy_of(weights), certainty / certainty.sum(0), rtol=1e-4)
    forbidden = ops.array([[0.0, 0.0, -np.inf, -np.inf]])  # hesitates between two of four classes
    sure, even = ops.array([[1e4, 0.0, 0.0, 0.0]]), ops.zeros((1, 4))
    weights = functional.confidence_weights([sure, forbidden, even])
    np.testing.assert_allclose(numpy_of(weights)[:, 0], np.array([4, 2, 1]) / 7, rtol=1e-6)
    np.testing.assert_allclose(numpy_of(functional.confidence_weights([sure] * 3)), 1 / 3, rtol=1e-6)


SCORES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")
TEACHERS = {
    "three teachers": SCORES,
    "teachers that are sure": 1e4 * SCORES,
    "half precision": SCORES.astype("float16"),
    "forbidden classes": np.where(np.arange(5) < 2, -np.inf, SCORES),
}


@pytest.mark.parametrize("scores", TEACHERS.values(), ids=list(TEACHERS))
def test_several_teachers_are_mixed_alike_in_both_halves(scores: Any) -> None:
    torch_half = lightning_distill.functional
    scores = scores if scores.dtype == "float16" else scores.astype("float32")
    each, tensors = [ops.convert_to_tensor(row) for row in scores], [torch.tensor(row) for row in scores]

    weights, torch_weights = functional.confidence_weights(each), torch_half.confidence_weights(tensors)
    np.testing.assert_allclose(numpy_of(weights), torch_weights[..., 0], rtol=1e-5)
    for share, torch_share in [(weights, torch_weights), (ops.array([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.5, 0.0]))]:
        mixture = ops.softmax(functional.mixture_logits(each, share, temperature=2.0) / 2.0)
        expected = (torch_half.mixture_logits(tensors, torch_share, temperature=2.0) / 2.0).softmax(-1)
        np.testing.assert_allclose(numpy_of(mixture), expected, rtol=1e-5, atol=1e-7)
        mean, expected = functional.mean_logits(each, share), torch_half.mean_logits(tensors, torch_share)
        np.testing.assert_allclose(numpy_of(mean), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_softens_probabilities_of_models_that_end_in_a_softmax() -> None:
    def net(width: int, seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        layers = [keras.Input((6,)), keras.layers.Dense(width, "relu"), keras.layers.Dense(3, "softmax")]
        return keras.Sequential(layers)

    student, both = net(4, 0), [net(5, 1), net(9, 2)]
    term = LogitsDistillation(SoftTargetLoss(temperature=HEAT, from_logits=False))
    step = DistillStep(student, both, term, teacher_weights=[0.7, 0.3], mix="probabilities")
    z, a, b = (np.log(np.asarray(model.predict(X, verbose=0), "float64")) for model in (student, *both))
    target = 0.7 * probabilities(a, HEAT) + 0.3 * probabilities(b, HEAT)
    rows = (target * (np.log(target) - log_softmax64(z / HEAT))).sum(-1)
    with step.watching():
        output = student(X)
    close(float(step.losses(output)["distillation_loss"]), HEAT**2 * rows.mean())


@pytest.mark.parametrize("route", ["source", lambda inputs: inputs["source"]])
@pytest.mark.parametrize("columns", [1, 0])
def test_a_route_compares_each_example_with_its_own_teacher(route: Any, columns: int) -> None:
    case = Situation(route=route)
    source = SOURCE[:, None] if columns else SOURCE
    rows = np.where(SOURCE == 0, kl64(case.z, case.a, HEAT), kl64(case.z, case.b, HEAT))
    close(case.value({"input": X, "source": source}), rows.mean())


def test_a_route_holds_for_losses_over_the_batch() -> None:
    case = Situation(LogitsDistillation(DISTLoss()), route=lambda _: SOURCE)
    own = np.where(SOURCE[:, None] == 0, case.a, case.b).astype("float32")
    close(case.value(X), float(DISTLoss()(own, case.z.astype("float32"))))


def hidden(model: keras.Model) -> Any:
    return np.asarray(keras.Model(model.input, model.get_layer("hidden").output).predict(X, verbose=0), "float64")


@pytest.mark.parametrize("routed", [True, False])
def test_teachers_with_other_features_have_an_adapter_each(routed: bool) -> None:
    case = Situation(FeatureDistillation("hidden", "hidden"), **({"route": lambda _: SOURCE} if routed else {}))
    first, second = case.step.terms[0].adapters
    feature = ops.convert_to_tensor(hidden(case.student).astype("float32"))
    rows = [
        np.square(numpy_of(adapter(feature)) - hidden(model)).mean(-1)
        for adapter, model in zip((first, second), case.teachers, strict=True)
    ]
    expected = np.where(SOURCE == 0, *rows) if routed else (rows[0] + rows[1]) / 2
    close(case.value(X), expected.mean())
    assert len(case.step.trainable_variables) == 4  # two kernels and two biases
    weights = np.arange(8.0, dtype="float32")
    close(case.value(X, sample_weight=weights), (weights * expected).mean())


def test_teachers_with_equal_features_share_an_adapter() -> None:
    step = DistillStep(mlp(7), teachers(5, 5), FeatureDistillation("hidden", "hidden"))
    assert len(step.terms[0].adapters) == 1


def test_adapters_of_each_teacher_are_saved_and_trained_on(tmp_path: Path) -> None:
    model = compiled(terms=FeatureDistillation("hidden", "hidden"), teacher_weights=[0.6, 0.4])
    model.fit(X, Y, **FIT)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    again.teacher, again.run_eagerly = model.teacher, True
    assert again.teacher_weights == [0.6, 0.4]
    for trained in (model, again):
        trained.fit(X, Y, **FIT)
    assert len(again.step.terms[0].adapters) == 2
    for own, expected in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_scheduled_weights_are_followed_logged_and_saved(tmp_path: Path) -> None:
    model = compiled(teacher_weights=[Linear(1.0, 0.0, duration=2, over="epochs"), 0.5])
    logs = model.fit(X, Y, epochs=3, **FIT).history
    assert logs["teacher_0_weight"] == [1.0, 0.5, 0.0]
    assert model.teacher_weights == [0.0, 0.5]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.step.ensemble.mix.schedules["teacher_0_weight"].end == 0.0
    assert again.teacher_weights == [0.0, 0.5]


def test_assigned_weights_count_from_the_next_step() -> None:
    model, other = compiled(teacher_weights=[1, 3]), compiled(teacher_weights=[1, 1])
    other.fit(X, Y, epochs=0, **FIT)
    other.teacher_weights = [1, 3]
    logs = [each.fit(X, Y, **FIT).history["logits_loss"] for each in (model, other)]
    assert logs[0] == logs[1]


def test_a_weight_of_0_ignores_even_a_teacher_that_is_not_finite() -> None:
    case = Situation(teacher_weights=[1.0, 0.0])
    case.teachers[1].set_weights([np.full_like(weight, np.nan) for weight in case.teachers[1].get_weights()])
    close(case.value(), kl64(case.z, case.a, HEAT).mean())


def test_the_agreement_is_that_with_the_teachers_together() -> None:
    case = Situation()
    for settings, target in {
        "weights": ({"teacher_weights": [0.9, 0.1]}, 0.9 * probabilities(case.a) + 0.1 * probabilities(case.b)),
        "logits": ({"mix": "logits"}, case.a + case.b),
        "route": ({"route": lambda _: SOURCE}, np.where(SOURCE[:, None] == 0, case.a, case.b)),
    }.values():
        model = DistillModel(case.student, case.teachers, soft(), **settings)
        model.compile(run_eagerly=True)
        agreement = model.evaluate(X, verbose=0, return_dict=True)["teacher_agreement"]
        np.testing.assert_allclose(agreement, (case.z.argmax(-1) == target.argmax(-1)).mean(), rtol=1e-6)


@pytest.mark.parametrize("eager", [True, False])
def test_a_route_that_names_no_teacher_is_an_error(eager: bool) -> None:
    model = DistillModel(mlp(7), teachers(), soft(), route="source")
    model.compile("sgd", cross_entropy(), run_eagerly=eager, jit_compile=False)
    before = model.student.get_weights()
    wrong = {"input": X, "source": SOURCE + 1}
    words = "Expected `route` to name one of the 2 teachers, 0 to 1, for every example."
    with pytest.raises(ValueError, match=re.escape(f"{words} Received: [1, 2]")):  # arrays, before the first step
        model.fit(wrong, Y, **FIT)
    with pytest.raises(Exception, match=re.escape(words)):
        model.train_on_batch(wrong, Y)
    for own, expected in zip(model.student.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.tensorflow
def test_under_xla_a_route_that_names_no_teacher_makes_the_loss_nan() -> None:
    model = DistillModel(mlp(7), teachers(), soft(), route="source")
    model.compile("sgd", jit_compile=True)
    logs = model.train_on_batch({"input": X, "source": SOURCE + 1}, return_dict=True)
    assert np.isnan(logs["logits_loss"])


@pytest.mark.parametrize("mix", ["losses", "probabilities", "logits"])
def test_an_error_says_which_teacher_it_is_about(mix: str) -> None:
    other = keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Dense(7)])
    with pytest.raises(ValueError, match=r"score the same classes.*This is about teacher 1 of 2, counted from 0\.$"):
        DistillModel(mlp(5), [mlp(7), other], soft(), mix=mix)


def test_an_error_says_which_teachers_layer_it_is_about() -> None:
    other = keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Reshape((1, -1), name="hidden")])
    term = FeatureDistillation("hidden", "hidden")
    with pytest.raises(ValueError, match=r"This is about teacher 1 of 2, counted from 0\.$"):
        DistillModel(mlp(5), [mlp(7), other], term)


def test_a_term_without_a_teacher_may_stand_beside_a_mixture() -> None:
    inputs = keras.Input((6,))
    shallow = keras.layers.Dense(5, "relu", name="shallow")(inputs)
    deep = keras.layers.Dense(6, name="deep")(shallow)
    student = keras.Model(inputs, keras.layers.Dense(3)(deep))
    model = DistillModel(student, teachers(), [soft(), SelfDistillation("shallow", "deep")], mix="probabilities")
    model.compile("sgd", run_eagerly=True)
    assert np.isfinite(model.fit(X, **FIT).history["loss"]).all()
