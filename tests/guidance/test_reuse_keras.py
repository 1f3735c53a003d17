"""`compare(reuse_models=True)` on Keras models: the same results with fewer traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
from compared_keras import COMPILE, arrays, make_student, make_teacher

from distill_core.guidance.comparison import Comparison
from keras_distill import (
    DistillModel,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    compare,
)
from keras_distill.guidance.reuse import CompiledModels
from keras_distill.schedules import Balanced, Linear

FEATURES = FeatureDistillation("hidden", "hidden", "mse", adapter=keras.layers.Dense(8))
METHODS = {"soft targets and features": [LogitsDistillation(), FEATURES]}


def compared(folder: Path, **changed: Any) -> Comparison:
    settings: dict[str, Any] = {"student": make_student, "data": arrays(), "teacher": make_teacher()}
    settings |= {"methods": METHODS, "metric": "val_loss", "mode": "min", "seeds": 3, "folder": folder}
    settings |= {"compile": {**COMPILE, "optimizer": "adam"}, "fit": {"epochs": 1, "batch_size": 16}}
    return compare(**{**settings, "progress": False, **changed})


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models whose step was traced: its ``train_step`` was called, or on torch its function of a step was made."""
    traced: list[Any] = []
    usual_step, usual_function = keras.Model.train_step, keras.Model.make_train_function

    def train_step(model: Any, *args: Any) -> Any:
        traced.append(model)
        return usual_step(model, *args)

    def make_train_function(model: Any, force: bool = False) -> Any:
        if force or model.train_function is None:
            traced.append(model)
        return usual_function(model, force)

    if keras.backend.backend() == "torch":  # which calls `train_step` for each batch
        monkeypatch.setattr(keras.Model, "make_train_function", make_train_function)
    else:
        monkeypatch.setattr(keras.Model, "train_step", train_step)
    return traced


def test_models_that_are_used_again_give_the_same_results_and_are_traced_once(
    tmp_path: Path, traces: list[Any]
) -> None:
    results = {}
    for reuse in (False, True):
        traces.clear()
        comparison = compared(tmp_path / str(reuse), reuse_models=reuse)
        traced_once = reuse and keras.backend.backend() != "torch"  # torch, which traces nothing, uses no model again
        assert len(traces) == (3 if traced_once else 9)  # a method, and the student alone at equal steps and compute
        runs = [run for run in comparison.runs if "equal compute" not in run.method]  # its steps are measured
        results[reuse] = {(run.method, run.seed): (run.metrics, run.curve, run.student, run.batches) for run in runs}
    assert len(results[True]) == 6
    assert results[True] == results[False]


def test_a_callback_of_the_user_may_change_more_than_variables_and_gets_a_fresh_model(
    tmp_path: Path, traces: list[Any]
) -> None:
    fit = {"epochs": 1, "batch_size": 64, "callbacks": [keras.callbacks.TerminateOnNaN()]}
    compared(tmp_path, fit=fit, seeds=2, reuse_models=True)
    assert len(traces) == 6


CHANGING: dict[str, dict[str, Any]] = {
    "a schedule": {"terms": LogitsDistillation(weight=Linear(0.0, 1.0))},
    "a schedule of the task weight": {"terms": LogitsDistillation(), "task_weight": Linear(0.0, 1.0)},
    "a balanced weight": {"terms": LogitsDistillation(weight=Balanced())},
    "an EMATeacher": {"teacher": EMATeacher(), "terms": LogitsDistillation()},
    "nothing": {"terms": LogitsDistillation()},
}


@pytest.mark.parametrize("case", CHANGING)
def test_a_model_is_kept_unless_its_settings_follow_the_training(case: str) -> None:
    student, models = make_student(), CompiledModels()
    model = DistillModel(student, **{"teacher": make_teacher(), **CHANGING[case]})
    model.compile("adam", COMPILE["loss"])
    model.optimizer.build(model.trainable_variables)
    models.keep("method", student, model)
    assert bool(models.kept) == (case == "nothing")
