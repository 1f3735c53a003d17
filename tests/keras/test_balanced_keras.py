"""Balanced weights in Keras: the rule by hand, every way to train, the errors (W2)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, mlp, table

from keras_distill import (
    DistillModel,
    DistillStep,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    MutualLearning,
    SoftTargetLoss,
    balancing,
)
from keras_distill.schedules import Balanced, Linear

X, Y = table(32)
BATCH, SHARES = 8, (("logits", 0.5), ("hidden", 2.0))
tensorflow = pytest.mark.tensorflow
pytestmark = pytest.mark.not_jax  # which is refused


def squared(student: Any, teacher: Any) -> Any:
    return ops.mean(ops.square(student - teacher))


def model(terms: Any, rate: float = 0.0, teacher: Any = None, **settings: Any) -> DistillModel:
    compiled = {name: settings.pop(name) for name in ("run_eagerly", "jit_compile") if name in settings}
    keras.utils.set_random_seed(1)
    made = DistillModel(mlp(8), mlp(8, name="teacher") if teacher is None else teacher, terms, **settings)
    made.compile(keras.optimizers.SGD(rate), cross_entropy(), **compiled)
    return made


def arrays(net: keras.Model, x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hidden feature, the logits and the kernel between them, in float64."""
    kernels = [np.asarray(ops.convert_to_numpy(weight), "float64") for weight in net.weights]
    hidden = np.maximum(x @ kernels[0] + kernels[1], 0.0)
    return hidden, hidden @ kernels[2] + kernels[3], kernels[2]


def ratios(distilled: DistillModel, x: Any, y: Any) -> dict[str, float]:
    """Norm of the task loss's gradient over that of a squared error's, at the logits and at the hidden layer."""
    (hidden, z, kernel), (target, expected, _) = (arrays(net, x) for net in (distilled.student, distilled.teacher))
    softmax = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    task = (softmax - np.eye(3)[y]) / len(x)
    at_hidden = task @ kernel.T  # of the layer's output, behind its activation
    own = 2 * (z - expected) / z.size, 2 * (hidden - target) / hidden.size
    norms = [np.linalg.norm(gradient) for gradient in (task, own[0], at_hidden, own[1])]
    return {"logits": norms[0] / norms[1], "hidden": norms[2] / norms[3]}


def batches(count: int) -> list[tuple[Any, Any]]:
    return [(X[start : start + BATCH], Y[start : start + BATCH]) for start in range(0, count * BATCH, BATCH)]


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"jit_compile": False}])
def test_the_weight_of_a_step_is_the_share_times_the_median_of_the_ratios_so_far(compiled: Any) -> None:
    terms = [
        LogitsDistillation(squared, weight=Balanced(0.5, steps=2)),
        FeatureDistillation("hidden", "hidden", squared, weight=Balanced(2.0, steps=3)),
    ]
    distilled, known = model(terms, **compiled), {"logits": [], "hidden": []}
    for number, (x, y) in enumerate(batches(4)):
        for name, ratio in ratios(distilled, x, y).items():
            if number < {"logits": 2, "hidden": 3}[name]:
                known[name].append(ratio)
        logs = distilled.train_on_batch(x, y, return_dict=True)
        weights = {name: share * np.exp(np.median(np.log(known[name]))) for name, share in SHARES}
        assert {term.name: term.weight for term in distilled.terms} == pytest.approx(weights, rel=1e-5)
        if number == 0:
            expected = sum(weights[name] * float(logs[f"{name}_loss"]) for name in weights)
            assert float(logs["distillation_loss"]) == pytest.approx(expected, rel=1e-5)
    assert not any(term.measuring for term in distilled.terms)


def test_losses_far_apart_all_get_the_share_of_one_setting() -> None:
    scales = (1e-5, 1e-3, 1.0, 1e3, 1e5)
    terms = [
        LogitsDistillation(lambda s, t, scale=scale: scale * squared(s, t), weight="balanced", name=f"scaled_{index}")
        for index, scale in enumerate(scales)
    ]
    distilled = model(terms, run_eagerly=True)
    distilled.train_on_batch(X, Y)
    shares = [
        term.weight * scale / ratios(distilled, X, Y)["logits"]
        for term, scale in zip(distilled.terms, scales, strict=True)
    ]
    assert shares == pytest.approx([1.0] * 5, rel=1e-4)


def test_accumulated_batches_give_the_weight_of_the_large_batch() -> None:
    weights = []
    for batch, accumulated in ((16, None), (8, 2)):
        keras.utils.set_random_seed(1)
        distilled = DistillModel(mlp(8), mlp(8, name="teacher"), LogitsDistillation(weight=Balanced(steps=1)))
        optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated)
        distilled.compile(optimizer, cross_entropy(), run_eagerly=True)
        distilled.fit(X, Y, batch_size=batch, shuffle=False, verbose=0)
        weights.append(distilled.terms[0].weight)
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_after_the_measurement_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, squares = [], balancing._squared_norms
    monkeypatch.setattr(balancing, "_squared_norms", lambda *a: calls.append(1) or squares(*a))
    distilled = model(LogitsDistillation(weight=Balanced(steps=2)), run_eagerly=True)
    distilled.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0)
    assert len(calls) == 2
    distilled.evaluate(X, Y, verbose=0)
    assert len(calls) == 2


def test_fit_logs_the_weight_and_a_file_holds_it(tmp_path: Any) -> None:
    distilled = model(LogitsDistillation(weight=Balanced(steps=3)), rate=0.1)
    history = distilled.fit(X, Y, batch_size=16, verbose=0).history
    assert history["logits_weight"] == [pytest.approx(distilled.terms[0].weight)]
    distilled.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = distilled.teacher
    assert repr(loaded.terms[0].schedules["weight"]) == "Balanced(share=1.0, steps=3)"
    assert loaded.terms[0].weight == pytest.approx(distilled.terms[0].weight)
    for each in (distilled, loaded):  # two of the three steps are made
        each.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    assert loaded.terms[0].weight == pytest.approx(distilled.terms[0].weight, rel=1e-5)


def test_a_schedule_of_the_share_follows_the_training_and_the_ratio_stays() -> None:
    share = Linear(1.0, 0.0, duration=4, over="steps")
    distilled, seen = model(LogitsDistillation(weight=Balanced(share, steps=1)), run_eagerly=True), []
    for x, y in batches(4):
        distilled.train_on_batch(x, y)
        seen.append(distilled.terms[0].weight)
    assert [weight / seen[0] for weight in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_without_a_task_loss_the_first_term_with_a_number_is_the_measure() -> None:
    terms = [
        LogitsDistillation(squared, weight=Balanced(0.5), name="balanced"),
        LogitsDistillation(lambda s, t: 7.0 * squared(s, t), weight=3.0, name="number"),
    ]
    distilled = model(terms, task_weight=0.0, run_eagerly=True)
    distilled.train_on_batch(X, Y)
    assert distilled.terms[0].weight == pytest.approx(0.5 * 3.0 * 7.0, rel=1e-5)


def test_two_models_with_one_term_have_weights_of_their_own() -> None:
    term = LogitsDistillation(weight=Balanced(steps=1))
    first, second = model(term, run_eagerly=True), model(term, run_eagerly=True)
    for each, x in ((first, X), (second, 3 * X)):
        each.train_on_batch(x, Y)
    alone = model(LogitsDistillation(weight=Balanced(steps=1)), run_eagerly=True)
    alone.train_on_batch(X, Y)
    assert first.terms[0].weight == pytest.approx(alone.terms[0].weight)
    assert second.terms[0].weight != pytest.approx(alone.terms[0].weight)


@tensorflow
def test_half_precision_measures_about_the_same_also_where_gradients_are_tiny() -> None:
    weights = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        loss = lambda s, t: 1e-6 * squared(ops.cast(s, "float32"), ops.cast(t, "float32"))  # noqa: E731
        distilled = model(LogitsDistillation(loss, weight="balanced"), run_eagerly=True)
        distilled.train_on_batch(X, Y)
        weights.append(distilled.terms[0].weight)
    assert weights[1] == pytest.approx(weights[0], rel=0.03)


def both() -> list[Any]:
    hidden = FeatureDistillation("hidden", "hidden", weight="balanced")
    return [LogitsDistillation(weight=Balanced(steps=2)), hidden]


@tensorflow
@pytest.mark.parametrize("graph", [False, True])
def test_a_custom_loop_has_the_weights_of_fit(graph: bool) -> None:
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    step = DistillStep(mlp(8), mlp(8, name="teacher"), both())
    optimizer, task = keras.optimizers.SGD(0.1), cross_entropy()

    def train(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape, step.watching():
            output = step.student(x, training=True)
            loss = task(y, output)
            total = loss + step.losses(output, labels=y, task_loss=loss)["distillation_loss"]
        variables = step.student.trainable_variables + step.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))

    run, fitted = tf.function(train) if graph else train, model(both(), rate=0.1, run_eagerly=True)
    for number, (x, y) in enumerate(batches(4)):
        step.advance(number)
        run(tf.constant(x), tf.constant(y))
        fitted.train_on_batch(x, y)
        expected = {term.name: term.weight for term in fitted.terms}
        assert {term.name: term.weight for term in step.terms} == pytest.approx(expected, rel=1e-4)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "words"), [(0.0, "that is 0 in all 2 of them"), (np.nan, "that is not finite")])
def test_a_term_without_a_usable_gradient_is_an_error_in_words(factor: float, words: str) -> None:
    term = LogitsDistillation(lambda s, t: factor * squared(s, t), weight=Balanced(steps=2))
    distilled = model(term, run_eagerly=True)
    with pytest.raises(ValueError, match=f"gradient of term 'logits' to be finite and not 0 .*{words}"):
        distilled.fit(X, Y, batch_size=BATCH, verbose=0)


def test_a_tiny_gradient_is_warned_of() -> None:
    term = LogitsDistillation(lambda s, t: 1e-8 * squared(s, t), weight=Balanced(steps=1))
    with pytest.warns(UserWarning, match=r"The gradient of term 'logits' is .* times smaller"):
        model(term, run_eagerly=True).fit(X, Y, batch_size=16, verbose=0)


@tensorflow
@pytest.mark.parametrize("eager", [False, True])
def test_a_feature_that_the_task_loss_does_not_use_is_refused(eager: bool) -> None:
    def heads(name: str) -> keras.Model:
        inputs = keras.Input((6,))
        aside = keras.layers.Dense(2, name="aside")(inputs)
        return keras.Model(inputs, [keras.layers.Dense(3, name="logits")(inputs), aside], name=name)

    terms = [FeatureDistillation("aside", "aside", weight="balanced", name="far")]
    distilled = DistillModel(heads("student"), heads("teacher"), terms)
    distilled.compile("sgd", [cross_entropy(), None], run_eagerly=eager)
    with pytest.raises(ValueError, match="Expected the task loss to depend on the student's 'aside'"):
        distilled.fit(X, [Y, Y], verbose=0)


@tensorflow
def test_an_eager_step_outside_of_the_context_is_an_error() -> None:
    step = DistillStep(mlp(8), mlp(8, name="teacher"), LogitsDistillation(weight="balanced"))
    step.advance(0)
    with step.watching():
        output = step.student(X)
    with pytest.raises(ValueError, match=r"inside `with step.watching\(\):` where a weight is balanced"):
        step.losses(output, task_loss=ops.mean(output))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitsDistillation(weight="balance"), "The only word is 'balanced'"),
        (lambda: SoftTargetLoss(Balanced()), "Only the weight of a term can be balanced"),
        (lambda: model(None, task_weight=Balanced()), "Only the weight of a term can be balanced"),
        (lambda: model(LogitsDistillation(weight="balanced"), teacher=EMATeacher()), "are equal at first"),
        (
            lambda: MutualLearning([mlp(8, name="a"), mlp(8, name="b")], LogitsDistillation(weight="balanced")),
            "numbers in term 'logits' of MutualLearning",
        ),
        (
            lambda: model(LogitsDistillation(weight="balanced"), task_weight=0.0, run_eagerly=True).train_on_batch(
                X, Y
            ),
            "a term with a number as its weight, that the weight of term 'logits' refers to",
        ),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()
