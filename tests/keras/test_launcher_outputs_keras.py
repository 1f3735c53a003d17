"""The launcher for Keras: the last layer tells whether a model returns logits or probabilities (N12)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_launch import Logs, divergence64, launched
from keras_nets import ce64, log_softmax64, numpy_of, table

from keras_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from keras_distill import KnowledgeDistillationLoss as Knowledge
from keras_distill.launcher.conf import Metric
from keras_distill.launcher.outputs import ends_in_softmax
from keras_distill.launcher.scores import MetricEvaluation


class Written(keras.Model):
    """A model whose call is written by hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, activation="softmax")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)


def sequential(*last: Any) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="relu"), *last])


def functional(*last: Any, several: bool = False) -> keras.Model:
    inputs = keras.Input((6,))
    output = layers.Dense(5, activation="relu")(inputs)
    for layer in last:
        output = layer(output)
    return keras.Model(inputs, [output, output] if several else output)


ENDS: dict[str, tuple[Any, bool | None]] = {
    "logits": (lambda: sequential(layers.Dense(3)), False),
    "an activation": (lambda: sequential(layers.Dense(3, activation="softmax")), True),
    "a layer": (lambda: sequential(layers.Dense(3), layers.Softmax()), True),
    "a layer named Activation": (lambda: sequential(layers.Dense(3), layers.Activation("softmax")), True),
    "a cast behind it": (lambda: sequential(layers.Dense(3, activation="softmax"), layers.Activation("linear")), True),
    "functional logits": (lambda: functional(layers.Dense(3)), False),
    "functional activation": (lambda: functional(layers.Dense(3, activation="softmax")), True),
    "functional cast": (lambda: functional(layers.Dense(3), layers.Softmax(), layers.Activation("linear")), True),
    "functional operation": (lambda: functional(layers.Dense(3), ops.softmax), True),
    "a model inside": (lambda: sequential(functional_of_five(layers.Dense(3), layers.Softmax())), True),
    "sigmoid": (lambda: sequential(layers.Dense(3, activation="sigmoid")), False),
    "several outputs": (lambda: functional(layers.Dense(3), layers.Softmax(), several=True), None),
    "a call by hand": (Written, None),
    "nothing": (keras.Sequential, None),
}


def functional_of_five(*last: Any) -> keras.Model:
    inputs = keras.Input((5,))
    output: Any = inputs
    for layer in last:
        output = layer(output)
    return keras.Model(inputs, output)


@pytest.mark.parametrize("name", ENDS)
def test_the_last_layer_says_what_a_model_returns(name: str) -> None:
    make, expected = ENDS[name]
    assert ends_in_softmax(make()) is expected


@pytest.mark.parametrize("criterion", ["knowledge", "without a teacher", "intermediate", "configured"])
def test_softmax_outputs_are_trained_as_probabilities_without_being_asked(criterion: str) -> None:
    inputs, labels = table()
    student, teacher = (sequential(layers.Dense(3, activation="softmax")) for _ in range(2))
    z_s, z_t = (log_softmax64(np.log(numpy_of(model(inputs)))) for model in (student, teacher))
    task = ce64(z_s, labels).mean()
    kind, expected = {
        "knowledge": (Knowledge(2.0, ["CE", "KL"]), 0.5 * task + 0.5 * divergence64("KL", 2.0, z_s, z_t)),
        "without a teacher": (Knowledge(2.0, ["CE", "KL"], [1.0, 0.0]), task),
        "intermediate": (Intermediate([""], ["MSE"], [0.0], add_origin_loss=True), task),
        "configured": (None, 0.5 * task + 0.5 * divergence64("CE", 1.0, z_s, z_t)),
    }[criterion]
    logs = Logs()
    distiller = launched(criterion=kind, student_model=student, teacher_model=teacher, callbacks=[logs])
    distiller.train_dataloader = [(inputs, labels)]
    distiller.fit()
    np.testing.assert_allclose(logs.epochs[0]["loss"], expected, rtol=2e-5)
    assert kind is None or kind.from_logits is None


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_softmax_on_one_side_alone_is_refused(who: str) -> None:
    logits = "teacher" if who == "student" else "student"
    distiller = launched(**{f"{who}_model": sequential(layers.Dense(3), layers.Softmax())})
    words = f"one kind. Put a keras.layers.Softmax.. behind the {logits}, .* Received: a {who} that ends in a softmax"
    with pytest.raises(ValueError, match=words):
        distiller.fit()
    with pytest.raises(ValueError, match=words):
        distiller.on_train_begin()


def test_a_criterion_with_from_logits_set_is_left_unchanged() -> None:
    student = sequential(layers.Dense(3, activation="softmax"))
    distiller = launched(criterion=Knowledge(from_logits=True), student_model=student)
    with pytest.raises(ValueError, match="student's output to be logits, since the loss has from_logits=True"):
        distiller.fit()


@pytest.mark.parametrize("labels", [np.arange(16) % 2, np.ones((16, 1), "float32")])
@pytest.mark.parametrize("metric", [None, {"topk": 1}, {"Accuracy": {}}, {"F1": {}}])
def test_a_single_score_is_refused_where_classes_are_compared(labels: Any, metric: Any) -> None:
    """The cross entropy would be 0, and every accuracy 1."""
    distiller = launched({"evaluation": {"accuracy": {"metric": metric}}} if metric else None)
    distiller.student_model, distiller.teacher_model = (sequential(layers.Dense(1)) for _ in range(2))
    distiller.student_model.layers[0].name = distiller.teacher_model.layers[0].name = "hidden"
    distiller.criterion = Intermediate(["hidden"], add_origin_loss=metric is None)
    distiller.train_dataloader = distiller.eval_dataloader = (table()[0], labels)
    with pytest.raises(ValueError, match=r"at least 2 classes. (Set `task_loss`|Name a metric).*shape \(16|shape \(8"):
        distiller.fit()


def test_a_threshold_tells_the_classes_of_a_single_score_apart() -> None:
    scores = np.array([[0.9], [0.2], [0.7], [0.4]], "float32")
    labels = np.array([[1], [0], [0], [1]], "float32")
    model = keras.Sequential([keras.Input((1,)), layers.Activation("linear")])
    assert MetricEvaluation((scores, labels), Metric(F1={"threshold": 0.5}))(model) == pytest.approx(0.5)
