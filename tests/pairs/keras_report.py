"""The weights of every feature's student after a training in a process of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
from pairs.keras_teachers import BATCH, EPOCHS, FEATURES


def write_report(path: str, scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext) -> None:
    """Write the backend, and for each feature the students' weights or the words of its error.

    Args:
        path: The file, in JSON.
        scope: A context in which models are made.
    """
    report: dict[str, Any] = {"backend": keras.backend.backend()}
    for name, feature in FEATURES.items():
        keras.backend.clear_session()
        try:
            with scope():
                model = feature.model(jit_compile=False)
            model.fit(feature.x, feature.targets(model), BATCH, EPOCHS, verbose=0, shuffle=False)
        except ValueError as error:
            report[name] = str(error)
            continue
        report[name] = [weights.tolist() for weights in model.student.get_weights()]
    with open(path, "w") as file:
        json.dump(report, file)
