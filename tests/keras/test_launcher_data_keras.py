"""The launcher for Keras: data, optimizers, epochs and scores of its built-in training."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras_launch import Logs, launched
from keras_nets import assert_same_weights, log_softmax64, mlp, numpy_of, table

from keras_distill import IntermediateLayersKnowledgeDistillationLoss
from keras_distill import KnowledgeDistillationLoss as Knowledge

FIT: dict[str, Any] = {"batch_size": 4, "shuffle": False, "verbose": 0}


def batches(size: int = 4) -> list[Any]:
    """The 16 examples in a list of batches."""
    inputs, labels = table()
    return [(inputs[start : start + size], labels[start : start + size]) for start in range(0, 16, size)]


def as_dict(inputs: Any, labels: Any) -> dict[str, Any]:
    return {"features": inputs, "labels": labels}


class Loader:
    """A user's own loader without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from batches()


class Numbered(keras.utils.PyDataset):
    """The batches as Keras' own kind of data set."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return batches()[index]


class NumberedDicts(Numbered):
    """As dicts, with an entry that no model takes."""

    def __getitem__(self, index: int) -> Any:
        return {"an_id": np.arange(4), **as_dict(*super().__getitem__(index))}


def tf_data(examples: Any) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(examples).batch(4)


DATA = {
    "arrays": table,
    "dict": lambda: as_dict(*table()),
    "list": batches,
    "list_of_dicts": lambda: [as_dict(*batch) for batch in batches()],
    "loader": Loader,
    "pydataset": Numbered,
    "pydataset_of_dicts": NumberedDicts,
    "tf": lambda: tf_data(table()),
    "tf_dicts": lambda: tf_data(as_dict(*table())),
}
FORMS = [pytest.param(form, marks=pytest.mark.tensorflow) if "tf" in form else form for form in DATA]


def net(width: int, name: str, form: str = "") -> keras.Model:
    """The network of ``mlp``; it takes dicts if the data are dicts."""
    inputs = keras.Input((6,), name="features")
    hidden = keras.layers.Dense(width, activation="relu")(inputs)
    return keras.Model({"features": inputs} if "dict" in form else inputs, keras.layers.Dense(3)(hidden), name=name)


def trained(data: Any, form: str = "", **train: Any) -> tuple[keras.Model, Logs]:
    keras.utils.set_random_seed(5)
    logs = Logs()
    distiller = launched({"distillation": {"train": {"end_epoch": 2, "fit": FIT, **train}}}, callbacks=[logs])
    distiller.student_model, distiller.teacher_model = net(8, "student", form), net(12, "teacher", form)
    distiller.train_dataloader = data
    return distiller.fit(), logs


@functools.cache
def usual(number: int) -> list[Any]:
    """Weights after two epochs of the first batches."""
    return trained(batches()[:number])[0].get_weights()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cap", [None, 3])
def test_every_form_of_data_trains_alike_n10(form: str, cap: int | None) -> None:
    """N10, N17-N24: an epoch has at most ``iteration`` batches, the same first ones in every form."""
    model, logs = trained(DATA[form](), form, **({} if cap is None else {"iteration": cap}))
    assert logs.batches == 2 * (cap or 4)
    for value, expected in zip(model.get_weights(), usual(cap or 4), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_an_iteration_limit_above_the_number_of_batches_changes_nothing_n17() -> None:
    """N17-N24."""
    assert trained(batches(), iteration=9)[1].batches == 8


@pytest.mark.parametrize("form", ["pydataset", "pydataset_of_dicts"])
@pytest.mark.parametrize("cap", [None, 3])
def test_a_pydataset_is_shuffled_in_each_epoch_and_told_of_it(form: str, cap: int | None) -> None:
    """Also with ``iteration``: otherwise the batches after the first ones would never be read."""

    class Watched(type(DATA[form]())):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            epochs[-1].append(index)
            return super().__getitem__(index)

        def on_epoch_begin(self) -> None:
            epochs.append([])

        def on_epoch_end(self) -> None:
            ended.append(len(epochs))

    epochs: list[list[int]] = [[]]
    ended: list[int] = []
    trained(Watched(), form, iteration=cap, end_epoch=8, fit={"verbose": 0})
    size = cap or 4
    read = [epoch[:size] for epoch in epochs if len(epoch) >= size]  # Keras may look at a batch more
    assert len(read) == 8
    assert all(len(set(epoch)) == size for epoch in read)
    assert {index for epoch in read for index in epoch} == {0, 1, 2, 3}
    assert len({tuple(epoch) for epoch in read}) > 1
    assert set(ended) >= set(range(2, 9))


@pytest.mark.parametrize("form", ["dict", "list_of_dicts", "pydataset", "pydataset_of_dicts", "loader", "arrays"])
def test_every_form_of_data_is_scored_alike_n2(form: str) -> None:
    """N2: the configured metric before the training."""
    distiller = launched({"evaluation": {"accuracy": {"metric": {"Accuracy": {}}}}}, eval_dataloader=DATA[form]())
    distiller.student_model, distiller.teacher_model = net(8, "student", form), net(12, "teacher", form)
    inputs = {"features": table()[0]} if "dict" in form else table()[0]
    models = (distiller.student_model, distiller.teacher_model)
    expected = [(numpy_of(model(inputs)).argmax(-1) == table()[1]).mean() for model in models]
    distiller.on_train_begin()
    np.testing.assert_allclose((distiller.scores.first_score, distiller.scores.teacher_score), expected)
    distiller.close()


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (None, ValueError, "`train_dataloader` to be set, or `distillation.train.dataloader` to name a class_path"),
        (3, TypeError, "data that can be gone through once an epoch"),
        (iter([1]), TypeError, "data that can be gone through once an epoch"),
        ([np.ones((2, 6))], ValueError, r"a batch to be \(inputs, labels\) or a dict"),
        ([{"x": 1}], ValueError, "a batch to be .* one of labels, label, target, y. Received: keys .'x'."),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_n10(data: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"Expected {told}"):
        launched(train_dataloader=data).fit()


def test_a_missing_student_is_refused_n12() -> None:
    with pytest.raises(ValueError, match=r"Expected `student_model` to be a keras.Model. Set it first. Received: None"):
        launched(student_model=None).fit()


def test_a_class_path_makes_the_data_n10(monkeypatch: pytest.MonkeyPatch) -> None:
    """N10: ``dataloader: {class_path: ..., init_args: ...}``, for training and for scores."""
    module = types.ModuleType("some_data")
    module.batches = batches  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_data", module)
    where = {"class_path": "some_data.batches", "init_args": {"size": 8}}
    conf = {
        "distillation": {"train": {"dataloader": where, "fit": FIT}},
        "evaluation": {"accuracy": {"metric": {"topk": 3}, "dataloader": where}},
    }
    logs = Logs()
    distiller = launched(conf, train_dataloader=None, callbacks=[logs])
    distiller.fit()
    assert logs.batches == 2
    assert distiller.best_score == 1.0


OPTIMIZERS: dict[str, Any] = {
    "SGD": ({"learning_rate": 0.1, "nesterov": True, "momentum": 0.9}, {}),
    "Adam": ({"learning_rate": 0.01, "beta_1": 0.8}, {"epsilon": 1e-8}),
    "AdamW": ({"learning_rate": 0.01}, {"epsilon": 1e-8}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_configured_optimizer_is_that_of_keras_n10(name: str) -> None:
    """N10: the same weights as with the user's own optimizer of these settings."""
    written, besides = OPTIMIZERS[name]
    keras.utils.set_random_seed(5)
    distiller = launched({"distillation": {"train": {"end_epoch": 2, "fit": FIT}}})
    distiller.student_model, distiller.teacher_model = net(8, "student"), net(12, "teacher")
    distiller.optimizer = getattr(keras.optimizers, name)(**written, **besides)
    model, _ = trained(table(), optimizer={name: written})
    assert_same_weights(model, distiller.fit())


def test_epochs_run_from_start_to_end_and_a_seed_repeats_them_n17() -> None:
    """N17-N24: dropout and the order of the examples come from the seed."""
    train = {"start_epoch": 2, "end_epoch": 5, "fit": {"batch_size": 4, "verbose": 0}}
    students = [mlp(dropout=0.5) for _ in range(2)]
    students[1].set_weights(students[0].get_weights())
    teacher = mlp(12, name="teacher")
    for number, student in enumerate(students):
        logs = Logs()
        keras.utils.set_random_seed(number)
        distiller = launched({"distillation": {"train": train}, "tuning": {"random_seed": 3}}, callbacks=[logs])
        distiller.student_model, distiller.teacher_model = student, teacher
        distiller.fit()
        assert len(logs.epochs) == 3
    assert_same_weights(*students)


def test_the_best_student_is_given_back_n2() -> None:
    """N2: by every second score, if lower is better; the first of several numbers counts."""
    seen: list[Any] = []

    def score(model: keras.Model) -> Any:
        if model.name == "teacher":
            return [7.0, 0.0]
        seen.append(model.get_weights())
        return [[5.0, 4.0, 1.0, 2.0][len(seen) - 1], -len(seen)]

    distiller = launched(epochs=6, eval_func=score, higher_is_better=False, eval_frequency=2)
    student = distiller.student_model
    assert distiller.fit() is student
    assert len(seen) == 4
    assert (distiller.scores.teacher_score, distiller.scores.first_score, distiller.best_score) == (7.0, 5.0, 1.0)
    for value, best, last in zip(student.get_weights(), seen[2], seen[3], strict=True):
        np.testing.assert_array_equal(value, best)
        assert (best != last).any()


@pytest.mark.parametrize(
    ("metric", "higher", "best"),
    [
        ({"MSE": {}}, None, 1.0),
        ({"RMSE": {}}, None, 1.0),
        ({"MAE": {}}, None, 1.0),
        ({"keras": {"class_path": "keras.metrics.MeanAbsoluteError"}}, None, 1.0),
        ({"keras": {"class_path": "keras.metrics.R2Score"}}, None, 1.0),
        ({"keras": {"class_path": "keras.metrics.R2Score"}}, False, 5.0),
        ({"MSE": {}}, True, 5.0),
    ],
)
def test_the_best_student_is_the_one_with_the_smallest_error_n2(metric: Any, higher: bool | None, best: float) -> None:
    """N2: unless the direction is set; also for metrics of Keras, some of which grow."""
    student, teacher = (keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]) for _ in range(2))
    data = np.zeros((2, 1), "float32"), np.array([[0.0], [2.0]], "float32")
    distiller = launched({"evaluation": {"accuracy": {"metric": metric}}}, eval_dataloader=data)
    distiller.student_model, distiller.teacher_model = student, teacher
    if higher is not None:
        distiller.higher_is_better = higher
    for number, bias in enumerate((5.0, 4.0, 1.0, 3.0)):
        student.layers[-1].bias.assign([bias])
        if number:
            distiller.on_epoch_end()
        else:
            distiller.on_train_begin()
    distiller.on_train_end()
    assert numpy_of(student.layers[-1].bias).tolist() == [best]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # the criterion leaves the classifier out
def test_an_optimizer_of_an_earlier_fit_that_lacks_adapters_is_refused_in_words() -> None:
    criterion = IntermediateLayersKnowledgeDistillationLoss([["hidden", "hidden"]])
    distiller = launched(criterion=criterion, optimizer=keras.optimizers.SGD(0.1))
    distiller.fit()
    words = r"the weights of term 'hidden'. Compile .*; in the launcher, set a new `optimizer` before each `fit`"
    with pytest.raises(ValueError, match=words):
        distiller.fit()
    distiller.optimizer = keras.optimizers.SGD(0.1)
    distiller.fit()


@pytest.mark.parametrize(("configured", "set_later", "best"), [(False, None, 2), (True, None, 1), (False, True, 1)])
def test_the_file_says_whether_a_larger_score_is_better_n2(configured: bool, set_later: bool | None, best: int) -> None:
    """N2: `higher_is_better` in Python counts more."""
    scores = iter([0.9, 0.5, 0.8, 0.1, 0.7])  # teacher, start, three epochs
    conf = {"tuning": {"accuracy_criterion": {"higher_is_better": configured}}}
    distiller = launched(conf, eval_func=lambda model: next(scores), higher_is_better=set_later)
    distiller.on_train_begin()
    for number in range(1, 4):
        distiller.student_model.layers[-1].bias.assign([float(number)] * 3)
        distiller.on_epoch_end()
    distiller.on_train_end()
    assert numpy_of(distiller.student_model.layers[-1].bias).tolist() == [best] * 3


def test_a_score_that_is_not_a_number_is_refused_n2() -> None:
    with pytest.raises(TypeError, match=r"`eval_func` to return a number, or several. Received: \[\]"):
        launched(eval_func=lambda model: []).fit()


@pytest.mark.parametrize("labels_are", ["sparse", "one_hot"])
@pytest.mark.parametrize("metric", ["topk", "Accuracy", "F1"])
def test_metrics_of_classes_equal_numpy_n2(metric: str, labels_are: str) -> None:
    inputs, labels = table()
    distiller = launched({"evaluation": {"accuracy": {"metric": {metric: 2 if metric == "topk" else {}}}}})
    scores = numpy_of(distiller.student_model(inputs))
    picked = scores.argmax(-1)
    hits = [[((picked == c) & (labels == c)).sum(), (picked == c).sum() + (labels == c).sum()] for c in range(3)]
    expected = {
        "topk": (np.argsort(scores)[:, 1:] == labels[:, None]).any(-1).mean(),
        "Accuracy": (picked == labels).mean(),
        "F1": np.mean([2 * both / number for both, number in hits]),
    }[metric]
    distiller.eval_dataloader = inputs, np.eye(3, dtype="float32")[labels] if labels_are == "one_hot" else labels
    distiller.on_train_begin()
    distiller.close()
    np.testing.assert_allclose(distiller.best_score, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["MSE", "RMSE", "MAE", "keras"])
def test_metrics_of_numbers_equal_numpy_n2(name: str) -> None:
    inputs, _ = table()
    targets = np.tanh(inputs[:, 3:])
    settings = {"class_path": "keras.metrics.CosineSimilarity"} if name == "keras" else {}
    distiller = launched({"evaluation": {"accuracy": {"metric": {name: settings}}}}, eval_dataloader=(inputs, targets))
    output = numpy_of(distiller.student_model(inputs))
    cosine = (output * targets).sum(-1) / np.linalg.norm(output, axis=-1) / np.linalg.norm(targets, axis=-1)
    expected = {
        "MSE": ((output - targets) ** 2).mean(),
        "RMSE": ((output - targets) ** 2).mean() ** 0.5,
        "MAE": np.abs(output - targets).mean(),
        "keras": cosine.mean(),
    }[name]
    distiller.on_train_begin()
    distiller.close()
    np.testing.assert_allclose(distiller.best_score, expected, rtol=1e-5)


def test_pure_distillation_needs_no_labels_that_mean_anything_n3() -> None:
    """N3: at w0 = 0 labels do not count; the student learns to agree with its teacher."""
    inputs, _ = table(64)
    distiller = launched(
        {
            "distillation": {
                "train": {"end_epoch": 60, "fit": {"verbose": 0}, "optimizer": {"Adam": {"learning_rate": 0.02}}}
            }
        }
    )
    distiller.criterion = Knowledge(2.0, ["CE", "KL"], [0.0, 1.0])
    distiller.train_dataloader = inputs, np.full((64,), -1, "int32")
    student = distiller.fit()
    models = (student, distiller.teacher_model)
    student_classes, teacher_classes = (log_softmax64(numpy_of(model(inputs))).argmax(-1) for model in models)
    assert (student_classes == teacher_classes).mean() > 0.85
