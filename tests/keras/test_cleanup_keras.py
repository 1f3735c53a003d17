"""K10: what a run leaves behind."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import ops

from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation
from keras_distill.recording import recorder

# every structure in a graph, and two of them without one
WAYS = [*((kind, False) for kind in nets.STRUCTURES), ("functional", True), ("subclassed", True)]
STEP = {"batch_size": 8, "verbose": 0, "shuffle": False}


def pair(kind: str, *, dropout: float = 0.0) -> tuple[keras.Model, keras.Model]:
    """A student of a structure and a larger teacher of the same."""
    return nets.structured(kind, 8, dropout=dropout), nets.structured(kind, 12, dropout=dropout, name="teacher")


def compiled(kind: str, *, dropout: float = 0.0, rate: float = 0.1, run_eagerly: bool = False) -> DistillModel:
    student, teacher = pair(kind, dropout=dropout)
    model = DistillModel(student, teacher, [LogitsDistillation(), FeatureDistillation(path(kind), path(kind))])
    model.compile(keras.optimizers.SGD(rate), nets.cross_entropy(), metrics=["accuracy"], run_eagerly=run_eagerly)
    return model


def path(kind: str, layer: str = "hidden") -> str:
    return layer if kind not in ("subclassed", "built_subclassed") or layer != "hidden" else "chain.1"


def layer_of(model: keras.Model, name: str) -> Any:
    """A layer at any depth."""
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def counts(model: DistillModel) -> tuple[float, float]:
    """How often the student and the teacher have run since the last time, and the counters set back."""
    counters = [layer_of(network, "counter").calls for network in (model.student, model.teacher)]
    seen = tuple(float(counter.value) for counter in counters)
    for counter in counters:
        counter.assign(0.0)
    return seen


ORIGINAL = keras.layers.Layer.__call__


def traces(*models: keras.Model) -> list[str]:
    """Remains of recording on the layers or on their class: names in instance dictionaries, another `__call__`."""
    left = [] if keras.layers.Layer.__call__ is ORIGINAL else ["Layer.__call__"]
    for model in models:
        for layer in model._flatten_layers():
            names = {"call", "quantized_call", "rematerialized_call"} & set(layer.__dict__)
            left += [f"{layer.name}.{name}" for name in names]
    return left


def records() -> int:
    """How many records of forward passes there are."""
    gc.collect()
    return sum(isinstance(kept, recorder.Record) for kept in gc.get_objects())


class Fails(keras.layers.Layer):
    """The identity, which can be set to fail."""

    fail = False

    def call(self, inputs: Any) -> Any:
        if self.fail and not isinstance(inputs, keras.KerasTensor):
            raise RuntimeError("this layer fails")
        return inputs


class TestK10:
    @pytest.mark.parametrize(("kind", "run_eagerly"), WAYS)
    def test_no_wrapper_is_left_after_fit(self, kind, run_eagerly):
        """K10: after the model was made, fit, evaluate and predict each layer has the method of its class."""
        x, y = nets.table(16)
        model = compiled(kind, run_eagerly=run_eagerly)
        assert traces(model.student, model.teacher, model) == []
        model.fit(x, y, validation_data=(x, y), **STEP)
        assert traces(model.student, model.teacher, model) == []

    @pytest.mark.parametrize("run_eagerly", [False, True])
    @pytest.mark.parametrize("who", ["student", "teacher", "loss", "callback"])
    def test_no_wrapper_is_left_after_an_exception(self, who, run_eagerly):
        """K10: wherever a step fails; and the next fit works."""

        def net(width: int, name: str) -> tuple[keras.Model, Fails]:
            fails = Fails()
            hidden = keras.layers.Dense(width, name="hidden")
            return nets.chained([hidden, fails, keras.layers.Dense(3, name="logits")], name), fails

        def explode(y_true: Any, y_pred: Any) -> Any:
            if switch.fail:
                raise RuntimeError("this layer fails")
            return ops.mean(ops.square(y_pred), axis=-1)

        class Interrupt(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                if switch.fail:
                    raise RuntimeError("this layer fails")

        (student, student_switch), (teacher, teacher_switch) = net(8, "student"), net(12, "teacher")
        switch = {"student": student_switch, "teacher": teacher_switch}.get(who) or Fails()
        model = DistillModel(student, teacher, [LogitsDistillation(), FeatureDistillation("hidden", "hidden")])
        model.compile(keras.optimizers.SGD(0.1), explode, run_eagerly=run_eagerly)
        switch.fail = True
        x, y = nets.table(16)
        with pytest.raises(RuntimeError, match="this layer fails"):
            model.fit(x, y, callbacks=[Interrupt()] if who == "callback" else [], **STEP)
        assert traces(student, teacher, model) == []
        switch.fail = False
        history = model.fit(x, y, callbacks=[Interrupt()], **STEP).history
        assert np.isfinite(history["loss"]).all()
        assert traces(student, teacher, model) == []

    @pytest.mark.parametrize("fail", [False, True])
    def test_no_tensor_is_kept_when_a_step_has_ended(self, fail):
        """K10: what the layers have reported goes with the step; it would fill the memory in an eager training."""
        x, y = nets.table(16)
        fails = Fails()
        student = nets.chained([keras.layers.Dense(8, name="hidden"), fails, keras.layers.Dense(3)], "student")
        model = DistillModel(student, nets.mlp(), FeatureDistillation("hidden", "hidden"))
        model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy(), run_eagerly=True)
        before = records()
        model.fit(x, y, **STEP)
        fails.fail = fail
        with pytest.raises(RuntimeError) if fail else contextlib.nullcontext():
            model.fit(x, y, **STEP)
        assert recorder._THREAD.open == ()
        assert records() <= before  # graphs of other tests may hold some

    def test_a_call_of_the_users_own_on_an_instance_stays(self):
        """K10: a method that the user has replaced on a layer is used and is still there."""
        x, _y = nets.table(16)
        student, teacher = nets.mlp(), nets.mlp(8)
        hidden = student.get_layer("hidden")

        def own(inputs: Any, training: bool | None = None) -> Any:
            return ops.zeros((ops.shape(inputs)[0], 8)) * ops.sum(hidden.kernel)

        object.__setattr__(hidden, "call", own)
        target = keras.Model(teacher.input, teacher.get_layer("hidden").output).predict(x, verbose=0)
        model = DistillModel(student, teacher, [FeatureDistillation("hidden", "hidden"), LogitsDistillation()])
        model.compile(keras.optimizers.SGD(0.0))
        logs = model.evaluate(x, verbose=0, return_dict=True)
        np.testing.assert_allclose(logs["hidden_loss"], (target.astype("float64") ** 2).mean(), rtol=1e-4)
        assert hidden.__dict__["call"] is own

    @pytest.mark.parametrize("shared", ["nothing", pytest.param("teacher", marks=pytest.mark.not_jax)])
    @pytest.mark.parametrize("run_eagerly", [False, True])
    def test_two_models_train_in_two_threads(self, run_eagerly, shared):
        """K10: side by side, even with one teacher for both, each gets the weights that it gets alone."""
        x, y = nets.table(16)

        def made(seed: int, teacher: keras.Model) -> DistillModel:
            keras.utils.set_random_seed(seed)
            terms = [LogitsDistillation(), FeatureDistillation("hidden", "hidden", weight=3.0)]
            model = DistillModel(nets.mlp(), teacher, terms)
            model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy(), run_eagerly=run_eagerly)
            return model

        def teachers() -> list[keras.Model]:
            keras.utils.set_random_seed(9)
            first = nets.mlp(12)
            return [first, first if shared == "teacher" else nets.mlp(12)]

        results = []
        for threaded in (False, True):
            models = [made(seed, teacher) for seed, teacher in zip((1, 2), teachers(), strict=True)]
            errors: list[BaseException] = []
            barrier = threading.Barrier(2)

            def train(model: DistillModel, barrier: Any = barrier, errors: Any = errors, wait: bool = threaded) -> None:
                try:
                    if wait:
                        barrier.wait(30)
                    model.fit(x, y, epochs=2, **STEP)
                except BaseException as error:
                    errors.append(error)

            if threaded:
                threads = [threading.Thread(target=train, args=(model,)) for model in models]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
            else:
                for model in models:
                    train(model)
            assert errors == []
            assert traces(*(part for model in models for part in (model.student, model.teacher))) == []
            results.append(models)
        for alone, together in zip(*results, strict=True):
            nets.assert_same_weights(alone.student, together.student, tolerance=1e-5)
