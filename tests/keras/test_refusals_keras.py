"""Wrong uses raise an error with a remedy before the first step: one table, one test."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import mlp, table

from keras_distill import (
    DistillationScheduler,
    DistillModel,
    DistillTargets,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
)
from keras_distill.schedules import Linear
from keras_distill.terms.logits import FIT_FOR_LOGITS

X, Y = table(8)


def net(activation: str | None = None, width: int = 8, *, name: str = "student") -> keras.Model:
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(width, "relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, activation, name="scores")(hidden), name=name)


def nested(activation: str) -> keras.Model:
    inputs = keras.Input((6,))
    ends = keras.Sequential([keras.Input((3,)), keras.layers.Softmax(), keras.layers.Activation("linear")])
    return keras.Model(inputs, ends(net(name="inner")(inputs)), name="teacher")


class Stepping(keras.Model):
    """A student with a method of its own that Keras would call."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.logits(inputs)


def with_own(method: str) -> keras.Model:
    kind = type("Own", (Stepping,), {method: lambda self, *args, **kwargs: None})
    return kind()


def with_preprocessor() -> keras.Model:
    student = net()
    object.__setattr__(student, "preprocessor", keras.layers.Rescaling(2.0))
    return student


class Tuple(keras.Model):
    """Returns its features beside its logits, without names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.hidden, self.logits = keras.layers.Dense(5), keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        hidden = self.hidden(inputs)
        return hidden, self.logits(hidden)


def two_heads() -> keras.Model:
    inputs = keras.Input((6,))
    return keras.Model(inputs, [keras.layers.Dense(3, name=name)(inputs) for name in ("cls", "other")])


def frozen() -> keras.Model:
    student = net()
    student.get_layer("hidden").trainable = False
    return student


def fitted(model: DistillModel, *data: Any, loss: Any = None, **settings: Any) -> Any:
    model.compile("sgd", loss, jit_compile=False)
    return model.fit(*data, verbose=0, **settings)


def probabilities() -> Any:
    return np.full((8, 3), 1 / 3, "float32")


def losses_of_keras() -> dict[str, Any]:
    """Keras' losses, a new object of each, by name."""
    made = {}
    for name in dir(keras.losses):
        kind = getattr(keras.losses, name)
        if isinstance(kind, type) and issubclass(kind, keras.losses.Loss) and kind is not keras.losses.Loss:
            try:
                made[name] = kind()
            except TypeError:
                continue
    return made


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "a divergence of Keras between logits": (
        ValueError,
        lambda: DistillModel(net(), net(), LogitsDistillation(keras.losses.KLDivergence())),
        "Received: keras.losses.KLDivergence, which takes the teacher's logits for probabilities or classes",
    ),
    "a function of Keras between logits": (
        ValueError,
        lambda: DistillModel(net(), net(), LogitsDistillation(keras.losses.kl_divergence)),
        "Received: keras.losses.kl_divergence, which takes",
    ),
    "a teacher of probabilities": (
        ValueError,
        lambda: DistillModel(net(), net("softmax")),
        "Expected the teacher's output to be logits, since the loss has from_logits=True. Leave out the last softmax or"
        " sigmoid of the teacher: the other model returns logits.",
    ),
    "a teacher of probabilities, nested": (
        ValueError,
        lambda: DistillModel(net(), nested("softmax")),
        "Expected the teacher's output to be logits",
    ),
    "a student of probabilities": (
        ValueError,
        lambda: DistillModel(net("softmax"), net()),
        "Expected the student's output to be logits",
    ),
    "a student of logits for a loss on probabilities": (
        ValueError,
        lambda: DistillModel(net(), net("softmax"), LogitsDistillation(SoftTargetLoss(from_logits=False))),
        "Expected the student's output to be probabilities, since SoftTargetLoss has from_logits=False.",
    ),
    "a teacher of logits for a loss on probabilities": (
        ValueError,
        lambda: DistillModel(net("softmax"), net(), LogitsDistillation(SoftTargetLoss(from_logits=False))),
        "Expected the teacher's output to be probabilities",
    ),
    "stored probabilities": (
        ValueError,
        lambda: fitted(DistillModel(net()), X, DistillTargets(None, probabilities())),
        "Expected the teacher's outputs in `DistillTargets` to be logits for SoftTargetLoss.",
    ),
    "a term named as an output": (
        ValueError,
        lambda: DistillModel(two_heads(), two_heads(), LogitsDistillation(name="cls")),
        "Expected a name for the term 'cls' that is not an output of the student.",
    ),
    "several tensors without names": (
        ValueError,
        lambda: fitted(DistillModel(Tuple(), Tuple()), X),
        "Expected the student to return one tensor, or several that are named in a dict. Pass"
        " LogitsDistillation(output=<the index of the logits>).",
    ),
    "a preprocessor": (
        ValueError,
        lambda: DistillModel(with_preprocessor(), net()),
        "Expected `student` not to have a preprocessor, which would not be called.",
    ),
    "a frozen student": (
        ValueError,
        lambda: fitted(DistillModel(frozen(), net(), FeatureDistillation("hidden", "hidden")), X),
        "Expected a term, or a loss on labels, that trains the student.",
    ),
    "the temperature of a migrated term": (
        TypeError,
        lambda: LogitsDistillation(temperature=3.0),
        "In keras_distill the temperature belongs to the loss: LogitsDistillation(SoftTargetLoss(temperature=...)).",
    ),
    "the arguments of keras.distillation": (
        TypeError,
        lambda: DistillModel(net(), net(), distillation_losses=[]),
        "The student comes first, unlike in keras.distillation.Distiller(teacher, student).",
    ),
    "the order of keras.distillation": (
        ValueError,
        lambda: DistillModel(mlp(name="my_teacher"), mlp(name="my_student")),
        "Expected DistillModel(student, teacher), the student first.",
    ),
    "a scheduler for a scheduled weight": (
        ValueError,
        lambda: fitted(
            DistillModel(net(), net(), LogitsDistillation(weight=Linear(1.0, 0.5))),
            X,
            callbacks=[DistillationScheduler("weight", lambda epoch: 1.0)],
        ),
        "Expected `weight` to have one schedule.",
    ),
    "a teacher of other inputs": (
        ValueError,
        lambda: DistillModel(net(), keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)])),
        "Expected the teacher 'sequential' to take inputs of shape",
    ),
    "a layer as the teacher": (
        TypeError,
        lambda: DistillModel(net(), keras.layers.Dense(3)),
        "Wrap the layer: keras.Sequential([layer]). Received: a Dense",
    ),
    "one logit for a softmax": (
        ValueError,
        lambda: DistillModel(
            keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]),
            keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]),
        ),
        "For a single logit use BinarySoftTargetLoss()",
    ),
    "a schedule over epochs outside of fit": (
        ValueError,
        lambda: scheduled_on_batch(),
        "Expected the schedule of `logits_weight` to run over steps outside of `fit`.",
    ),
    "class weights beside stored outputs": (
        ValueError,
        lambda: stored_on_batch(),
        "Expected `class_weight` to be None if the targets hold the teacher's outputs.",
    ),
    **{
        f"a student with its own {method}": (
            ValueError,
            lambda method=method: DistillModel(with_own(method), net()),
            f"with a custom `{method}`, which would not be called",
        )
        for method in ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
    },
}


def scheduled_on_batch() -> Any:
    model = DistillModel(net(), net(), LogitsDistillation(weight=Linear(1.0, 0.5)))
    model.compile("sgd", run_eagerly=True)
    return model.train_on_batch(X)


def stored_on_batch() -> Any:
    model = DistillModel(net())
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model.train_on_batch(X, DistillTargets(Y, np.ones((8, 3), "float32")), class_weight={0: 1.0, 1: 2.0, 2: 1.0})


@pytest.mark.filterwarnings("ignore:.*jit_compile")
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_use_is_refused_before_the_first_step(case: str) -> None:
    if case == "a frozen student" and keras.backend.backend() == "torch":
        pytest.skip("shapes are inferred from copies of the inputs on torch, which refuses such a step itself")
    error, act, words = REFUSED[case]
    with pytest.raises(error, match=re.escape(words)):
        act()


def test_a_term_of_keras_distillation_is_refused_by_its_full_name() -> None:
    distillation = pytest.importorskip("keras.distillation")
    with pytest.raises(TypeError, match=re.escape("Received: a keras.distillation.LogitsDistillation")):
        DistillModel(net(), net(), [distillation.LogitsDistillation()])


@pytest.mark.parametrize("name", losses_of_keras())
def test_losses_of_keras_are_accepted_between_logits_only_if_they_are_least_where_both_agree(name: str) -> None:
    """Measured: the loss is smallest at equal logits, and changes with every logit."""
    generator, loss = np.random.default_rng(0), losses_of_keras()[name]
    teacher = 2 * generator.normal(size=(64, 5)).astype("float32")
    moves = 0.01 * generator.normal(size=(8, 64, 5)).astype("float32")
    lower = np.where(teacher < -0.5, teacher - 1, teacher)
    try:
        value, *beside = (float(loss(teacher, teacher + move)) for move in [0 * teacher, *moves, *-moves])
        fits = np.isfinite(value) and min(beside) > value and float(loss(teacher, lower)) > value + 1e-3
    except Exception:  # losses of other shapes or labels fail in many ways, which differ between the backends
        fits = False
    assert bool(fits) == (name in FIT_FOR_LOGITS)


def test_a_loss_of_keras_between_probabilities_is_accepted() -> None:
    model = DistillModel(net("softmax"), net("softmax"), LogitsDistillation(keras.losses.KLDivergence()))
    model.compile("sgd", run_eagerly=True)
    assert model.evaluate(X, verbose=0, return_dict=True)["logits_loss"] >= 0


def test_a_name_of_a_loss_is_accepted_on_outputs_too() -> None:
    model = DistillModel(net(), net(name="teacher"), LogitsDistillation("mse"))
    model.compile("sgd", run_eagerly=True)
    expected = np.square(
        np.subtract(*(network.predict(X, verbose=0) for network in (model.student, model.teacher)))
    ).mean()
    assert model.evaluate(X, verbose=0, return_dict=True)["logits_loss"] == pytest.approx(expected, rel=1e-5)


def test_outputs_between_0_and_1_are_warned_about() -> None:
    model = DistillModel(net())
    model.compile("sgd", jit_compile=False)
    with pytest.warns(UserWarning, match="all lie from 0 to 1, as probabilities do"):
        model.fit(X, DistillTargets(None, np.full((8, 3), 0.4, "float32")), verbose=0)
