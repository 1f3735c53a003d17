"""`compare` on Keras models with losses, layers and functions that Keras cannot save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
from compared_keras import COMPILE, arrays, make_student, make_teacher

from keras_distill import (
    CurriculumTemperature,
    DistillModel,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    compare,
)
from keras_distill.cache.data import order_of
from keras_distill.guidance import run_once


class Squares(keras.losses.Loss):
    """A loss that is not registered."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean((y_true - y_pred) ** 2, axis=-1)


class Widened(keras.layers.Dense):
    """A layer that is not registered."""


METHODS = {
    "a lambda": lambda: LogitsDistillation(lambda a, b: keras.ops.mean((a - b) ** 2), name="own"),
    "a loss": lambda: LogitsDistillation(Squares()),
    "an adapter": lambda: FeatureDistillation("hidden", "hidden", adapter=Widened(8)),
    "a learned temperature": lambda: LogitsDistillation(SoftTargetLoss(CurriculumTemperature())),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_may_hold_objects_that_keras_cannot_save(method: str) -> None:
    term = METHODS[method]()
    settings = {"compile": {**COMPILE, "optimizer": "sgd", "run_eagerly": True}, "fit": {"epochs": 1, "batch_size": 64}}
    parts = {"student": make_student, "teacher": make_teacher(), "data": arrays(), "metric": "val_accuracy"}
    first, second = (run_once(**parts, method=[term], **settings) for _ in range(2))
    assert first.error is None
    assert first.curve == second.curve
    keras.utils.set_random_seed(0)
    model = DistillModel(make_student(), parts["teacher"], METHODS[method](), evaluate_distillation=False)
    model.compile(**settings["compile"])
    (x, y), _ = arrays()
    by_hand = model.fit(x[order_of(64, 0, 0)], y[order_of(64, 0, 0)], batch_size=64, shuffle=False, verbose=0).history
    assert first.curve[0]["loss"] == pytest.approx(by_hand["loss"][0], rel=1e-5)


def test_the_same_call_goes_on_although_keras_numbers_its_objects(tmp_path: Path) -> None:
    """In one process the second optimizer is "adam_1", and the second adapter "dense_1"."""
    parts = {"student": make_student, "teacher": make_teacher(), "data": arrays(), "metric": "val_accuracy"}
    made: list[str] = []
    for rate in (0.1, 0.1, 0.2):
        adapter = FeatureDistillation("hidden", "hidden", adapter=keras.layers.Dense(8))
        settings = {
            "methods": {"features": [adapter]},
            "compile": {**COMPILE, "optimizer": keras.optimizers.Adam(rate)},
        }
        call = {**parts, **settings, "fit": {"epochs": 1, "batch_size": 64}, "seeds": 1, "folder": tmp_path}
        if rate == 0.2:
            with pytest.raises(ValueError, match="to hold runs of the same settings"):
                compare(**call, progress=made.append)
        else:
            compare(**call, progress=made.append)
    assert sum("seed" in line for line in made) == 3
