"""`compare` on Keras models: pairing, equal compute, metrics, files, refusals."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml
from compared_keras import COMPILE, FIT, arrays, make_student, make_teacher
from keras_nets import numpy_of

import distill_core.cli.keras
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from keras_distill import (
    DistillModel,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    TeacherCache,
    compare,
)
from keras_distill.backends import values_of
from keras_distill.cache.data import order_of
from keras_distill.guidance import run_once
from keras_distill.guidance.data import ShuffledArrays
from keras_distill.guidance.evaluation import predictions_of
from keras_distill.guidance.observer import RunObserver

SOFT = {"soft targets": [LogitsDistillation()]}


def compared(folder: Path, **changed: Any) -> Comparison:
    settings: dict[str, Any] = {"student": make_student, "data": arrays(), "teacher": make_teacher(), "methods": SOFT}
    settings |= {"metric": "val_accuracy", "seeds": 1, "compile": COMPILE, "fit": FIT, "folder": folder}
    return compare(**{**settings, "progress": False, **changed})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("whole")
    (images, _), _ = arrays()
    cache = TeacherCache.build(make_teacher(), images, folder / "cache")
    features = FeatureDistillation("hidden", "hidden", "mse", adapter=keras.layers.Dense(8))
    methods = {
        **SOFT,
        "cached": {"teacher": cache, "terms": [LogitsDistillation()]},
        "with features": {"terms": [LogitsDistillation(DISTLoss()), features], "task_weight": 0.5},
    }
    return compared(folder / "results", methods=methods, seeds=2, classes=list("abc"), save_weights=True)


def records(comparison: Comparison, method: str) -> list[Any]:
    return [run for run in comparison.runs if run.method == method]


def test_every_method_and_the_student_alone_twice_run_with_every_seed(whole: Comparison) -> None:
    methods = (ALONE, EQUAL_COMPUTE, "soft targets", "cached", "with features")
    assert {(run.method, run.seed) for run in whole.runs} == {(method, seed) for method in methods for seed in (0, 1)}
    assert all(run.error is None for run in whole.runs)
    assert "Not paired" not in whole.verdict
    assert "random" not in whole.verdict


def test_runs_of_a_seed_are_paired_and_those_of_another_seed_differ(whole: Comparison) -> None:
    alone = records(whole, ALONE)
    for method in ("soft targets", "with features", "cached", EQUAL_COMPUTE):
        for run, base in zip(records(whole, method), alone, strict=True):
            assert run.student == base.student
            assert run.batches[: len(base.batches)] == base.batches
    assert alone[0].student != alone[1].student
    assert alone[0].batches != alone[1].batches
    assert len(set(alone[0].batches)) == FIT["epochs"]


def test_a_cached_teacher_trains_exactly_like_the_live_one(whole: Comparison) -> None:
    for live, cached in zip(records(whole, "soft targets"), records(whole, "cached"), strict=True):
        assert cached.metrics["val_accuracy"] == live.metrics["val_accuracy"]
        for point, other in zip(cached.curve, live.curve, strict=True):
            assert point["logits_loss"] == pytest.approx(other["logits_loss"], rel=1e-4)


def test_the_student_alone_at_equal_compute_has_exactly_the_steps_that_were_measured(whole: Comparison) -> None:
    equal = whole.equal_compute
    assert equal is not None
    assert {run.steps for run in records(whole, EQUAL_COMPUTE)} == {equal.steps}
    assert {run.steps for run in records(whole, ALONE)} == {FIT["epochs"] * 4}
    assert equal.steps == round(FIT["epochs"] * 4 * equal.ratio)


def test_the_folder_describes_the_costs_and_the_teacher_and_holds_the_predictions(whole: Comparison) -> None:
    content = json.loads((whole.folder / "comparison.json").read_text(encoding="utf-8"))
    assert (content["kind"], content["classes"]) == ("keras", list("abc"))
    student, teacher = content["student"]["cost"], content["teacher"]
    assert student["parameters"] == make_student().count_params()
    assert student["bytes"] == 4 * student["parameters"]
    assert student["latency_seconds"] > 0
    assert teacher["metrics"]["val_accuracy"] == 1.0  # the labels are its own answers
    (_, _), (images, labels) = arrays()
    with np.load(whole.folder / teacher["predictions"]) as file:
        np.testing.assert_allclose(file["logits"], numpy_of(make_teacher()(images)), rtol=1e-4, atol=1e-5)
        assert file["labels"].tolist() == labels.tolist()
    run = records(whole, "with features")[1]
    student = make_student()
    student.load_weights(whole.folder / run.weights)
    with np.load(whole.folder / run.predictions) as file:
        np.testing.assert_allclose(file["logits"], numpy_of(student(images, training=False)), rtol=1e-4, atol=1e-5)
        accuracy = (file["logits"].argmax(1) == file["labels"]).mean()
    assert accuracy == pytest.approx(run.metrics["val_accuracy"])


def test_an_adapter_layer_and_an_optimizer_are_not_carried_from_run_to_run(whole: Comparison) -> None:
    optimizer = COMPILE["optimizer"]
    assert int(optimizer.iterations) == 0
    assert not optimizer.variables[2:]


def test_the_same_call_again_makes_no_run_and_other_settings_are_refused(tmp_path: Path) -> None:
    compared(tmp_path)
    before = (tmp_path / "runs.jsonl").read_bytes()
    compared(tmp_path)
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    for changed in (
        {"fit": {**FIT, "batch_size": 8}},
        {"data": tuple((x, 2 - y) for x, y in arrays())},
        {"compile": {**COMPILE, "optimizer": keras.optimizers.SGD(0.5)}},
        {"methods": {"soft targets": [LogitsDistillation(weight=2.0)]}},
    ):
        with pytest.raises(ValueError, match="to hold runs of the same settings"):
            compared(tmp_path, **changed)


def test_a_metric_that_is_not_there_is_an_error_at_the_first_run_that_lists_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of 'accuracy', 'loss', 'val_accuracy', 'val_loss', but got"):
        compared(tmp_path, metric="val_acc")
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_loss_of_a_method_is_that_of_the_student_alone_and_not_of_the_distillation(tmp_path: Path) -> None:
    methods = {"soft targets": {"terms": [LogitsDistillation()], "task_weight": 3.0}}
    comparison = compared(tmp_path, methods=methods, metric="val_loss", mode="min", save_weights=True)
    run = records(comparison, "soft targets")[0]
    student = make_student()
    student.load_weights(tmp_path / run.weights)
    (_, _), (images, labels) = arrays()
    expected = numpy_of(COMPILE["loss"](labels, student(images, training=False)))
    assert run.metrics["val_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_test_set_gives_a_metric_too_and_data_sets_and_a_function_of_the_steps_work(tmp_path: Path) -> None:
    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            x, y = arrays()[0]
            return x[16 * index :][:16], y[16 * index :][:16]

    seen = []

    def compiled(steps: int) -> dict[str, Any]:
        seen.append(steps)
        return {**COMPILE, "optimizer": keras.optimizers.SGD(0.1)}

    def data(seed: int) -> Any:
        return Batches(), Batches(), arrays()[1]

    comparison = compared(tmp_path, data=data, compile=compiled, metric="test_accuracy")
    assert comparison.equal_compute is not None
    assert {3 * FIT["epochs"], comparison.equal_compute.steps} <= set(seen)
    assert {"val_accuracy", "test_accuracy"} <= comparison.runs[0].metrics.keys()


def test_a_schedule_by_epochs_stretches_with_the_steps(tmp_path: Path) -> None:
    trained = []

    class Epochs(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            trained.append(self.params["epochs"])

    equal = compared(tmp_path, fit={**FIT, "callbacks": [Epochs()]}).equal_compute
    assert equal is not None
    assert trained == [2, 2, math.ceil(2 * equal.ratio)]


def test_a_run_that_breaks_in_the_middle_is_named(tmp_path: Path) -> None:
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if isinstance(self.model, DistillModel):
                raise RuntimeError("the cable is out")

    class After(Breaks):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            super().on_train_batch_end(0)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    verdict = compared(tmp_path, fit={**FIT, "callbacks": [After()]}).verdict
    assert "soft targets failed with seed 0 (RuntimeError: the cable is out)" in verdict


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no epochs": ({"fit": {}}, ValueError, "Expected `fit` to hold epochs, 1 or more"),
    "a number": ({"fit": 3}, TypeError, "Expected `fit` to be a dict of the arguments of fit"),
    "validation data": (
        {"fit": {**FIT, "validation_split": 0.1}},
        ValueError,
        "Expected `fit` without validation_",
    ),
    "an unknown argument": ({"fit": {**FIT, "epoch": 1}}, ValueError, "Closest: 'epochs'"),
    "a method's argument": ({"methods": {"a": {"wieght": 1}}}, ValueError, "'wieght'"),
    "a method's layer": (
        {"methods": {"a": [FeatureDistillation("hiden", "hidden", "mse")]}},
        ValueError,
        r"methods\['a'\]: Expected",
    ),
    "a layer": ({"student": lambda: keras.layers.Dense(3)}, TypeError, "Expected `student` to make a Keras model"),
    "a network of all runs": (
        {"student": functools.cache(make_student)},
        ValueError,
        "Expected `student` to make new weights for each run",
    ),
    "no input": (
        {"student": lambda: keras.Sequential([keras.layers.Dense(3)])},
        ValueError,
        "Expected `student` to make a model that is built",
    ),
    "one data set": ({"data": np.zeros(3)}, TypeError, r"Expected `data` to be \(train, val\)"),
    "inputs alone": ({"data": ([1], [2])}, TypeError, "Expected `train` of the data to be"),
    "a lambda in processes": (
        {"student": lambda: make_student(), "workers": 2},
        ValueError,
        "`student` to be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_words(tmp_path: Path, case: str) -> None:
    changed, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        compared(tmp_path, **changed)


def test_one_run_alone_is_that_of_the_comparison(whole: Comparison) -> None:
    record = run_once(
        student=make_student, data=arrays(), teacher=make_teacher(), method=[LogitsDistillation()],
        metric="val_accuracy", seed=1, compile=COMPILE, fit=FIT,
    )  # fmt: skip
    assert record.metrics["val_accuracy"] == records(whole, "soft targets")[1].metrics["val_accuracy"]
    assert record.batches == records(whole, "soft targets")[1].batches


class CountingStudent(keras.Model):
    """A linear student that counts the calls of ``train_step``, of which a compiled step has one for each trace."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.scores = keras.layers.Dense(3)
        self.build((None, 4))

    def build(self, input_shape: Any) -> None:
        self.scores.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return self.scores(inputs)

    def train_step(self, *args: Any) -> Any:
        CountingStudent.calls += 1
        return super().train_step(*args)


def test_one_run_does_not_train_the_weights_of_another_run() -> None:
    settings = {"compile": COMPILE, "fit": {"epochs": 1, "batch_size": 64}}
    with pytest.raises(ValueError, match="Expected `student` to make new weights for each run"):
        run_once(student=functools.cache(make_student), data=arrays(), metric="val_accuracy", **settings)


def test_the_step_of_the_student_alone_is_traced_once() -> None:
    CountingStudent.calls = 0
    settings = {"compile": COMPILE, "fit": {"epochs": 1, "batch_size": 64}}
    run_once(student=CountingStudent, data=arrays(), metric="val_accuracy", **settings)
    assert CountingStudent.calls == 1


def test_arrays_have_an_order_of_the_seed_and_the_epoch_that_contains_each_row_once() -> None:
    data = ShuffledArrays((np.arange(10), np.arange(10)), 4, seed=3)
    epochs = []
    for _ in range(2):
        epochs.append(np.concatenate([data[index][0] for index in range(len(data))]).tolist())
        data.on_epoch_end()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert data.first_batch(1)[0].tolist() == epochs[1][:4]


@pytest.mark.parametrize("method", [None, [LogitsDistillation()]])
@pytest.mark.parametrize("fit", [{}, {"shuffle": False}, {"steps_per_epoch": 2}])
def test_each_run_reads_the_arrays_in_the_order_of_its_seed(method: Any, fit: dict[str, Any]) -> None:
    """The student alone too; with fewer steps in an epoch a pass over the data takes several."""
    (x, _), (val, _) = arrays()
    read: list[int] = []

    def loss(rows: Any, output: Any) -> Any:
        if (known := values_of(rows)) is not None and known.min() >= 0:
            read.extend(known.astype(int).ravel().tolist())
        return keras.ops.mean(output**2, axis=-1)

    data = (x, np.arange(64)), (val, np.full(32, -1))
    settings = {"optimizer": "sgd", "loss": loss, "run_eagerly": True}
    fit = {"epochs": 2, "batch_size": 16, **fit}
    parts = {"student": make_student, "teacher": make_teacher(), "data": data, "metric": "val_loss"}
    run_once(**parts, method=method, compile=settings, fit=fit, seed=3)
    seed, passes = (None if fit.get("shuffle") is False else 3), (1 if "steps_per_epoch" in fit else 2)
    assert read == [row for number in range(passes) for row in order_of(64, seed, number)]


def test_predictions_are_logits_also_of_probabilities_and_one_hot_labels() -> None:
    (x, y), _ = arrays()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(3)(inputs)))
    logits, labels = predictions_of(model, (x, np.eye(3)[y]), 7)  # type: ignore[misc]
    np.testing.assert_allclose(np.exp(logits), numpy_of(model(x)), rtol=1e-4, atol=1e-6)
    assert labels.tolist() == y.tolist()
    assert predictions_of(model, (x, np.random.default_rng(0).random((len(x), 2))), 7) is None


def test_the_observer_ends_a_training_after_a_number_of_steps() -> None:
    model, ((x, y), _) = make_student(), arrays()
    model.compile("sgd", COMPILE["loss"])
    observer = RunObserver(6)
    model.fit(x, y, batch_size=16, epochs=9, verbose=0, callbacks=[observer])
    assert (observer.steps, int(model.optimizer.iterations), observer.epochs) == (6, 6, 2)
    assert 0 < observer.step_seconds < observer.seconds  # type: ignore[operator]


FILE = {
    "student": {"class_path": "compared_keras.make_student"},
    "data": {"class_path": "compared_keras.arrays"},
    "teacher": {"class_path": "compared_keras.make_teacher"},
    "methods": {"soft targets": [{"class_path": "keras_distill.LogitsDistillation"}]},
    "metric": "val_accuracy",
    "seeds": 1,
    "compile": {
        "optimizer": "sgd",
        "loss": {
            "class_path": "keras.losses.SparseCategoricalCrossentropy",
            "init_args": {"from_logits": True},
        },
        "metrics": ["accuracy"],
    },
    "fit": {"epochs": 1},
    "folder": "results",
}


def test_the_command_compares_and_a_wrong_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("compare.yaml")
    file.write_text(yaml.safe_dump(FILE), encoding="utf-8")
    assert distill_core.cli.keras.main(["compare", "compare.yaml"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("val_accuracy in %: one seed, without intervals")
    assert "soft targets: " in out
    assert Comparison.read("results").methods == ("soft targets",)
    file.write_text(yaml.safe_dump({**FILE, "compil": {}}), encoding="utf-8")
    assert distill_core.cli.keras.main(["compare", "compare.yaml"]) == 2
    assert "Expected `compil` to be a known key, but it is not. Closest: 'compile'" in capsys.readouterr().err
