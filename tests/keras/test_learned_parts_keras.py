"""Adapters and learned losses train, however a training begins and wherever the teacher's outputs come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from keras_nets import cross_entropy, numpy_of, table
from numpy.testing import assert_equal

from keras_distill import (
    CurriculumTemperature,
    DistillModel,
    DistillTargets,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
    VariationalInformationLoss,
)
from keras_distill.compat import unknown_variables
from keras_distill.schedules import Linear


def network(width: int, name: str) -> keras.Model:
    inputs = keras.Input((6,))
    body = keras.layers.Dense(width, activation="tanh", name="body")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(body), name=name)


# A term may learn an adapter, the parameters of a loss, or a temperature
TERMS: dict[str, Callable[[], Any]] = {
    "adapter": lambda: FeatureDistillation("body", "body"),
    "loss": lambda: FeatureDistillation("body", "body", VariationalInformationLoss()),
    "temperature": lambda: LogitsDistillation(SoftTargetLoss(CurriculumTemperature(reversal_weight=1.0))),
}


def teacher() -> keras.Model:
    keras.utils.set_random_seed(11)
    return network(5, "teacher")


def targets_of(kind: str, x: Any, y: Any) -> DistillTargets:
    made = DistillModel(network(4, "asking"), teacher(), TERMS[kind]()).teacher_targets(x, y)
    return DistillTargets(y, keras.tree.map_structure(keras.ops.convert_to_numpy, made.teacher))


def cached(kind: str, x: Any, y: Any, folder: Path) -> Any:
    layers = [] if kind == "temperature" else ["body"]
    cache = TeacherCache.build(teacher(), x, folder / "cache", layers=layers, dtype="float32", progress=False)
    return cache.attach((x, y), batch_size=8)


def model_of(kind: str, taught: bool, task: bool) -> DistillModel:
    keras.utils.set_random_seed(5)
    terms = [TERMS[kind](), LogitsDistillation(name="output")]  # without a task the output needs a term, too
    model = DistillModel(network(4, "student"), teacher() if taught else None, terms, teacher_metrics=[])
    model.compile(keras.optimizers.Adam(0.01), cross_entropy() if task else None, jit_compile=False)
    return model


def fit(model: DistillModel, source: str, kind: str, folder: Path, task: bool) -> None:
    x, y = table(16)
    labels = y if task else None
    if source == "cache":
        model.fit(cached(kind, x, labels, folder), verbose=0)
    elif source == "targets":
        model.fit(x, targets_of(kind, x, labels), batch_size=8, verbose=0)
    else:
        model.fit(x, labels, batch_size=8, verbose=0)


def called(model: DistillModel, folder: Path) -> DistillModel:
    model(table(4)[0])
    return model


def evaluated(model: DistillModel, folder: Path) -> DistillModel:
    """Without a teacher the task loss alone is computed."""
    model.evaluate(*table(4), verbose=0)
    return model


def saved(model: DistillModel, folder: Path) -> DistillModel:
    """Before any training, so that a model without a teacher has no adapters yet."""
    before = model.teacher
    model.save(folder / "model.keras")
    model = keras.models.load_model(folder / "model.keras")
    if before is not None:
        model.teacher = before
    return model


BEGINNINGS: dict[str, Callable[[DistillModel, Path], DistillModel]] = {
    "new": lambda model, folder: model,
    "called": called,
    "evaluated": evaluated,
    "saved": saved,
}


ROWS = [
    *itertools.product(["adapter"], ["live", "targets", "cache"], ["task", "alone"], BEGINNINGS),
    *itertools.product(["loss", "temperature"], ["targets", "cache"], ["alone"], ["new", "saved"]),
]


@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
@pytest.mark.parametrize(("kind", "source", "loss", "beginning"), ROWS)
def test_every_learned_part_is_trained(kind: str, source: str, loss: str, beginning: str, tmp_path: Path) -> None:
    """Also if the optimizer could be built before the parts, which take their shapes from the first batch."""
    task = loss == "task"
    if beginning == "evaluated" and not task and source != "live":
        beginning = "called"  # nothing can be evaluated
    model = BEGINNINGS[beginning](model_of(kind, source == "live", task), tmp_path)

    fit(model, source, kind, tmp_path, task)

    learned = model.step.trainable_variables
    assert learned
    assert unknown_variables(model.optimizer, [*model.student.trainable_variables, *learned]) == []
    begun = [numpy_of(variable) for variable in learned]
    fit(model, source, kind, tmp_path, task)
    assert all((before != numpy_of(variable)).any() for before, variable in zip(begun, learned, strict=True))


@pytest.mark.parametrize("task", [True, False], ids=["task", "alone"])
def test_a_term_that_rests_at_first_is_trained_later(task: bool, tmp_path: Path) -> None:
    """Its adapter takes its shape from the first batch, in which its weight is 0."""
    x, y = table(16)
    keras.utils.set_random_seed(5)
    late = FeatureDistillation("body", "body", weight=lightly())
    model = DistillModel(network(4, "student"), None, [late, LogitsDistillation(name="output", weight=0.0)][: 2 - task])
    model.compile(keras.optimizers.Adam(0.01), cross_entropy() if task else None, jit_compile=False)
    targets = targets_of("adapter", x, y if task else None)
    if not task:
        model.terms[1].weight = 1.0
    model.fit(x, targets, batch_size=4, epochs=2, verbose=0)
    first = numpy_of(model.step.trainable_variables[0])
    model.fit(x, targets, batch_size=4, epochs=4, initial_epoch=2, verbose=0)
    assert (first != numpy_of(model.step.trainable_variables[0])).any()


def trained_file(folder: Path) -> tuple[DistillModel, Any, Path]:
    """A model with an adapter that learned from a cache, the data, and a file of its weights."""
    model, data = model_of("adapter", False, True), cached("adapter", *table(16), folder)
    model.fit(data, epochs=2, shuffle=False, verbose=0)
    model.save_weights(folder / "model.weights.h5")
    return model, data, folder / "model.weights.h5"


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("beginning", [called, evaluated])
def test_loaded_weights_without_the_adapters_are_refused(beginning: Any, tmp_path: Path) -> None:
    """A call makes the student alone; Keras leaves weights out that no layer asks for, without a word."""
    _, _, file = trained_file(tmp_path)
    other = beginning(model_of("adapter", False, True), tmp_path)
    with pytest.raises(ValueError, match=r"^Expected term 'body' to have made its .* a file with 2 weights of them$"):
        other.load_weights(file)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_are_loaded_once_the_adapters_are_made(tmp_path: Path) -> None:
    model, data, file = trained_file(tmp_path)
    expected = model.evaluate(data, verbose=0, return_dict=True)
    other = model_of("adapter", False, True)
    other.evaluate(data, verbose=0)
    other.load_weights(file)
    assert other.evaluate(data, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_without_adapters_fit_the_student_alone(tmp_path: Path) -> None:
    """`skip_mismatch=True` asks for it, and a file without adapters never needs it."""
    model, _, file = trained_file(tmp_path)
    other = called(model_of("adapter", False, True), tmp_path)
    other.load_weights(file, skip_mismatch=True)
    x, _ = table(4)
    assert_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))
    new = called(model_of("adapter", False, True), tmp_path)
    new.save_weights(tmp_path / "new.weights.h5")
    other.load_weights(tmp_path / "new.weights.h5")
    assert_equal(other.predict(x, verbose=0), new.predict(x, verbose=0))


@pytest.mark.parametrize("source", ["cache", "targets", "generator"])
def test_an_evaluation_on_labels_alone_may_come_first(source: str, tmp_path: Path) -> None:
    """The next evaluation makes the adapters, also on TensorFlow, whose functions make variables in a first call."""
    data = cached("adapter", *table(16), tmp_path)
    model = evaluated(model_of("adapter", False, True), tmp_path)
    if source == "cache":
        logs = model.evaluate(data, verbose=0, return_dict=True)
    elif source == "targets":
        x, y = table(16)
        logs = model.evaluate(x, targets_of("adapter", x, y), batch_size=8, verbose=0, return_dict=True)
    else:
        logs = model.evaluate((data[i % 2] for i in range(9)), steps=2, verbose=0, return_dict=True)
    assert logs["body_loss"] > 0
    assert model.evaluate(data, verbose=0, return_dict=True) == pytest.approx(logs, rel=1e-5)


def lightly() -> Linear:
    """A weight that is 0 in the first step."""
    return Linear(0.0, 1.0)


@pytest.mark.parametrize("later", ["teacher", "targets"])
def test_a_term_that_comes_after_the_optimizer_is_refused_in_words(later: str) -> None:
    """A training without any teacher has built the optimizer; a new optimizer trains the term."""
    x, y = table(16)
    model = DistillModel(network(4, "student"), None, FeatureDistillation("body", "body", weight=0.0))
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), jit_compile=False)
    model.fit(x, y, batch_size=8, verbose=0)
    model.terms[0].weight = 1.0
    if later == "teacher":
        model.teacher = teacher()
    data = (x, targets_of("adapter", x, y) if later == "targets" else y)
    with pytest.raises(ValueError, match=r"to train the weights of term 'body'.*Compile with a new optimizer"):
        model.fit(*data, batch_size=8, verbose=0)
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), jit_compile=False)
    model.fit(*data, batch_size=8, verbose=0)
    assert unknown_variables(model.optimizer, model.trainable_variables) == []


@pytest.mark.tensorflow
@pytest.mark.parametrize("source", ["targets", "cache"])
def test_a_compiled_step_makes_the_parts_before(source: str, tmp_path: Path) -> None:
    """XLA, with terms alone."""
    model = model_of("adapter", False, False)
    model.compile(keras.optimizers.Adam(0.01), jit_compile=True)
    fit(model, source, "adapter", tmp_path, False)
    assert unknown_variables(model.optimizer, model.trainable_variables) == []


@pytest.mark.tensorflow
def test_evaluations_on_labels_alone_are_traced_once() -> None:
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            traces.append(inputs)
            return inputs

    x, y = table(16)
    student = network(4, "student")
    student = keras.Model(student.inputs, Traced()(student.outputs[0]))
    model = DistillModel(student, None, FeatureDistillation("body", "body"))
    model.compile("sgd", cross_entropy(), jit_compile=False)
    traces.clear()
    for _ in range(3):
        model.evaluate(x, y, verbose=0)
    assert len(traces) == 1
