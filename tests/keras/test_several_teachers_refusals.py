"""Settings of several teachers that cannot be right are refused in words: one table, one test."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_several import FIT, SOURCE, Situation, X, Y, compiled, mlp, soft, teachers

from keras_distill import (
    BinarySoftTargetLoss,
    DistillationTerm,
    DistillModel,
    DistillTargets,
    DISTLoss,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    QueueSimilarityLoss,
    RelationalLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SoftTargetLoss,
)
from keras_distill.schedules import Linear


class Gap(DistillationTerm):
    def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(ops.square(student.output - teacher.output))


def made(terms: Any = None, kinds: Any = None, **settings: Any) -> Callable[[], Any]:
    return lambda: DistillModel(mlp(7), teachers() if kinds is None else kinds(), terms or soft(), **settings)


def named(route: Any, inputs: Any) -> Callable[[], Any]:
    return lambda: Situation(route=route).value(inputs)


def other_classes() -> list[keras.Model]:
    inputs = keras.Input((6,))
    return [mlp(5), keras.Model(inputs, keras.layers.Dense(4)(inputs))]


def stored() -> None:
    model = compiled(mix="logits")
    model.fit(X, DistillTargets(Y, np.zeros((8, 3), "float32")), **FIT)


def assigned(weights: Any, **settings: Any) -> Callable[[], None]:
    return lambda: setattr(compiled(**settings), "teacher_weights", weights)


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "too few weights": (ValueError, made(teacher_weights=[1.0]), "a weight for each of the 2 teachers. Received: 1"),
    "a negative weight": (ValueError, made(teacher_weights=[1, -1]), "Expected `teacher_weights[1]` to be at least 0"),
    "weights of 0": (ValueError, made(teacher_weights=[0, 0]), "to hold a weight greater than 0. Set the weight"),
    "a number": (TypeError, made(teacher_weights=0.5), "Expected `teacher_weights` to be a list of numbers"),
    "another word": (ValueError, made(teacher_weights="equal"), "Expected `teacher_weights` to be"),
    "another mix": (ValueError, made(mix="mean"), "Expected `mix` to be"),
    "one teacher": (
        ValueError,
        made(kinds=lambda: teachers()[0], mix="logits"),
        "Expected `teacher` to be a list of two or more teachers with `teacher_weights`, `mix` or `route`.",
    ),
    "a mixture for features": (
        ValueError,
        made([soft(), FeatureDistillation("hidden", "hidden")], mix="probabilities"),
        "Expected terms on logits with mix='probabilities'. Pass numbers as teacher_weights and mix=\"losses\", or only"
        " LogitsDistillation. Received: FeatureDistillation 'hidden'",
    ),
    "a mixture for a term of the user's": (ValueError, made(Gap(name="gap"), mix="logits"), "Received: Gap 'gap'"),
    "confidence for features": (
        ValueError,
        made(FeatureDistillation("hidden", "hidden"), teacher_weights="entropy"),
        "Expected terms on logits with teacher_weights='entropy'.",
    ),
    "confidence for a loss over the batch": (
        ValueError,
        made(LogitsDistillation(DISTLoss()), teacher_weights="entropy"),
        "Expected a loss with a value for each example with teacher_weights='entropy'.",
    ),
    "confidence for a function": (
        ValueError,
        made(LogitsDistillation(lambda s, t: ops.mean(s - t)), teacher_weights="entropy"),
        "Received: FunctionLoss in LogitsDistillation 'logits'",
    ),
    "confidence for a sigmoid": (
        ValueError,
        made(LogitsDistillation(BinarySoftTargetLoss()), teacher_weights="entropy"),
        "Received: BinarySoftTargetLoss in LogitsDistillation 'logits'",
    ),
    "confidence for tokens": (
        ValueError,
        made(SequenceDistillation(), teacher_weights="entropy"),
        "Received: SoftTargetLoss in SequenceDistillation 'tokens'",
    ),
    "probabilities for a squared error": (
        ValueError,
        made(LogitsDistillation(LogitMSELoss()), mix="probabilities"),
        "Expected a divergence of probabilities with mix='probabilities'. Use one such as SoftTargetLoss, or"
        " mix='logits'. Received: LogitMSELoss in term 'logits'",
    ),
    "probabilities for standardised logits": (
        ValueError,
        made(LogitsDistillation(SoftTargetLoss(standardize=True)), mix="probabilities"),
        "Expected a divergence of probabilities",
    ),
    "the logits of probabilities": (
        ValueError,
        made(LogitsDistillation(ReverseKLLoss(from_logits=False)), mix="logits"),
        "Use mix='probabilities'.",
    ),
    "other classes in a mixture": (ValueError, made(kinds=other_classes, mix="logits"), "score the same classes"),
    "other classes of the second teacher": (ValueError, made(kinds=other_classes), "score the same classes"),
    "a route and weights": (
        ValueError,
        made(route="source", teacher_weights=[1, 2]),
        "Expected neither `teacher_weights` nor `mix` where a route gives each example one teacher.",
    ),
    "a route and a mixture": (ValueError, made(route="source", mix="logits"), "Leave them out."),
    "a number with a fraction as the route": (TypeError, made(route=0.5), "Expected `route` to be a key or an index"),
    "a route for a term of the user's": (ValueError, made(Gap(name="gap"), route="s"), "terms on logits or features"),
    "a route for a queue": (
        ValueError,
        made(FeatureDistillation("hidden", "hidden", QueueSimilarityLoss(size=4)), route="source"),
        "Expected a loss that keeps nothing of the batch's other examples with a route. Leave `route` out. Received:"
        " QueueSimilarityLoss in term 'hidden'",
    ),
    "a route for relations between adapters": (
        ValueError,
        lambda: Situation(FeatureDistillation("hidden", "hidden", RelationalLoss(), adapter="linear"), route="s").value(
            {"input": X, "s": SOURCE}
        ),
        "Expected a loss with a value for each example with a route between teachers whose features differ.",
    ),
    "inputs without the route": (
        ValueError,
        named("source", {"input": X}),
        "Expected the inputs to hold the route 'source'. Pass the inputs as a dict, with the index of each example's"
        " teacher under this key. Received: the keys ['input']",
    ),
    "an array without the route": (ValueError, named("source", X), "Received: a "),
    "a short list without the route": (ValueError, named(2, [X, SOURCE]), "Expected the inputs to hold the route 2."),
    "a route of fractions": (
        ValueError,
        named(lambda _: np.zeros(8, "float32"), X),
        "Expected `route` to give the index of a teacher for each example, integers of shape (N,). Received: float32",
    ),
    "a route of another length": (ValueError, named(lambda _: SOURCE[:5], X), "Received: int32 of shape (5,)"),
    "stored outputs": (
        ValueError,
        stored,
        "Expected live teachers, or a cache in the list of teachers, with `teacher_weights`, `mix` or `route`.",
    ),
    "weights after equal ones": (ValueError, assigned([1, 2]), "Make a new model. Received: None"),
    "weights of another number": (ValueError, assigned([1.0], teacher_weights=[1, 2]), "to hold 2 numbers"),
    "weights that become 0": (ValueError, assigned([0, 0], teacher_weights=[1, 2]), "a weight greater than 0"),
    "weights beside a schedule": (
        ValueError,
        assigned([1, 2], teacher_weights=[Linear(1.0, 0.0), 1]),
        "Expected `teacher_weights` of numbers from the beginning",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_cannot_be_right_is_refused_in_words(name: str) -> None:
    kind, act, words = REFUSED[name]
    with pytest.raises(kind, match=re.escape(words)):
        act()
