"""Two teachers and a student, for tests of several teachers in Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras_nets import cross_entropy, log_softmax64, table

from keras_distill import DistillModel, DistillStep, LogitsDistillation, SoftTargetLoss

FIT: dict[str, Any] = {"batch_size": 4, "shuffle": False, "verbose": 0}
X, Y = table(8)
HEAT = 2.0
SOURCE = np.array([0, 1, 1, 0, 0, 1, 0, 1], "int32")


def mlp(width: int, name: str = "student") -> keras.Model:
    """Its input has a name, so that a batch may be a dict with the route beside it."""
    inputs = keras.Input((6,), name="input")
    hidden = keras.layers.Dense(width, "relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden), name=name)


def soft() -> LogitsDistillation:
    return LogitsDistillation(SoftTargetLoss(temperature=HEAT))


def teachers(*widths: int) -> list[keras.Model]:
    keras.utils.set_random_seed(11)
    made = [mlp(width, name=f"teacher{number}") for number, width in enumerate(widths or (5, 9))]
    for model in made:  # logits that are far from equal
        model.set_weights([3.0 * weight for weight in model.get_weights()])
    return made


def probabilities(logits: Any, heat: float = 1.0) -> Any:
    return np.exp(log_softmax64(np.asarray(logits, "float64") / heat))


def entropy(logits: Any) -> Any:
    return -(probabilities(logits) * log_softmax64(np.asarray(logits, "float64"))).sum(-1)


class Situation:
    """Two teachers, a student and their logits."""

    def __init__(self, terms: Any = None, **settings: Any) -> None:
        self.teachers = teachers()
        self.student = mlp(7)
        self.step = DistillStep(self.student, self.teachers, terms or soft(), **settings)
        self.z = np.asarray(self.student.predict(X, verbose=0), "float64")
        self.a, self.b = (np.asarray(model.predict(X, verbose=0), "float64") for model in self.teachers)

    def value(self, inputs: Any = None, **arguments: Any) -> float:
        with self.step.watching():
            output = self.student(X, training=False)
        return float(self.step.losses(output, inputs, training=False, **arguments)["distillation_loss"])


def compiled(**settings: Any) -> DistillModel:
    keras.utils.set_random_seed(2)
    model = DistillModel(mlp(7), teachers(), settings.pop("terms", None) or soft(), **settings)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), run_eagerly=True)
    return model
