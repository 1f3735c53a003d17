"""Settings that come back exactly as they were (K25)."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import cross_entropy, mlp, table

import keras_distill
from keras_distill import (
    AttentionTransferLoss,
    CrossHeadDistillation,
    DistillModel,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitMSELoss,
    LogitsDistillation,
    SoftTargetLoss,
    Tap,
    TeacherDivergence,
    losses,
    metrics,
)
from keras_distill.losses.base import FormulaLoss, LabelledLoss, LogitsLoss
from keras_distill.terms import LossTerm, TermState
from keras_distill.terms.counting import CountingTerm
from keras_distill.terms.teacher_parts import TeacherParts


def teacher_of(width: int = 12) -> keras.Model:
    """The same teacher each time."""
    keras.utils.set_random_seed(11)
    return mlp(width, name="teacher")


def distilled(adapter: bool = True, **settings: Any) -> DistillModel:
    teacher = teacher_of(12 if adapter else 8)
    keras.utils.set_random_seed(5)
    terms = [
        LogitsDistillation(SoftTargetLoss(temperature=2.5), weight=0.5),
        FeatureDistillation("hidden", "hidden", weight=0.4),
    ]
    model = DistillModel(mlp(8), teacher, terms, task_weight=0.7, **settings)
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), metrics=["accuracy"], jit_compile=False)
    return model


def fitted(model: DistillModel, epochs: int = 1, **settings: Any) -> dict[str, list[float]]:
    history = model.fit(*table(16), 8, epochs, shuffle=False, verbose=0, **settings)
    return history.history


def loaded(path: Path | str) -> Any:
    """The model in a file; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # what NumPy says about Keras' variables, here as in pyproject.toml
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return keras.models.load_model(path)


INSTANCES: list[Any] = [
    SoftTargetLoss(temperature=0.7, standardize=True, from_logits=False, reduction="sum", name="custom"),
    losses.SoftCrossEntropyLoss(temperature=0.7, from_logits=False, name="custom"),
    LogitMSELoss(from_logits=False, reduction="sum", name="custom"),
    AttentionTransferLoss(p=1.3, reduction="none", name="custom"),
    losses.FeatureDistance("cosine", reduction="sum", name="custom"),
    losses.FunctionLoss(keras.losses.mean_absolute_error, name="custom"),
    metrics.TeacherAgreement(name="custom"),
    TeacherDivergence(temperature=0.7, name="custom"),
]


def serializable() -> set[type]:
    """The public Keras classes of every module of the package: not the abstract ones, nor what a model makes itself."""
    classes: set[type] = set()
    for module in pkgutil.walk_packages(keras_distill.__path__, "keras_distill."):
        if "demo" in module.name or "__main__" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            kinds = (keras.layers.Layer, keras_distill.DistillationTerm, keras.losses.Loss, keras.metrics.Metric)
            own = isinstance(value, type) and value.__module__ == module.name and not value.__name__.startswith("_")
            if own and issubclass(value, kinds):
                classes.add(value)
    abstract = {keras_distill.DistillationTerm, LossTerm, CountingTerm, TeacherParts, keras_distill.DistillationLoss}
    abstract |= {FormulaLoss, LogitsLoss, LabelledLoss}
    return classes - abstract - {metrics.LossParts, TermState}


def test_k25_every_class_is_registered() -> None:
    """K25: under the package's name, so that files name the origin of a class."""
    classes = serializable()
    assert {DistillModel, LogitsDistillation, FeatureDistillation, SoftTargetLoss, TeacherDivergence} <= classes
    for kind in classes:
        assert keras.saving.get_registered_name(kind) == f"keras_distill>{kind.__name__}"
        assert keras.saving.get_registered_object(f"keras_distill>{kind.__name__}") is kind


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: type(instance).__name__)
def test_k25_losses_and_metrics_come_back_from_json(instance: Any) -> None:
    """K25: every setting is exact, by `from_config` and through Keras' own serialization."""
    config = instance.get_config()
    assert config["name"] == "custom"
    text = json.dumps(config)
    assert type(instance).from_config(json.loads(text)).get_config() == config
    whole = json.loads(json.dumps(keras.saving.serialize_keras_object(instance)))
    back = keras.saving.deserialize_keras_object(whole)
    assert type(back) is type(instance)
    assert back.get_config() == config
    for name in ("temperature", "p"):
        if hasattr(instance, name):
            assert config[name] == getattr(instance, name) == getattr(back, name)


def test_k25_every_parameter_of_a_constructor_is_in_its_config() -> None:
    """K25: no setting is lost, whichever class is added."""
    for kind in serializable():
        example = next((instance for instance in INSTANCES if type(instance) is kind), None)
        if example is None and issubclass(kind, (keras.losses.Loss, keras.metrics.Metric)):
            needed = {"relation_heads": 2} if kind.__name__ == "AttentionRelationLoss" else {}
            example = kind(**needed)
        if example is None:
            continue
        taken = list(kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount])
        taken += list(kind.__init__.__code__.co_varnames[len(taken) + 1 :][: kind.__init__.__code__.co_kwonlyargcount])
        assert set(taken) <= set(example.get_config()), kind.__name__


@pytest.mark.parametrize("value", [0.7, 0.1, 2.5, 1e-6, 3, 0.3333, 1 / 3, 0.0], ids=str)
def test_k25_numbers_in_variables_stay_exact(value: float) -> None:
    """K25: 0.7 stays 0.7, although it lives in a float32 variable."""
    model = DistillModel(mlp(), teacher_of(), [LogitsDistillation(weight=value)], task_weight=value)
    config = json.loads(json.dumps(model.get_config()))
    assert config["task_weight"] == value
    assert config["terms"][0]["config"]["weight"] == value
    if value:
        term = LogitsDistillation(SoftTargetLoss(temperature=value))
        back = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(term))
        assert term.get_config()["loss"]["config"]["temperature"] == value
        assert back.get_config() == term.get_config()
        term.temperature = 2 * value
        assert term.get_config()["loss"]["config"]["temperature"] == 2 * value


def test_k25_numbers_that_changed_are_those_in_the_config(tmp_path: Path) -> None:
    """K25: exact where they were set, the shortest number where a file has written to the model's variable."""
    term = LogitsDistillation(weight=0.3)
    term.weight = 1 / 3
    assert term.get_config()["weight"] == 1 / 3
    model = DistillModel(mlp(), teacher_of(), [term])
    model.save_weights(tmp_path / "third.weights.h5")
    model.load_weights(tmp_path / "third.weights.h5")
    assert term.get_config()["weight"] == 1 / 3
    term.weight = 0.7
    model.save_weights(tmp_path / "other.weights.h5")
    term.weight = 0.2
    model.load_weights(tmp_path / "other.weights.h5")
    assert term.get_config()["weight"] == 0.7


def test_k25_no_setting_of_a_term_is_lost() -> None:
    """K25: every parameter of a constructor, at a value that is not its default."""
    settings: dict[str, Any] = {"weight": 0.7, "use_sample_weight": False, "name": "custom"}
    logits = {**settings, "loss": LogitMSELoss(), "output": 1, "mask": "mask", "ignore_index": 255}
    feature = {**settings, "student_layer": "a", "teacher_layer": "b", "loss": "l1", "adapter": None}
    feature |= {"boxes": "boxes", "mask": "mask", "ignore_index": 255}
    for kind, arguments in ((LogitsDistillation, logits), (FeatureDistillation, feature)):
        named = [
            name
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        assert set(named) == set(arguments)
        config = kind(**arguments).get_config()
        assert set(named) <= set(config)
        back = kind.from_config(json.loads(json.dumps(config)))
        assert (float(back.weight), back.use_sample_weight, back.name) == (pytest.approx(0.7), False, "custom")
    assert LogitsDistillation.from_config(LogitsDistillation(output=1).get_config()).output_key == 1


@keras.saving.register_keras_serializable(package="tests")
def corners(targets: Any) -> Any:
    return targets["boxes"]


TERMS = {
    "logits": lambda: LogitsDistillation(LogitMSELoss(), weight=0.7, output=1, name="scores"),
    "keras loss": lambda: LogitsDistillation(keras.losses.Huber(0.3), weight=0.7),
    "keras function": lambda: LogitsDistillation(keras.losses.mean_squared_error, weight=0.7, output="a"),
    "feature": lambda: FeatureDistillation("a/b", "c.0", "cosine", weight=0.7, adapter=None),
    "taps": lambda: FeatureDistillation(
        [Tap("a", output=1, call=2, where="input"), "b"],
        [Tap("c", output="key"), "d"],
        "kl",
        adapter="linear",
        name="x",
    ),
    "loss": lambda: FeatureDistillation("a", "b", AttentionTransferLoss(p=1.3), weight=0.7),
    "layer": lambda: FeatureDistillation("a", "b", adapter=keras.layers.Dense(5, name="custom")),
    "pyramid": lambda: FeatureDistillation(Tap("a", output=("maps", "*")), Tap("b", output="*"), weight=0.7),
    "boxes": lambda: FeatureDistillation("a", "b", FocalGlobalLoss(0.7), boxes=1),
    "boxes of a function": lambda: CrossHeadDistillation("a", "b", boxes=corners),
    "head": lambda: CrossHeadDistillation(
        [Tap("a", output="*", where="input")], [Tap("b/c", output="scores")], "mse", weight=0.7, adapter="conv1x1"
    ),
}


@pytest.mark.parametrize("kind", TERMS)
def test_k25_terms_come_back_from_json(kind: str) -> None:
    """K25: layers, taps, losses, adapters."""
    term = TERMS[kind]()
    config = term.get_config()
    assert config["weight"] in (0.7, 1.0)
    back = type(term).from_config(json.loads(json.dumps(config)))
    assert json.dumps(back.get_config(), sort_keys=True) == json.dumps(config, sort_keys=True)
    assert back.student_taps == term.student_taps
    assert back.teacher_taps == term.teacher_taps
    whole = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(term))))
    assert json.dumps(whole.get_config(), sort_keys=True) == json.dumps(config, sort_keys=True)


def test_k25_the_model_comes_back_from_json() -> None:
    """K25: with every setting of its constructor."""
    settings = {"evaluate_distillation": False, "teacher_metrics": [], "save_teacher": True, "name": "pupil"}
    model = DistillModel(mlp(), teacher_of(), [LogitsDistillation(weight=0.7)], task_weight=0.1, **settings)
    config = json.loads(json.dumps(model.get_config()))
    assert settings.items() <= config.items()
    back = DistillModel.from_config(config)
    assert json.dumps(back.get_config(), sort_keys=True) == json.dumps(model.get_config(), sort_keys=True)
    assert back.teacher is not None
    clone = DistillModel.from_config(model.get_config())
    assert [layer.name for layer in clone.student.layers] == [layer.name for layer in model.student.layers]


def test_k25_a_frozen_adapter_stays_frozen(tmp_path: Path) -> None:
    """K25: `trainable=False` is a setting like any other, which counts in every model that has the term."""
    term = FeatureDistillation("hidden", "hidden")
    model = DistillModel(mlp(), teacher_of(), [term])
    term.trainable = False
    model.compile("sgd", cross_entropy(), jit_compile=False)
    before = term.adapters[0].get_weights()
    fitted(model)
    for old, new in zip(before, term.adapters[0].get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.save(tmp_path / "model.keras")
    assert not loaded(tmp_path / "model.keras").terms[0].trainable
