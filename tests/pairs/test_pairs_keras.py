"""Every feature in every situation equals a loop written by hand, or is refused. One table, one test."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
if keras.backend.backend() != "tensorflow":
    pytest.skip("the loops by hand are TensorFlow's", allow_module_level=True)

from pairs import keras_table as table  # noqa: E402
from pairs import random_keras  # noqa: E402
from pairs.keras_table import Feature, by_hand, compile_model  # noqa: E402
from pairs.keras_teachers import BATCH, EPOCHS, FEATURES  # noqa: E402

HERE = Path(__file__).parent


class StopAfter(keras.callbacks.Callback):
    """Ends a training after some epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.last = epochs - 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = epoch == self.last


def fit(model: Any, feature: Feature, targets: Any, *, first: int = 0, last: int = EPOCHS, **settings: Any) -> Any:
    """Some epochs of the whole training."""
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "initial_epoch": first, "epochs": EPOCHS}
    return model.fit(feature.x, targets, **{**arguments, "callbacks": [StopAfter(last)], **settings})


def again(model: Any, other: Any) -> Any:
    """Give another model the teacher, which files do not hold unless it is made of the student."""
    other.held = model.held
    if isinstance(other.teacher, list):
        pairs = zip(other.teacher, model.teacher, strict=True)
        other.teacher = [teacher if own is None else own for own, teacher in pairs]
    elif model.teacher is not None and not model.step.averages:
        other.teacher = model.teacher
    return other


def loaded(feature: Feature, folder: Path) -> Any:
    model = feature.model()
    targets = feature.targets(model)
    fit(model, feature, targets, last=1)
    model.save(folder / "model.keras")
    back = again(model, keras.models.load_model(folder / "model.keras"))
    back.run_eagerly = True
    fit(back, feature, targets, first=1)
    return back


def cloned(feature: Feature, folder: Path) -> Any:
    model = feature.model()
    clone = again(model, keras.models.clone_model(model))
    clone(feature.x[:1])
    clone.set_weights(model.get_weights())
    compile_model(clone)
    fit(clone, feature, feature.targets(model))
    return clone


def compiled_again(feature: Feature, folder: Path) -> Any:
    model = feature.model()
    for epoch in range(EPOCHS):
        compile_model(model)
        fit(model, feature, feature.targets(model), first=epoch, last=epoch + 1)
    return model


def fitted(**compiled: Any) -> Callable[..., Any]:
    def situation(feature: Feature, folder: Path) -> Any:
        model = feature.model(**compiled)
        fit(model, feature, feature.targets(model))
        return model

    return situation


def by_generator(feature: Feature, folder: Path) -> Any:
    model = feature.model()
    targets = feature.targets(model)

    def batches() -> Any:
        while True:
            for start in range(0, 16, BATCH):
                rows = slice(start, start + BATCH)
                yield feature.x[rows], keras.tree.map_structure(lambda array, rows=rows: array[rows], targets)

    model.fit(batches(), steps_per_epoch=2, epochs=EPOCHS, shuffle=False, verbose=0)
    return model


def on_batches(feature: Feature, folder: Path) -> Any:
    model = feature.model()
    targets = feature.targets(model)
    for _ in range(EPOCHS):
        for start in range(0, 16, BATCH):
            rows = slice(start, start + BATCH)
            model.train_on_batch(
                feature.x[rows], keras.tree.map_structure(lambda array, rows=rows: array[rows], targets)
            )
    return model


def copied(way: Callable[[Any], Any]) -> Callable[..., Any]:
    def situation(feature: Feature, folder: Path) -> Any:
        model = feature.model()
        targets = feature.targets(model)
        fit(model, feature, targets, last=1)
        held = model.__dict__.pop("held")
        other = way(model)
        model.held = held
        again(model, other).run_eagerly = True
        fit(other, feature, targets, first=1)
        return other

    return situation


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise RuntimeError("in the middle of an epoch")


def interrupted(feature: Feature, folder: Path) -> Any:
    """The first epoch ends in its middle; the rest of its batches and the second epoch are a second training."""
    model = feature.model()
    targets = feature.targets(model)
    with pytest.raises(RuntimeError, match="in the middle of an epoch"):
        fit(model, feature, targets, callbacks=[Fails()])
    rest = keras.tree.map_structure(lambda array: array[BATCH:], targets)
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    model.fit(feature.x[BATCH:], rest, **arguments)
    fit(model, feature, targets, first=1)
    return model


def in_mixed_precision(feature: Feature, folder: Path) -> Any:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = feature.model()
    fit(model, feature, feature.targets(model))
    return model


# The situation, the arguments of the loop by hand, and the tolerance.
SITUATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], float]] = {
    "jit_compile": (fitted(jit_compile=True), {}, 1e-5),
    "steps_per_execution": (fitted(steps_per_execution=2, jit_compile=False), {"rounded": 2}, 1e-5),
    "load_model": (loaded, {}, 1e-5),
    "clone": (cloned, {}, 1e-5),
    "second compile": (compiled_again, {"restarts": True}, 1e-5),
    "mixed precision": (in_mixed_precision, {"policy": "mixed_bfloat16"}, 2e-3),
    "generator": (by_generator, {}, 1e-5),
    "train_on_batch": (on_batches, {}, 1e-5),
    "deepcopy": (copied(copy.deepcopy), {}, 1e-5),
    "pickle": (copied(lambda model: pickle.loads(pickle.dumps(model))), {}, 1e-5),
    "exception and second fit": (interrupted, {}, 1e-5),
}
# A new optimizer does not restart the fraction of the training. Each `fit` has its own fraction, and the second of the
# three has a single step.
OTHER_PLACES: dict[tuple[str, str], dict[str, Any]] = {
    ("schedules over the fraction", "second compile"): {},
    ("schedules over the fraction", "exception and second fit"): {"places": (0, 0, 2, 3)},
}


CASES = [(name, situation) for name in FEATURES for situation in FEATURES[name].situations or SITUATIONS]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    policy = keras.config.dtype_policy()
    keras.backend.clear_session()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("name", "situation"), CASES)
def test_a_feature_in_a_situation_equals_the_loop_by_hand_or_is_refused_with_a_clear_error(
    name: str, situation: str, tmp_path: Path
) -> None:
    act, differs, tolerance = SITUATIONS[situation]
    feature = FEATURES[name]
    if situation in feature.words:
        with pytest.raises(ValueError, match=re.escape(feature.words[situation])):
            act(feature, tmp_path)
        return
    differs = OTHER_PLACES.get((name, situation), differs)
    model, tolerance = act(feature, tmp_path), max(tolerance, feature.tolerance)
    for own, expected in zip(model.student.get_weights(), by_hand(name, **differs), strict=True):
        np.testing.assert_allclose(own, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights of every feature after a training on two logical devices, in a process of its own."""
    path = tmp_path_factory.mktemp("replicas") / "weights.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    subprocess.run([sys.executable, str(HERE / "keras_replicas.py"), str(path)], env=environment, check=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_on_two_replicas_equals_the_loop_by_hand_or_is_refused(name: str, replicas: Any) -> None:
    tolerance, words = max(1e-5, FEATURES[name].tolerance), FEATURES[name].words.get("replicas")
    if words is not None:
        assert words in replicas[name]
        return
    for own, expected in zip(replicas[name], by_hand(name, halves=True), strict=True):
        np.testing.assert_allclose(own, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=[name for name in ("torch", "jax") if importlib.util.find_spec(name)])
def on_backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights of every feature after a training on another backend, in a process of its own."""
    path = tmp_path_factory.mktemp(request.param) / "weights.json"
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "KERAS_BACKEND": request.param}
    subprocess.run([sys.executable, str(HERE / "keras_backend.py"), str(path)], env=environment, check=True)
    report = json.loads(path.read_text())
    assert report["backend"] == request.param
    return report


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_on_another_backend_equals_the_loop_by_hand_or_is_refused(name: str, on_backend: Any) -> None:
    tolerance, words = max(1e-5, FEATURES[name].tolerance), FEATURES[name].words.get(on_backend["backend"])
    if words is not None:
        assert words in on_backend[name]
        return
    for own, expected in zip(on_backend[name], by_hand(name), strict=True):
        np.testing.assert_allclose(own, expected, rtol=tolerance, atol=tolerance)


def test_the_loop_by_hand_differs_between_features() -> None:
    """Otherwise a feature that does nothing would pass."""
    results = [by_hand(name)[0] for name in FEATURES if name not in ("stored targets", "masks", "teacher dtype")]
    flat = [np.round(weights, 6).tobytes() for weights in results]
    assert len(set(flat)) == len(flat) - 1  # both schedules have the same numbers
    assert table.EPOCHS * 16 / BATCH == 4


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("seed", range(12))
def test_a_random_combination_equals_its_loop_by_hand(seed: int, tmp_path: Path) -> None:
    random_keras.check(seed, tmp_path)


def test_random_combinations_draw_every_choice() -> None:
    drawn = [random_keras.draw(seed) for seed in range(200)]
    for name, options in random_keras.CHOICES.items():
        assert {repr(combination[name]) for combination in drawn} >= {repr(option) for option in options}, name
