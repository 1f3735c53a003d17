"""Weights and masks against NumPy: K11, K12, and several outputs, K13."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import ce64, cross_entropy, kl64, mlp, numpy_of, table

from keras_distill import (
    CorrelationCongruenceLoss,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    NeuronSelectivityLoss,
    SimilarityPreservingLoss,
)

INPUTS, LABELS = table(16)
WEIGHTS = np.linspace(0.0, 2.0, 16, dtype="float32")


def features(model: keras.Model, layer: str) -> np.ndarray:
    return numpy_of(keras.Model(model.input, model.get_layer(layer).output)(INPUTS))


def evaluated(model: DistillModel, *data: Any, **settings: Any) -> dict[str, float]:
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), jit_compile=False)
    return model.evaluate(*data, batch_size=16, verbose=0, return_dict=True, **settings)


def stepped(model: DistillModel, *data: Any, **settings: Any) -> dict[str, float]:
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), jit_compile=False)
    history = model.fit(*data, batch_size=16, shuffle=False, verbose=0, **settings).history
    return {key: values[0] for key, values in history.items()}


def expected(model: DistillModel, weights: np.ndarray) -> dict[str, float]:
    """Every part of the loss in float64: the mean over the examples of weight times value."""
    student_value, teacher_value = (numpy_of(network(INPUTS)) for network in (model.student, model.teacher))
    hidden = (features(model.student, "hidden") - features(model.teacher, "hidden")) ** 2
    parts = {
        "task_loss": ce64(student_value, LABELS),
        "logits_loss": kl64(student_value, teacher_value),
        "hidden_loss": hidden.mean(-1),
    }
    return {key: float((weights * values).mean()) for key, values in parts.items()}


def distilled(**settings: Any) -> DistillModel:
    terms = [LogitsDistillation(**settings), FeatureDistillation("hidden", "hidden", adapter=None, **settings)]
    return DistillModel(mlp(8), mlp(8, name="teacher"), terms)


@pytest.mark.parametrize("run", [evaluated, stepped])
def test_k11_sample_weights_match_numpy(run: Any) -> None:
    """K11: for the task loss, the divergence and the features, in training and evaluation."""
    model = distilled()
    logs = run(model, INPUTS, LABELS, sample_weight=WEIGHTS)
    for key, value in expected(model, WEIGHTS.astype("float64")).items():
        assert logs[key] == pytest.approx(value, rel=1e-5), key


def test_k11_a_column_of_weights_weighs_as_a_row_does() -> None:
    """K11: shape (N, 1), as a column of a table."""
    model = distilled()
    logs = stepped(model, INPUTS, LABELS, sample_weight=WEIGHTS[:, None])
    for key, value in expected(model, WEIGHTS.astype("float64")).items():
        assert logs[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("shape", [(16, 3), (16, 16), (16, 1, 2)])
def test_k11_weights_that_fit_nothing_raise(shape: tuple[int, ...]) -> None:
    """K11: a weight for each class, or for each pair of examples, is broadcast over nothing."""
    model = distilled()
    model.compile(keras.optimizers.SGD(0.0))
    words = (
        r"^Expected `sample_weight` to have one weight for each example, or for each of the values \(16,\)\. Received"
    )
    with pytest.raises(ValueError, match=words):
        model.train_on_batch(INPUTS, LABELS, sample_weight=np.ones(shape, "float32"))


def test_k11_class_weights_match_numpy() -> None:
    """K11"""
    model, by_class = distilled(), {0: 0.5, 1: 3.0, 2: 0.0}
    logs = stepped(model, INPUTS, LABELS, class_weight=by_class)
    for key, value in expected(model, np.array([by_class[int(label)] for label in LABELS])).items():
        assert logs[key] == pytest.approx(value, rel=1e-5), key


def test_k11_a_term_may_leave_the_weights_to_the_labels() -> None:
    """K11: a weight of 0 then only means that the label is missing."""
    model = distilled(use_sample_weight=False)
    logs = stepped(model, INPUTS, LABELS, sample_weight=WEIGHTS)
    plain, weighted = expected(model, np.ones(16)), expected(model, WEIGHTS.astype("float64"))
    assert logs["task_loss"] == pytest.approx(weighted["task_loss"], rel=1e-5)
    assert logs["logits_loss"] == pytest.approx(plain["logits_loss"], rel=1e-5)
    assert logs["hidden_loss"] == pytest.approx(plain["hidden_loss"], rel=1e-5)


def test_k11_a_weight_for_each_example_weighs_whole_maps() -> None:
    """K11: rank 1 against (B, H, W, C), where B equals W too."""

    def network(name: str) -> keras.Model:
        inputs = keras.Input((4, 4, 1))
        maps = keras.layers.Conv2D(3, 3, padding="same", name="maps")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps)), name=name)

    images = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype("float32")
    weights = np.float32([0.0, 1.0, 2.0, 5.0])
    model = DistillModel(network("student"), network("teacher"), FeatureDistillation("maps", "maps", adapter=None))
    logs = stepped(model, images, np.zeros(4, "int32"), sample_weight=weights)
    student_value, teacher_value = (
        numpy_of(keras.Model(network.input, network.get_layer("maps").output)(images))
        for network in (model.student, model.teacher)
    )
    value = float((weights * ((student_value - teacher_value) ** 2).mean((1, 2, 3))).mean())
    assert logs["maps_loss"] == pytest.approx(value, rel=1e-5)


def tagger(name: str, width: int = 6, masked: bool = True) -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(9, width, "glorot_normal", mask_zero=masked, name="words")(inputs)
    hidden = keras.layers.Dense(width, activation="tanh", name="hidden")(hidden)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name=name)


TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 1, 2], [3, 0, 0, 0, 0]], "int32")


def tagged(*, weights: Any = None, tokens: np.ndarray = TOKENS) -> tuple[DistillModel, dict[str, float]]:
    terms = [LogitsDistillation(), FeatureDistillation("hidden", "hidden", adapter=None)]
    model = DistillModel(tagger("student"), tagger("teacher"), terms)
    return model, stepped(model, tokens, np.zeros(tokens.shape, "int32"), sample_weight=weights)


def per_token(model: DistillModel) -> tuple[np.ndarray, np.ndarray]:
    student_value, teacher_value = (numpy_of(network(TOKENS)) for network in (model.student, model.teacher))
    hidden = [
        numpy_of(keras.Model(network.input, network.get_layer("hidden").output)(TOKENS))
        for network in (model.student, model.teacher)
    ]
    return kl64(student_value, teacher_value), ((hidden[0] - hidden[1]) ** 2).mean(-1)


def test_k12_the_mean_is_over_the_unmasked_tokens() -> None:
    """K12: of KD and of features."""
    model, logs = tagged()
    divergence, distance = per_token(model)
    assert logs["logits_loss"] == pytest.approx(divergence[TOKENS > 0].mean(), rel=1e-5)
    assert logs["hidden_loss"] == pytest.approx(distance[TOKENS > 0].mean(), rel=1e-5)


def test_k11_weights_of_tokens_count_within_the_mask() -> None:
    """K11 and K12 together: a weight for each token, the mean over the tokens that are there."""
    weights = np.linspace(0.5, 3.0, TOKENS.size, dtype="float32").reshape(TOKENS.shape)
    model, logs = tagged(weights=weights)
    divergence, distance = per_token(model)
    tokens = TOKENS > 0
    assert logs["logits_loss"] == pytest.approx((weights * divergence)[tokens].mean(), rel=1e-5)
    assert logs["hidden_loss"] == pytest.approx((weights * distance)[tokens].mean(), rel=1e-5)


def test_k12_the_agreement_is_over_the_unmasked_tokens() -> None:
    """K12: rows without a token are not counted."""
    model = DistillModel(tagger("student"), tagger("teacher"))
    words, *rest = model.student.get_weights()
    words[:2] *= -1  # of the token that is not there, and of the first one that is
    model.teacher.set_weights([words, *rest])
    student_value, teacher_value = (numpy_of(network(TOKENS)).argmax(-1) for network in (model.student, model.teacher))
    assert 0 < (student_value == teacher_value)[TOKENS > 0].mean() < 1
    assert not (student_value == teacher_value)[TOKENS == 0].any()
    share = (student_value == teacher_value)[TOKENS > 0].mean()
    assert evaluated(model, TOKENS)["teacher_agreement"] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("loss", [SimilarityPreservingLoss(), CorrelationCongruenceLoss(), NeuronSelectivityLoss()])
def test_k12_losses_on_whole_examples_ignore_masked_tokens(loss: Any) -> None:
    """K12: other numbers at the masked tokens, in both models, change nothing."""
    model = DistillModel(tagger("student"), tagger("teacher"), FeatureDistillation("words", "words", loss))
    before = evaluated(model, TOKENS)["words_loss"]
    for network, number in ((model.student, 3.0), (model.teacher, -5.0)):
        words = network.get_layer("words")
        table = words.get_weights()[0]
        table[0] = number
        words.set_weights([table])
    assert before > 0
    assert evaluated(model, TOKENS)["words_loss"] == pytest.approx(before, rel=1e-6)


def test_k12_a_batch_without_any_token_is_finite() -> None:
    """K12"""
    _, logs = tagged(tokens=np.zeros((4, 5), "int32"))
    assert all(np.isfinite(value) for value in logs.values())
    assert logs["logits_loss"] == logs["hidden_loss"] == 0.0


def test_k12_a_masking_layer_masks_too() -> None:
    """K12: masks that come with the data's own zeros."""

    def network(name: str) -> keras.Model:
        inputs = keras.Input((5, 2))
        hidden = keras.layers.Masking()(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(hidden), name=name)

    data = np.random.default_rng(0).normal(size=(4, 5, 2)).astype("float32")
    data[TOKENS == 0] = 0.0
    model = DistillModel(network("student"), network("teacher"))
    logs = stepped(model, data, np.zeros((4, 5), "int32"))
    divergence = kl64(*(numpy_of(network(data)) for network in (model.student, model.teacher)))
    assert logs["logits_loss"] == pytest.approx(divergence[TOKENS > 0].mean(), rel=1e-5)


# Several outputs ------------------------------------------------------------------------------------------------------


def several(form: str, name: str, width: int = 8) -> keras.Model:
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(width, name="hidden")(inputs)
    first, second = keras.layers.Dense(3, name="first")(hidden), keras.layers.Dense(4, name="second")(hidden)
    outputs = {"list": [first, second], "dict": {"first": first, "second": second}}[form]
    return keras.Model(inputs, outputs, name=name)


@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("output", [None, "second"])
def test_k13_several_outputs_with_loss_weights_and_metrics(form: str, output: str | None) -> None:
    """K13: each output's task loss at its weight, its own metric, and KD on all of them or on one."""
    labels = {"first": LABELS, "second": (LABELS + 1).astype("int32")}
    y = labels if form == "dict" else [labels["first"], labels["second"]]
    loss = {name: cross_entropy() for name in labels}
    metrics = {name: ["sparse_categorical_accuracy"] for name in labels}
    weights = {"first": 0.25, "second": 2.0}
    if form == "list":
        loss, metrics, weights = (
            [setting[name] for name in ("first", "second")] for setting in (loss, metrics, weights)
        )  # type: ignore[assignment]
    key = {None: None, "second": "second" if form == "dict" else 1}[output]
    model = DistillModel(several(form, "student"), several(form, "teacher", 12), LogitsDistillation(output=key))
    model.compile(keras.optimizers.SGD(0.0), loss, loss_weights=weights, metrics=metrics, jit_compile=False)
    logs = model.fit(INPUTS, y, batch_size=16, verbose=0).history
    student_value, teacher_value = model.student(INPUTS), model.teacher(INPUTS)
    pairs = [(student_value[k], teacher_value[k]) for k in (("first", "second") if form == "dict" else (0, 1))]
    divergences = [float(kl64(numpy_of(a), numpy_of(b)).mean()) for a, b in pairs]
    divergence = divergences[1] if output else sum(divergences)
    task = 0.25 * ce64(numpy_of(pairs[0][0]), LABELS).mean() + 2.0 * ce64(numpy_of(pairs[1][0]), LABELS + 1).mean()
    assert logs["logits_loss"][0] == pytest.approx(divergence, rel=1e-5)
    assert logs["task_loss"][0] == pytest.approx(task, rel=1e-5)
    assert logs["loss"][0] == pytest.approx(task + divergence, rel=1e-5)
    right = (numpy_of(pairs[1][0]).argmax(-1) == LABELS + 1).mean()
    assert logs["second_sparse_categorical_accuracy"][0] == pytest.approx(right)
    assert all(bool(ops.all(ops.isfinite(weight))) for weight in model.weights)


@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("output", [None, "second"])
def test_k13_each_output_has_the_weights_that_are_given_for_it(form: str, output: str | None) -> None:
    """K13 and K11: in the structure of the outputs; a feature that all of them share has none."""
    parts = {"first": WEIGHTS, "second": WEIGHTS[::-1].copy()}
    key = {None: None, "second": "second" if form == "dict" else 1}[output]
    terms = [LogitsDistillation(output=key), FeatureDistillation("hidden", "hidden")]
    model = DistillModel(several(form, "student"), several(form, "teacher"), terms)
    model.compile(
        keras.optimizers.SGD(0.0), {"list": [cross_entropy()] * 2, "dict": dict.fromkeys(parts, cross_entropy())}[form]
    )
    y, weights = (dict.fromkeys(parts, LABELS), parts) if form == "dict" else ([LABELS] * 2, [*parts.values()])
    logs = model.train_on_batch(INPUTS, y, sample_weight=weights, return_dict=True)
    student_value, teacher_value = (
        dict(zip(parts, map(numpy_of, keras.tree.flatten(network(INPUTS))), strict=True))
        for network in (model.student, model.teacher)
    )
    divergences = {name: (parts[name] * kl64(student_value[name], teacher_value[name])).mean() for name in parts}
    assert logs["logits_loss"] == pytest.approx(
        divergences["second"] if output else sum(divergences.values()), rel=1e-5
    )
    distance = (features(model.student, "hidden") - features(model.teacher, "hidden")) ** 2
    assert logs["hidden_loss"] == pytest.approx(distance.mean(), rel=1e-5)


@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("source", ["arrays", "stored", "batch"])
def test_k13_weights_of_the_examples_weigh_the_features_of_all_outputs(form: str, teachers: int, source: str) -> None:
    """K13 and K11: for arrays Keras repeats the weights for every output."""
    held = [several(form, f"teacher{number}") for number in range(teachers)]
    settings = {"route": lambda x: ops.cast(x[:, 0] > 0, "int32")} if teachers == 2 else {}
    terms = [FeatureDistillation("hidden", "hidden", adapter="linear" if teachers == 2 else None)]
    model = DistillModel(several(form, "student"), held if teachers == 2 else held[0], terms, **settings)
    losses = {"list": [cross_entropy()] * 2, "dict": {"first": cross_entropy(), "second": cross_entropy()}}[form]
    model.compile(keras.optimizers.SGD(0.0), losses, jit_compile=False)
    y: Any = {"first": LABELS, "second": LABELS} if form == "dict" else [LABELS] * 2
    if source == "stored" and teachers == 1:
        y = model.teacher_targets(INPUTS, y)
    if source == "batch":
        logs = model.train_on_batch(INPUTS, y, sample_weight=WEIGHTS, return_dict=True)
    else:
        logs = model.evaluate(INPUTS, y, sample_weight=WEIGHTS, batch_size=16, verbose=0, return_dict=True)
    own, values = features(model.student, "hidden"), np.zeros(16)
    for number, network in enumerate(held):
        adapter = model.terms[0].for_teacher(number).adapters[0]
        mapped = own if adapter is None else numpy_of(adapter(own))
        chosen = (INPUTS[:, 0] > 0) == number if teachers == 2 else np.ones(16, bool)
        values += chosen * ((mapped - features(network, "hidden")) ** 2).mean(-1)
    assert logs["hidden_loss"] == pytest.approx((WEIGHTS * values).mean(), rel=1e-5)


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "kernel"),
    [((6,), "Dense", (8, 12)), ((4, 6), "Dense", (8, 12)), ((4, 4, 6), "Conv2D", (1, 1, 8, 12))],
)
def test_k14_auto_makes_the_adapter_that_fits_the_shapes_and_trains_it(shape: Any, kind: str, kernel: Any) -> None:
    """K14: a dense layer for vectors and tokens, a 1x1 convolution for maps."""

    def network(width: int, name: str) -> keras.Model:
        inputs = keras.Input(shape)
        hidden = keras.layers.Dense(width, name="hidden")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(hidden)), name=name)

    model = DistillModel(network(8, "student"), network(12, "teacher"), FeatureDistillation("hidden", "hidden"))
    (adapter,) = model.terms[0].adapters
    assert type(adapter).__name__ == kind
    assert tuple(adapter.kernel.shape) == kernel
    before = numpy_of(adapter.kernel)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    model.fit(np.ones((8, *shape), "float32"), np.zeros(8, "int32"), batch_size=8, verbose=0)
    assert not np.array_equal(before, numpy_of(adapter.kernel))
