"""Metrics of the teacher in `fit` and `evaluate`: each equals float64 over uneven batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, kl64, log_softmax64, mlp, numpy_of, table

from keras_distill import (
    BinarySoftTargetLoss,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    StudentCheckpoint,
    TeacherAgreement,
    TeacherCache,
    TeacherDivergence,
)
from keras_distill.metrics import TeacherMetric

X, Y = table(19)
WEIGHTS = np.linspace(0.0, 3.0, 19).astype("float32")
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}
KEYS = ("teacher_agreement", "teacher_divergence")


def both(temperature: float = 2.0) -> list[TeacherMetric]:
    return [TeacherAgreement(), TeacherDivergence(temperature)]


def distilled(
    student: Any = None, teacher: Any = None, terms: Any = None, *, run_eagerly: bool = True, **settings: Any
) -> DistillModel:
    """A model that does not change while it trains, so that every batch is measured with the same weights."""
    settings.setdefault("teacher_metrics", both())
    model = DistillModel(student or mlp(), teacher or mlp(6, name="teacher"), terms, **settings)
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=run_eagerly)
    return model


def expected(student: Any, teacher: Any, weights: Any = None, temperature: float = 2.0) -> dict[str, float]:
    """Both metrics in float64."""
    student, teacher = numpy_of(student), numpy_of(teacher)
    agrees = student.argmax(-1) == teacher.argmax(-1)
    return {
        "teacher_agreement": float(np.average(agrees, weights=weights)),
        "teacher_divergence": float(np.average(kl64(student, teacher, temperature) / temperature**2, weights=weights)),
    }


def assert_logged(logs: dict[str, Any], values: dict[str, float], prefix: str = "") -> None:
    for key, value in values.items():
        logged = np.asarray(logs[prefix + key])
        np.testing.assert_allclose(logged, np.full(logged.shape, value), rtol=1e-4, atol=1e-6, err_msg=prefix + key)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_metrics_equal_float64_over_uneven_batches_in_each_epoch(run_eagerly: bool, weighted: bool) -> None:
    student, teacher = mlp(), mlp(6, name="teacher")
    model = distilled(student, teacher, run_eagerly=run_eagerly)
    weights = WEIGHTS if weighted else None
    validation = (X[:11], Y[:11], WEIGHTS[:11]) if weighted else (X[:11], Y[:11])
    logs = model.fit(X, Y, sample_weight=weights, validation_data=validation, epochs=2, **FIT).history
    z, t = student(X), teacher(X)
    assert_logged(logs, expected(z, t, weights))
    assert_logged(logs, expected(z[:11], t[:11], None if weights is None else weights[:11]), "val_")
    assert_logged(model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True), expected(z, t))


def test_metrics_follow_the_student_while_it_trains() -> None:
    model = distilled()
    model.optimizer.learning_rate = 0.5
    model.fit(X, Y, epochs=3, **FIT)
    logs = model.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True)
    assert_logged(logs, expected(model.student(X), model.teacher(X)))


def test_metrics_are_measured_without_labels_and_on_single_batches() -> None:
    model = DistillModel(mlp(), mlp(6, name="teacher"), teacher_metrics=TeacherDivergence(2.0))
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    values = expected(model.student(X), model.teacher(X))["teacher_divergence"]
    logs = model.train_on_batch(X, return_dict=True)
    assert logs["teacher_divergence"] == pytest.approx(values, rel=1e-4)
    assert "teacher_agreement" not in logs


def test_a_resting_term_says_which_outputs_are_compared() -> None:
    """The features train the student, and a term of weight 0 only measures."""
    terms = [FeatureDistillation("hidden", "hidden"), LogitsDistillation(weight=0.0)]
    model = distilled(terms=terms)
    logs = model.fit(X, Y, **FIT).history
    assert "logits_loss" not in logs
    assert_logged(logs, expected(model.student(X), model.teacher(X)))


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_tokens_do_not_count(weighted: bool) -> None:
    ids = np.array([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]], "int32")

    def tagger(width: int) -> keras.Model:
        inputs = keras.Input((4,), dtype="int32")
        hidden = keras.layers.Embedding(9, width, mask_zero=True)(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden))

    student, teacher = tagger(3), tagger(5)
    model = DistillModel(student, teacher, teacher_metrics=both())
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    weights = np.array([0.5, 2.0, 3.0], "float32") if weighted else None
    labels = np.zeros((3, 4), "int32")
    logs = model.fit(ids, labels, sample_weight=weights, batch_size=2, shuffle=False, verbose=0).history
    rows = (ids > 0) * (1.0 if weights is None else weights[:, None])
    assert_logged(logs, expected(student(ids), teacher(ids), rows))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("output", [None, "b"])
def test_outputs_are_those_of_the_term(output: str | None) -> None:
    def heads(width: int) -> keras.Model:
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(width, "tanh")(inputs)
        return keras.Model(inputs, {name: keras.layers.Dense(size)(hidden) for name, size in (("a", 3), ("b", 4))})

    student, teacher = heads(5), heads(7)
    model = DistillModel(student, teacher, LogitsDistillation(output=output), teacher_metrics=both())
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    z, t = student(X), teacher(X)
    values = [expected(z[name], t[name]) for name in ("a", "b") if output in (None, name)]
    logs = model.fit(X, **FIT).history
    assert_logged(logs, {key: np.mean([value[key] for value in values]) for key in KEYS})


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_a_single_score_is_the_logit_of_two_classes(activation: str | None) -> None:
    student, teacher = (keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, activation)]) for _ in range(2))
    term = LogitsDistillation(BinarySoftTargetLoss(from_logits=activation is None))
    model = DistillModel(student, teacher, term, teacher_metrics=both(1.0))
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    scores = [numpy_of(network(X))[:, 0] for network in (student, teacher)]
    if activation:
        scores = [np.log(p) - np.log1p(-p) for p in scores]
    z, t = (np.stack([np.zeros_like(score), score], axis=-1) for score in scores)
    assert_logged(model.fit(X, **FIT).history, expected(z, t, temperature=1.0))


def test_probabilities_are_compared_as_what_they_are() -> None:
    def classifier(width: int) -> keras.Model:
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(width, "tanh")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, "softmax")(hidden))

    student, teacher = classifier(4), classifier(8)
    model = DistillModel(
        student, teacher, LogitsDistillation(SoftTargetLoss(from_logits=False)), teacher_metrics=both(2.0)
    )
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    z, t = (np.log(numpy_of(network(X))) for network in (student, teacher))
    assert_logged(model.fit(X, **FIT).history, expected(z, t))


def test_several_teachers_answer_by_their_mean_probabilities() -> None:
    teachers = [mlp(6, name="first"), mlp(4, name="second"), mlp(3, name="third")]
    model = distilled(teacher=teachers)
    mean = np.log(np.mean([np.exp(log_softmax64(numpy_of(teacher(X)))) for teacher in teachers], axis=0))
    assert_logged(model.fit(X, Y, **FIT).history, expected(model.student(X), mean))


class Gap(TeacherMetric):
    """The largest difference of two logits."""

    def values(self, student_logits: Any, teacher_logits: Any) -> Any:
        return ops.max(ops.abs(student_logits - teacher_logits), axis=-1)


def test_a_metric_of_the_users_own_is_measured() -> None:
    model = distilled(teacher_metrics=[Gap("gap"), TeacherDivergence(1.0), TeacherDivergence(4.0, name="softer")])
    z, t = numpy_of(model.student(X)), numpy_of(model.teacher(X))
    logs = model.fit(X, Y, **FIT).history
    assert logs["gap"] == pytest.approx([np.abs(z - t).max(-1).mean()], rel=1e-5)
    assert logs["teacher_divergence"] == pytest.approx([kl64(z, t, 1.0).mean()], rel=1e-4)
    assert logs["softer"] == pytest.approx([kl64(z, t, 4.0).mean() / 16], rel=1e-4)


# Caches and evaluation without a teacher -----------------------------------------------------------------------------


def test_a_cache_takes_the_teachers_place(tmp_path: Path) -> None:
    student, teacher = mlp(), mlp(6, name="teacher")
    cache = TeacherCache.build(teacher, X, tmp_path, dtype="float32")
    model = DistillModel(student, teacher_metrics=both())
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=True)
    data = cache.attach((X, Y), batch_size=8)
    logs = model.fit(data, validation_data=(X, Y), verbose=0).history
    assert_logged(logs, expected(student(X), teacher(X)))
    assert not {f"val_{key}" for key in KEYS} & logs.keys()  # the labels alone say nothing about the teacher


def test_a_cache_of_the_likeliest_classes_has_an_agreement_and_no_divergence(tmp_path: Path) -> None:
    student, teacher = mlp(), mlp(16, name="teacher")  # wide enough that no row of logits is all zeros, and tied
    cache = TeacherCache.build(teacher, X, tmp_path, top_k=2)
    data = cache.attach((X, Y), batch_size=8)
    model = DistillModel(student, teacher_metrics=TeacherAgreement())
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=True)
    agreement = expected(student(X), teacher(X))["teacher_agreement"]
    assert model.fit(data, verbose=0).history["teacher_agreement"] == pytest.approx([agreement])
    model = DistillModel(student, teacher_metrics=both())
    model.compile(keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=True)
    words = (
        r"Expected a cache of full outputs for TeacherDivergence\. Build it without top_k\. Received: the likeliest 2"
    )
    with pytest.raises(ValueError, match=words):
        model.fit(data, verbose=0)


def test_evaluation_without_distillation_measures_nothing() -> None:
    model = distilled(evaluate_distillation=False)
    logs = model.fit(X, Y, validation_data=(X, Y), **FIT).history
    assert set(KEYS) <= logs.keys()
    assert not {f"val_{key}" for key in KEYS} & logs.keys()


# Files and callbacks -------------------------------------------------------------------------------------------------


def test_a_saved_model_measures_the_same(tmp_path: Path) -> None:
    model = distilled(teacher_metrics=[TeacherDivergence(3.0, name="soft_gap")])
    model.fit(X, Y, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = model.teacher
    logs, again = (own.evaluate(X, Y, batch_size=8, verbose=0, return_dict=True) for own in (model, loaded))
    assert again["soft_gap"] == pytest.approx(logs["soft_gap"], rel=1e-6)
    assert "teacher_agreement" not in again


@pytest.mark.parametrize("metrics", [None, [], [TeacherDivergence(0.7, name="gap")]])
def test_metrics_come_back_from_json(metrics: Any) -> None:
    model = DistillModel(mlp(), mlp(6, name="teacher"), teacher_metrics=metrics)
    config = json.loads(json.dumps(model.get_config()))
    back = DistillModel.from_config(config)
    configs = [[metric.get_config() for metric in own.loss_parts.teacher_metrics] for own in (model, back)]
    assert configs[0] == configs[1]
    assert back.get_config()["teacher_metrics"] == config["teacher_metrics"]


def test_callbacks_know_that_a_lower_divergence_is_better(tmp_path: Path) -> None:
    model = distilled()
    model.optimizer.learning_rate = 0.1
    stopping = keras.callbacks.EarlyStopping("val_teacher_divergence")
    keep = StudentCheckpoint(str(tmp_path / "best.keras"), monitor="val_teacher_divergence", save_best_only=True)
    logs = model.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[stopping, keep], **FIT).history
    assert logs["val_teacher_divergence"][2] < logs["val_teacher_divergence"][0]
    best = keras.models.load_model(tmp_path / "best.keras")
    divergence = expected(best(X), model.teacher(X))["teacher_divergence"]
    assert min(logs["val_teacher_divergence"]) == pytest.approx(divergence, rel=1e-4)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["metrics", "weighted_metrics"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_compile_refuses_them_and_says_where_they_belong(kind: str, one_hot: bool) -> None:
    """With one-hot labels Keras would log the divergence from the labels without an error."""
    loss = keras.losses.CategoricalCrossentropy(from_logits=True) if one_hot else cross_entropy()
    model = DistillModel(mlp(), mlp(6, name="teacher"))
    model.compile("sgd", loss, run_eagerly=True, **{kind: ["accuracy", TeacherDivergence()]})
    words = (
        r"^Expected `metrics` of `compile` to compare the student with the labels\. Pass it to the model:"
        r" DistillModel\(\.\.\., teacher_metrics=\[TeacherDivergence\(\.\.\.\)\]\)\."
    )
    labels = np.eye(3, dtype="float32")[Y] if one_hot else Y
    for act in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=words):
            act(X, labels, verbose=0)


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ([keras.metrics.KLDivergence()], TypeError, r"`teacher_metrics\[0\]` to be a TeacherMetric, such as Teacher"),
        ("accuracy", TypeError, r"Pass metrics of the labels to `compile`\. Received: 'accuracy'"),
        ([TeacherDivergence()] * 2, ValueError, r"`teacher_metrics\[1\]` to have a name .*'teacher_divergence'"),
        (TeacherDivergence(name="logits_loss"), ValueError, r"a name that the logs do not hold yet"),
    ],
    ids=["metric of Keras", "name", "twice", "name of a loss"],
)
def test_wrong_metrics_are_refused_by_the_constructor(metrics: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        DistillModel(mlp(), mlp(6, name="teacher"), teacher_metrics=metrics)


def test_metrics_need_class_scores() -> None:
    words = r"Expected a term that compares class scores, for `teacher_metrics`\. Add LogitsDistillation\(weight=0\.0\)"
    with pytest.raises(ValueError, match=words):
        DistillModel(mlp(), mlp(6, name="teacher"), FeatureDistillation("hidden", "hidden"), teacher_metrics=both())
    model = DistillModel(
        mlp(), mlp(6, name="teacher"), LogitsDistillation(BinarySoftTargetLoss()), teacher_metrics=both()
    )
    model.compile("sgd", run_eagerly=True)
    with pytest.raises(ValueError, match="Expected outputs that choose one class for `teacher_metrics`"):
        model.fit(X, verbose=0)
