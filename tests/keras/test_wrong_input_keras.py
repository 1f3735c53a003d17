"""Wrong input: an error in Keras' form (what was expected, how to mend it, what was received) before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras_nets import cross_entropy, mlp, numpy_of, structured, table

from keras_distill import (
    DecoupledKDLoss,
    DistillationScheduler,
    DistillModel,
    DistillTargets,
    FeatureDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    Tap,
)

Make = Callable[[], Any]


def student() -> keras.Model:
    return mlp(8, name="student")


def teacher(width: int = 12) -> keras.Model:
    return mlp(width, name="teacher")


def classes(number: int) -> keras.Model:
    layers = [keras.Input((6,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(number)]
    return keras.Sequential(layers, name="others")


def tokens() -> keras.Model:
    layers = [keras.layers.Reshape((2, 3), name="hidden"), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers], name="tokens")


def two_outputs(name: str) -> keras.Model:
    inputs = keras.Input((6,))
    outputs = [keras.layers.Dense(3, name="a")(inputs), keras.layers.Dense(2, name="b")(inputs)]
    return keras.Model(inputs, outputs, name=name)


def itself() -> Any:
    model = student()
    return DistillModel(model, model)


def blocks(name: str) -> keras.Model:
    """Two layers are called "dense"."""
    inputs = outputs = keras.Input((6,))
    for block in ("first", "second"):
        inner = keras.Input((6,))
        outputs = keras.Model(inner, keras.layers.Dense(6, name="dense")(inner), name=block)(outputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(outputs), name=name)


def feature(*layers: Any, **settings: Any) -> Make:
    return lambda: DistillModel(student(), teacher(), FeatureDistillation(*layers, **settings))


MODELS: dict[str, tuple[type[Exception], Make, str]] = {
    "unknown student layer": (
        ValueError,
        feature("hiden", "hidden"),
        "Expected `student_layer` to name one layer of the student 'student'. Closest: 'hidden'. Received: 'hiden'",
    ),
    "unknown teacher layer": (
        ValueError,
        feature("hidden", "hidde"),
        "Expected `teacher_layer` to name one layer of the teacher 'teacher'. Closest: 'hidden'. Received: 'hidde'",
    ),
    "ambiguous layer": (
        ValueError,
        lambda: DistillModel(blocks("student"), teacher(), FeatureDistillation("dense", "hidden")),
        "Expected `student_layer` to name one layer of the student 'student'. Pass one of 'first/dense',"
        " 'second/dense'. Received: 'dense', the name of several layers",
    ),
    "features of other widths": (
        ValueError,
        feature("hidden", "hidden", adapter=None),
        "Expected student feature 'hidden' and teacher feature 'hidden' to have equal shapes. Pass adapter=\"auto\"."
        " Received: (None, 8) and (None, 12)",
    ),
    "a width of one": (
        ValueError,
        lambda: DistillModel(mlp(1), teacher(), FeatureDistillation("hidden", "hidden", adapter=None)),
        "Expected student feature 'hidden' and teacher feature 'hidden' to have equal shapes. Pass adapter=\"auto\"."
        " Received: (None, 1) and (None, 12)",
    ),
    "an adapter of another width": (
        ValueError,
        feature("hidden", "hidden", adapter=keras.layers.Dense(5)),
        "Expected student feature 'hidden' and teacher feature 'hidden' to have equal shapes. Pass an adapter that"
        " makes them equal. Received: (None, 5) and (None, 12)",
    ),
    "features of other ranks": (
        ValueError,
        lambda: DistillModel(student(), tokens(), FeatureDistillation("hidden", "hidden")),
        "Expected the features of student layer 'hidden' and its teacher layer to have the same number of dimensions,"
        ' 2 or more. Pass adapter="pool", which compares the means over the positions, or name the pooling layer that'
        " follows, or a layer of the other model that returns positions. Received: (None, 8) and (None, 2, 3)",
    ),
    "other classes": (
        ValueError,
        lambda: DistillModel(student(), classes(5)),
        "Expected `student_logits` and `teacher_logits` to have equal shapes. Both models must score the same classes."
        " Received: (None, 3) and (None, 5)",
    ),
    "one class": (
        ValueError,
        lambda: DistillModel(student(), classes(1)),
        "Expected `student_logits` and `teacher_logits` to have equal shapes. Both models must score the same classes."
        " Received: (None, 3) and (None, 1)",
    ),
    "the student as its teacher": (
        ValueError,
        itself,
        "Expected `teacher` to be another model than `student`. Pass a model of its own, such as a copy made by"
        " keras.models.clone_model, or SelfTeacher(student). Received: the same model",
    ),
    "a teacher that is not a model": (
        TypeError,
        lambda: DistillModel(student(), "teacher"),
        "Expected `teacher` to be a keras.Model or None. Load a file with keras.models.load_model. Received: a str",
    ),
    "a student that is not a model": (
        TypeError,
        lambda: DistillModel(lambda x: x, teacher()),
        "Expected `student` to be a keras.Model. Received: a function",
    ),
    "a loss for a term": (
        TypeError,
        lambda: DistillModel(student(), teacher(), SoftTargetLoss()),
        "Expected `terms[0]` to be a term. Wrap a loss: LogitsDistillation(loss) or FeatureDistillation(layer, layer,"
        " loss). Received: a SoftTargetLoss",
    ),
    "no terms": (
        ValueError,
        lambda: DistillModel(student(), teacher(), []),
        "Expected `terms` to hold at least one term. Pass None for logits alone. Received: terms=[]",
    ),
    "a name twice": (
        ValueError,
        lambda: DistillModel(student(), teacher(), [LogitsDistillation(), LogitsDistillation()]),
        "Expected `terms` to have distinct names. Pass name=... to one. Received: 'logits' twice",
    ),
    "a negative task weight": (
        ValueError,
        lambda: DistillModel(student(), teacher(), task_weight=-0.1),
        "Expected `task_weight` to be at least 0. Received: task_weight=-0.1",
    ),
    "another structure": (
        ValueError,
        lambda: DistillModel(two_outputs("student"), teacher()),
        "Expected both models to have the same number of outputs. Pass output=... Received: 2 and 1",
    ),
    "an unknown output": (
        ValueError,
        lambda: DistillModel(two_outputs("student"), two_outputs("teacher"), LogitsDistillation(output="c")),
        "Expected `output` to pick one tensor of the student's output. Pass output=... Received: output='c', with"
        " tensors of shapes [(None, 3), (None, 2)]",
    ),
    "an output that a layer does not have": (
        ValueError,
        feature(Tap("hidden", output=3), "hidden"),
        "Expected `output` to pick one tensor of the output of student layer 'hidden'. Pass output=... Received:"
        " output=3, with tensors of shapes (None, 8)",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_work_is_refused_when_it_is_made(name: str) -> None:
    """K14, K29, and all other errors that are known before training."""
    kind, make, words = MODELS[name]
    with pytest.raises(kind) as raised:
        make()
    assert str(raised.value) == words


SETTINGS: dict[str, tuple[type[Exception], Make, str]] = {
    **{
        f"weight={value!r}": (
            kind,
            lambda value=value: LogitsDistillation(weight=value),
            f"{words}. Received: weight={value!r}",
        )
        for value, kind, words in (
            (-1.0, ValueError, "Expected `weight` to be at least 0"),
            (float("nan"), ValueError, "Expected `weight` to be finite"),
            (float("inf"), ValueError, "Expected `weight` to be finite"),
            ("1", TypeError, "Expected `weight` to be an int or a float. The only word is 'balanced'"),
            (True, TypeError, "Expected `weight` to be an int or a float"),
        )
    },
    **{
        f"name={name!r}": (
            ValueError,
            lambda name=name: LogitsDistillation(name=name),
            f"{words}. Received: name={name!r}",
        )
        for name, words in (
            ("", "Expected `name` to be neither empty, 'task' nor 'distillation'"),
            ("task", "Expected `name` to be neither empty, 'task' nor 'distillation'"),
            ("a/b", "Expected `name` to hold neither '/' nor '.'. Use '_'"),
        )
    },
    "temperature": (
        ValueError,
        lambda: SoftTargetLoss(temperature=0.0),
        "Expected `temperature` to be greater than 0. Received: temperature=0.0",
    ),
    "distance": (
        ValueError,
        lambda: FeatureDistillation("hidden", "hidden", "mze"),
        "Expected `kind` to be one of 'mse', 'l1', 'smooth_l1', 'cosine', 'kl'. Closest: 'mse'. Received: kind='mze'",
    ),
    "class of a loss": (
        TypeError,
        lambda: LogitsDistillation(SoftTargetLoss),
        "Expected `loss` to be a loss object or a function. Pass an instance: SoftTargetLoss(...). Received: the class"
        " SoftTargetLoss",
    ),
    "adapter": (
        ValueError,
        lambda: FeatureDistillation("hidden", "hidden", adapter="conv"),
        "Expected `adapter` to be one of 'auto', 'pool', 'linear', 'conv1x1'. Closest: 'conv1x1'."
        " Received: adapter='conv'",
    ),
    "pairs": (
        ValueError,
        lambda: FeatureDistillation(["a", "b"], ["c"]),
        "Expected `student_layer` and `teacher_layer` to name the same number of layers, at least one. Pair them."
        " Received: 2 and 1",
    ),
    "scheduled parameter": (
        ValueError,
        lambda: DistillationScheduler("wight", lambda epoch: 1.0),
        "Expected `parameter` to be one of 'weight', 'temperature', 'task_weight', 'decay'. Closest: 'weight',"
        " 'task_weight'. Received: parameter='wight'",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_meaningless_setting_is_refused_in_the_constructor(name: str) -> None:
    kind, make, words = SETTINGS[name]
    with pytest.raises(kind) as raised:
        make()
    assert str(raised.value) == words


INPUTS, LABELS = table(16)
FITS: dict[str, tuple[Make, Any, dict[str, Any], str]] = {
    "no teacher": (
        lambda: DistillModel(student()),
        LABELS,
        {},
        "Expected a teacher to learn from. Pass teacher=..., set `model.teacher`, or train on DistillTargets(labels,"
        " teacher). Received: teacher=None",
    ),
    "targets without the feature": (
        lambda: DistillModel(student(), None, FeatureDistillation("hidden", "hidden")),
        DistillTargets(LABELS, np.zeros((16, 3), "float32")),
        {},
        "Expected teacher layer 'hidden' to run in a forward pass. Name a layer that this forward pass runs, or give"
        " its feature in `DistillTargets`. If it runs inside a `tf.function` or a wrapper, tap the layer that contains"
        " it. Received: no call of it",
    ),
    "targets of other classes": (
        lambda: DistillModel(student()),
        DistillTargets(LABELS, np.zeros((16, 5), "float32")),
        {},
        "Expected `student_logits` and `teacher_logits` to have equal shapes. Both models must score the same classes."
        " Received: (8, 3) and (8, 5)",
    ),
    "no labels for a loss on them": (
        lambda: DistillModel(student(), teacher(), LogitsDistillation(DecoupledKDLoss())),
        None,
        {},
        "Expected `y_true` to be the pair (teacher_logits, labels). DecoupledKDLoss needs the batch's labels; a term of"
        " DistillModel passes them. Received: a pair without labels",
    ),
    "a schedule for no term": (
        lambda: DistillModel(student(), teacher()),
        LABELS,
        {"callbacks": [DistillationScheduler("weight", lambda epoch: 1.0, term="nope")]},
        "Expected `term` to name the one term whose weight is scheduled. Received: term='nope', of the"
        " terms ['logits']",
    ),
    "a schedule without distillation": (
        student,
        LABELS,
        {"callbacks": [DistillationScheduler("task_weight", lambda epoch: 1.0)]},
        "Expected the model to be a DistillModel. Received: a Functional",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.not_jax if name == "no teacher" else ()) for name in FITS]
)
def test_data_that_do_not_fit_raise_before_the_first_step(name: str) -> None:
    """Nothing has trained by then, and the student is left clean."""
    make, targets, settings, words = FITS[name]
    model = make()
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    before = [numpy_of(weight) for weight in model.trainable_weights]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the words are compared below, whole
        model.fit(INPUTS, targets, batch_size=8, verbose=0, **settings)
    assert words in str(raised.value)
    assert int(model.optimizer.iterations) == 0
    assert all(np.array_equal(a, numpy_of(b)) for a, b in zip(before, model.trainable_weights, strict=True))
    for layer in getattr(model, "student", model).layers:
        assert "call" not in layer.__dict__


@pytest.mark.parametrize("kind", ["unbuilt_sequential", "subclassed"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_without_known_inputs_is_checked_at_its_first_batch(kind: str, who: str) -> None:
    """K14: the same words, and nothing trained."""
    unknown = structured(kind, 8, name=who)
    models = (unknown, teacher()) if who == "student" else (student(), unknown)
    terms = [FeatureDistillation("hidden", "hidden", adapter=None, name="feature")]
    if who == "teacher":
        models = (mlp(7), unknown)
    model = DistillModel(*models, terms)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    with pytest.raises(
        ValueError, match=r"^Expected student feature 'hidden' and teacher feature 'hidden' to have equal"
    ):
        model.fit(INPUTS, LABELS, batch_size=8, verbose=0)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.not_jax
def test_training_continues_after_an_error() -> None:
    """Nothing of the failed attempt is in the way."""
    model = DistillModel(student())
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    with pytest.raises(ValueError, match="Expected a teacher to learn from"):
        model.fit(INPUTS, LABELS, batch_size=8, verbose=0)
    model.teacher = teacher()
    assert len(model.fit(INPUTS, LABELS, batch_size=8, epochs=2, verbose=0).history["loss"]) == 2
