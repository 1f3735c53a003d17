"""How Keras terms call the teacher's head, and uses of it that are refused."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_dense_nets import (
    FROM_HEAD,
    IMAGES,
    INTO_HEAD,
    SCORES,
    as_double,
    distilled,
    head_by_hand,
    maps_of,
    mean_of_squares,
    net,
    scores_by_hand,
    value,
)

import keras_distill
import lightning_distill
from keras_distill import (
    CallableTeacher,
    CrossHeadDistillation,
    DistillModel,
    FocalGlobalLoss,
    SoftTargetLoss,
    SolutionFlowLoss,
    Tap,
)


@keras.saving.register_keras_serializable(package="dense")
class OneHead(keras.layers.Layer):
    """One map of scores from two maps in one of several forms."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = keras.layers.Conv2D(4, 1)
        self.scores.build((None, None, None, width))

    def build(self, *shapes: Any, **named: Any) -> None:
        self.built = True

    def call(self, fine: Any, coarse: Any = None, scale: float = 1.0) -> Any:
        if isinstance(fine, dict):
            fine, coarse = fine["b"], fine["a"]
        elif coarse is None:
            fine, coarse = fine
        small = self.scores(ops.tanh(coarse))
        return scale * (self.scores(fine) + ops.repeat(ops.repeat(small, 2, axis=1), 2, axis=2))


class Two(keras.Model):
    """A subclassed model whose head takes two maps."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__(name=f"two{width}")
        self.fine, self.coarse = (keras.layers.Conv2D(width, 3, stride, "same") for stride in (1, 2))
        self.head, self.form = OneHead(width, name="head"), form

    def call(self, images: Any) -> Any:
        fine, coarse = self.fine(images), self.coarse(images)
        if self.form == "arguments":
            return self.head(fine, coarse)
        if self.form == "keywords":
            return self.head(coarse=coarse, fine=fine, scale=3.0)
        if self.form == "mixed":
            return self.head(fine, coarse=coarse, scale=2.0)
        forms = {"tuple": (fine, coarse), "list": [fine, coarse], "dict": {"b": fine, "a": coarse}}
        return self.head(forms[self.form])


@pytest.mark.parametrize("form", ["arguments", "keywords", "mixed", "tuple", "list", "dict"])
def test_the_teacher_s_head_is_called_as_in_the_teacher(form: str) -> None:
    keras.utils.set_random_seed(0)
    student, teacher = Two(3, form), Two(5, form)
    for model in (student, teacher):
        model(IMAGES)

    total, term = value(CrossHeadDistillation(INTO_HEAD, "head", "mse"), student, teacher)

    adapters = term.adapters[::-1] if form in ("keywords", "dict") else term.adapters  # by name: coarse, fine; a, b
    maps = [adapter(layer(IMAGES)) for adapter, layer in zip(adapters, (student.fine, student.coarse), strict=True)]
    scale = {"keywords": 3.0, "mixed": 2.0}.get(form, 1.0)
    crossed = as_double(teacher.head(*maps, scale=scale))
    assert total == pytest.approx(mean_of_squares(crossed, as_double(teacher(IMAGES))), rel=1e-4)


def test_maps_of_other_sizes_make_predictions_to_which_the_teacher_s_are_resized() -> None:
    student, teacher = net(3, 1), net(3, 2)
    term = CrossHeadDistillation("neck/level1", Tap("head/scores", call=0), "mse")

    total, _ = value(term, student, teacher)

    last = [as_double(weight) for weight in teacher.get_layer("head").scores.weights]
    target = head_by_hand(teacher.get_layer("head"), maps_of(teacher)[0]).reshape(4, 4, 2, 4, 2, 4).mean(axis=(2, 4))
    assert total == pytest.approx(mean_of_squares(scores_by_hand(maps_of(student)[1], *last), target), rel=1e-4)


def test_both_halves_have_the_same_settings_with_the_same_defaults() -> None:
    """Weights of examples are Keras' alone."""
    keras_only = {"use_sample_weight", "kwargs"}
    for name in ("CrossHeadDistillation", "FeatureDistillation"):
        own, other = (inspect.signature(getattr(half, name)).parameters for half in (keras_distill, lightning_distill))

        assert set(own) - keras_only == set(other) - {"index"}
        for shared in set(own) & set(other):
            assert (own[shared].default, own[shared].kind) == (other[shared].default, other[shared].kind), shared


# Wrong settings -------------------------------------------------------------------------------------------------------


def test_stored_outputs_cannot_be_called_as_a_head() -> None:
    model = distilled(CrossHeadDistillation(INTO_HEAD, FROM_HEAD), run_eagerly=True)
    targets = model.teacher_targets(IMAGES, SCORES)

    with pytest.raises(ValueError, match=r"a live teacher with a layer 'head' for term 'cross_head', which calls it"):
        model.fit(IMAGES, targets, 4, 1, verbose=0)

    without = DistillModel(net(3, 1), None, CrossHeadDistillation(INTO_HEAD, FROM_HEAD))
    without.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"which calls it\. Pass the model as .* Received: stored outputs alone"):
        without.fit(IMAGES, targets, 4, 1, verbose=0)


def test_a_function_has_no_head() -> None:
    teacher = CallableTeacher(lambda images: np.zeros((len(images), 8, 8, 4), "float32"), (8, 8, 4))

    with pytest.raises(ValueError, match=r"`teacher_layer` to name one layer of the teacher"):
        DistillModel(net(3, 1), teacher, CrossHeadDistillation(INTO_HEAD, FROM_HEAD))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            (Tap("neck/level0"), FROM_HEAD),
            r"Expected student layer 'neck/level0' to give what teacher layer 'head' takes, \[0, 1\]\. Tap what goes"
            r" into the student's own head: Tap\(<head>, output='\*', where='input'\)\. Received: \[None\]",
        ),
        (
            (Tap("neck", output="*"), FROM_HEAD),
            r"to give what teacher layer 'head' takes, \[0, 1\]\. .* Received: \['coarse', 'fine'\]",
        ),
        ((INTO_HEAD, "hed"), r"`teacher_layer` to name one layer of the teacher 'net2'\. Closest.*'head'"),
    ],
)
def test_features_that_do_not_fit_the_head_are_refused_when_the_model_is_made(layers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillModel(net(3, 1), net(5, 2), CrossHeadDistillation(*layers))


def test_features_of_another_number_of_channels_need_an_adapter() -> None:
    term = CrossHeadDistillation(INTO_HEAD, FROM_HEAD, adapter=None)

    with pytest.raises(ValueError, match=r"student feature 'head' and teacher feature 'head' to have equal shapes\."):
        DistillModel(net(3, 1), net(5, 2), term)


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (
            ("a", Tap("head", where="input")),
            {},
            r"`teacher_layer` to be a part of the teacher that makes predictions\.",
        ),
        (("a", ""), {}, r"`teacher_layer` to be a part of the teacher that makes predictions\. .* Tap\(layer=''"),
        (("a", "b"), {"adapter": "pool"}, r"`adapter` to keep the positions, which the teacher's head reads\. Pass ad"),
        (("a", "b", FocalGlobalLoss()), {"boxes": 1}, r"`loss` to compare two predictions without parameters"),
        (
            (["a", "b"], ["a", "b"], SolutionFlowLoss()),
            {},
            r"of its own\. Use a FeatureDistillation\. .* SolutionFlowL",
        ),
        (
            (["a", "b"], "c"),
            {},
            r"`student_layer` and `teacher_layer` to name the same number of layers, at least one\.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_when_the_term_is_made(arguments: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CrossHeadDistillation(*arguments, **settings)


def test_predictions_with_channels_first_are_named() -> None:
    def model(seed: int, layout: str | None) -> tuple[keras.Model, Any]:
        keras.utils.set_random_seed(seed)
        images = keras.Input((8, 8, 3))
        maps = keras.layers.Conv2D(4, 1, name="maps")(images)
        inputs = keras.Input((8, 8, 4))
        turned = keras.layers.Permute((3, 1, 2))(keras.layers.Conv2D(2, 1)(inputs))
        last = keras.layers.AveragePooling2D(1, data_format="channels_first") if layout else keras.layers.Identity()
        head = keras.Model(inputs, last(turned), name="head")
        return keras.Model(images, keras.layers.Flatten()(head(maps)), name=f"model{seed}"), head

    (student, _), (teacher, head) = model(1, "first"), model(2, "first")
    x = IMAGES[:, :8, :8]
    with pytest.raises(ValueError, match=r"axes of teacher layer 'head' to be named\. Pass Tap\('head', layout='chan"):
        value(CrossHeadDistillation("maps", "head", "mse"), student, teacher, x=x)

    named = CrossHeadDistillation("maps", Tap("head", layout="channels_first"), SoftTargetLoss(1.0))
    total, _ = value(named, student, teacher, x=x)

    logits = [np.moveaxis(as_double(head(model.get_layer("maps")(x))), 1, -1) for model in (student, teacher)]
    logs = [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in logits]
    assert total == pytest.approx(float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1).mean()), rel=1e-4)
