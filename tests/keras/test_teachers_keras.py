"""Teachers of every kind: none, several, in another precision, with other inputs, stateful, without XLA."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import cross_entropy, kl64, log_softmax64, mlp, numpy_of, table

from keras_distill import (
    DistillModel,
    DistillStep,
    FeatureDistillation,
    LogitsDistillation,
    SelfDistillation,
    SoftTargetLoss,
    Tap,
)

X, Y = table(8)
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


def models(width: int = 5) -> tuple[keras.Model, keras.Model]:
    keras.utils.set_random_seed(7)
    return mlp(width), mlp(6, name="teacher")


def distilled(terms: Any = None, *, kind: type[DistillModel] = DistillModel) -> Any:
    student, teacher = models()
    model = kind(student, teacher, terms)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy(), run_eagerly=True)
    return model


def both() -> list[Any]:
    return [LogitsDistillation(SoftTargetLoss(temperature=2.0)), FeatureDistillation("hidden", "hidden")]


def exits(width: int = 5) -> keras.Model:
    inputs = keras.Input((6,))
    shallow = keras.layers.Dense(width, "relu", name="shallow")(inputs)
    deep = keras.layers.Dense(width + 2, "relu", name="deep")(shallow)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(deep))


def test_self_distillation_needs_no_teacher_and_moves_the_shallow_layer_alone() -> None:
    model = DistillModel(exits(), None, SelfDistillation("shallow", "deep", weight=0.5))
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    shallow, deep = (numpy_of(model.student.get_layer(name).kernel).copy() for name in ("shallow", "deep"))
    # on JAX a variable that the loss does not reach has a gradient of 0, and Keras has nothing to warn of
    silent = keras.backend.backend() == "jax"
    with (
        contextlib.nullcontext() if silent else pytest.warns(UserWarning, match="Gradients do not exist .*deep/kernel")
    ):
        logs = model.fit(X, epochs=2, validation_data=(X,), **FIT).history
    assert logs["val_shallow_loss"][1] < logs["val_shallow_loss"][0]
    assert "teacher_agreement" not in logs
    assert not np.array_equal(shallow, numpy_of(model.student.get_layer("shallow").kernel))
    np.testing.assert_array_equal(deep, numpy_of(model.student.get_layer("deep").kernel))


def test_the_value_of_self_distillation_is_that_of_the_two_features() -> None:
    student = exits()
    step = DistillStep(student, None, SelfDistillation("shallow", "deep"))
    with step.watching():
        value = float(numpy_of(ops.stop_gradient(step.losses(student(X))["shallow_loss"])))
    shallow, deep = (keras.Model(student.input, student.get_layer(name).output)(X) for name in ("shallow", "deep"))
    [adapter] = step.terms[0].adapters
    assert value == pytest.approx(np.square(numpy_of(adapter(shallow)) - numpy_of(deep)).mean(), rel=1e-5)


def test_several_teachers_are_averaged_term_by_term() -> None:
    student, first = models()
    second = mlp(6, name="other")
    model = DistillModel(student, [first, second], [LogitsDistillation(SoftTargetLoss(temperature=1.0)), *both()[1:]])
    model.compile("sgd", run_eagerly=True)
    logs = model.evaluate(X, verbose=0, return_dict=True)
    z, teachers = numpy_of(student(X)), [numpy_of(teacher(X)) for teacher in (first, second)]
    assert logs["logits_loss"] == pytest.approx(np.mean([kl64(z, t, 1.0).mean() for t in teachers]), rel=1e-4)
    mixed = np.mean([np.exp(log_softmax64(t)) for t in teachers], axis=0)
    assert logs["teacher_agreement"] == pytest.approx((mixed.argmax(-1) == z.argmax(-1)).mean())
    assert model.teacher == [first, second]
    with pytest.raises(ValueError, match="Expected one teacher"):
        model.teacher_targets(X)


def test_another_teacher_that_does_not_fit_is_refused_when_it_is_assigned() -> None:
    model = distilled(both())
    model.teacher = fitting = mlp(6, name="again")
    with pytest.raises(ValueError, match=r"The adapter was made for another teacher: make a new DistillModel\."):
        model.teacher = mlp(9, name="wider")
    assert model.teacher is fitting
    with pytest.raises(ValueError, match="`teacher_layer` to name one layer"):
        model.teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    assert model.teacher is fitting
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


class Precise(keras.layers.Layer):
    """Notes the precision of what it is called with."""

    seen: Any = None

    def call(self, inputs: Any) -> Any:
        Precise.seen = keras.backend.standardize_dtype(inputs.dtype)
        return inputs


@pytest.mark.parametrize("dtype", ["bfloat16", np.float16, "float32"])
def test_the_teacher_computes_in_its_own_precision_and_stays_as_it_is(dtype: Any) -> None:
    keras.config.set_dtype_policy("mixed_float16" if dtype == "float32" else "float32")
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6), Precise(), keras.layers.Dense(3)])
    keras.config.set_dtype_policy("float32")
    policies = [layer.dtype_policy.name for layer in teacher.layers]
    model = DistillModel(mlp(), teacher, teacher_dtype=dtype)
    model.compile("sgd", run_eagerly=True)
    logs = model.evaluate(X, verbose=0, return_dict=True)
    assert Precise.seen == keras.backend.standardize_dtype(dtype)
    assert np.isfinite(logs["logits_loss"])
    assert [layer.dtype_policy.name for layer in teacher.layers] == policies
    assert {weight.dtype for weight in teacher.weights} == {"float32"}
    with pytest.raises(ValueError, match="Expected `teacher_dtype` to be a floating-point precision"):
        DistillModel(mlp(), teacher, teacher_dtype="int8")


class Halved(DistillModel):
    """Its teacher gets half of the student's inputs, or the student's feature."""

    def teacher_inputs(self, x: Any, call: Any) -> Any:
        return 0.5 * x


def test_the_inputs_of_the_teacher_may_be_overridden() -> None:
    model = distilled(kind=Halved)
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    expected = kl64(numpy_of(model.student(X)), numpy_of(model.teacher(0.5 * X))).mean()
    assert logs["logits_loss"] == pytest.approx(expected, rel=1e-4)


def augmenting() -> keras.Model:
    inputs = keras.Input((4, 4, 1))
    flipped = keras.layers.RandomFlip(name="flip")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(flipped)))


class ShownTheSame(DistillModel):
    def teacher_inputs(self, x: Any, call: Any) -> Any:
        return call.feature(Tap("flip"))


def test_augmentation_inside_the_student_is_warned_about_or_shared() -> None:
    teacher = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    with pytest.warns(UserWarning, match="augments its inputs in layer 'flip'"):
        DistillModel(augmenting(), teacher)
    student = augmenting()
    terms = [LogitsDistillation(), SelfDistillation("flip", "flip", weight=0.0, name="seen")]
    model = ShownTheSame(student, teacher, terms)
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    teacher.layers[-1].set_weights(student.layers[-1].get_weights())
    images = np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype("float32")
    assert model.fit(images, **FIT).history["logits_loss"][0] == pytest.approx(0.0, abs=1e-6)


def privileged() -> keras.Model:
    inputs = {name: keras.Input((6,), name=name) for name in ("x", "secret")}
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()(list(inputs.values()))), name="teacher")


@pytest.mark.parametrize("kind", ["dict", "single"])
def test_a_teacher_may_take_more_inputs_than_the_student(kind: str) -> None:
    """Keras itself passes the first entry of a dict, here "secret", to a functional model of one input."""
    inputs = keras.Input((6,), name="x")
    student = keras.Model({"x": inputs} if kind == "dict" else inputs, keras.layers.Dense(3)(inputs))
    teacher = privileged()
    model = DistillModel(student, teacher)
    model.compile("sgd", run_eagerly=True)
    data = {"x": X, "secret": X[::-1].copy()}
    logs = model.evaluate(data, verbose=0, return_dict=True)
    own = numpy_of(student({"x": X} if kind == "dict" else X))
    assert logs["logits_loss"] == pytest.approx(kl64(own, numpy_of(teacher(data))).mean(), rel=1e-4)


def test_a_stateful_teacher_stays_as_it_is() -> None:
    def network(name: str, stateful: bool) -> keras.Model:
        inputs = keras.Input(batch_shape=(8, 3, 2))
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GRU(4, stateful=stateful)(inputs)), name=name)

    teacher = network("teacher", True)
    before = [numpy_of(variable).copy() for variable in teacher.variables]
    model = DistillModel(network("student", False), teacher)
    model.compile("sgd", jit_compile=False)
    model.fit(np.ones((8, 3, 2), "float32"), **FIT)
    for old, variable in zip(before, teacher.variables, strict=True):
        np.testing.assert_array_equal(old, numpy_of(variable))


class WithoutXla(keras.layers.Layer):
    """As layers of text and of random images say of themselves."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.supports_jit = False

    def call(self, inputs: Any) -> Any:
        return inputs


@pytest.mark.tensorflow
def test_a_teacher_that_xla_cannot_compile_is_run_without_it() -> None:
    teacher = keras.Sequential([keras.Input((6,)), WithoutXla(), keras.layers.Dense(3)])
    model = DistillModel(mlp(), teacher)
    model.compile("sgd", jit_compile=True)
    with pytest.warns(UserWarning, match="The teacher does not support `jit_compile=True`"):
        model.fit(X, **FIT)
    assert model.jit_compile is False


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", [True, False])
def test_a_teacher_of_one_row_is_never_broadcast_over_the_batch(jit: bool) -> None:
    class OneRow(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs[:1]

        def compute_output_shape(self, shape: Any) -> Any:
            return (None, *shape[1:])

    inputs = keras.Input((6,))
    teacher = keras.Model(inputs, keras.layers.Dense(3)(OneRow()(inputs)))
    model = DistillModel(mlp(), teacher)
    model.compile("sgd", jit_compile=jit)
    with pytest.raises(Exception, match=r"the same number of examples|[Rr]eshape"):
        model.fit(X, **FIT)


def test_two_adapters_of_the_same_name_and_weights_train_alike() -> None:
    """On torch, Keras cleared the gradient of only one of two weights that share a path."""
    terms = [FeatureDistillation("hidden", "hidden", name=name) for name in ("first", "second")]
    model = distilled(terms)
    first, second = (term.adapters[0] for term in model.terms)
    second.set_weights(first.get_weights())
    model.fit(X, Y, epochs=3, **FIT)
    for own, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(own, other)
