"""Every feature trained on the backend that KERAS_BACKEND names: `python keras_backend.py FILE`."""

from __future__ import annotations

import json
import sys
from typing import Any

import keras
from pairs.keras_teachers import BATCH, EPOCHS, FEATURES


def main(path: str) -> None:
    """Write the students' weights, or the words of errors."""
    report: dict[str, Any] = {"backend": keras.backend.backend()}
    for name, feature in FEATURES.items():
        keras.backend.clear_session()
        try:
            model = feature.model(jit_compile=False)
            model.fit(feature.x, feature.targets(model), BATCH, EPOCHS, verbose=0, shuffle=False)
        except ValueError as error:
            report[name] = str(error)
            continue
        report[name] = [weights.tolist() for weights in model.student.get_weights()]
    with open(path, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(sys.argv[1])
