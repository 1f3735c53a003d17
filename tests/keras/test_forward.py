"""K5 to K9: what a step runs, once, what it leaves alone, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import ops

from keras_distill import DistillationTerm, DistillModel, FeatureDistillation, LogitsDistillation, Tap

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


class TestK5:
    @pytest.mark.parametrize(("kind", "run_eagerly"), WAYS)
    def test_each_model_runs_once_a_step(self, kind, run_eagerly):
        """K5: one forward pass of student and teacher a train step and an eval step; none of the teacher to predict."""
        x, y = nets.table(16)
        model = compiled(kind, run_eagerly=run_eagerly)
        model.fit(x, y, epochs=2, **STEP)
        assert counts(model) == (4, 4)
        model.evaluate(x, y, batch_size=8, verbose=0)
        assert counts(model) == (2, 2)
        model.predict(x, batch_size=8, verbose=0)
        assert counts(model) == (2, 0)
        model(x)
        assert counts(model) == (1, 0)

    def test_each_model_runs_once_in_validation_and_on_single_batches(self):
        """K5: the same with validation_data, train_on_batch and test_on_batch."""
        x, y = nets.table(16)
        model = compiled("functional")
        model.fit(x, y, validation_data=(x[:8], y[:8]), **STEP)
        assert counts(model) == (3, 3)
        model.train_on_batch(x[:8], y[:8])
        model.test_on_batch(x[:8], y[:8])
        assert counts(model) == (2, 2)

    @pytest.mark.parametrize("loss", [None, "cross_entropy"])
    def test_each_model_runs_once_with_a_custom_loop(self, loss):
        """K5: the same where the terms read nothing but the outputs, with and without a task."""
        x, y = nets.table(16)
        model = DistillModel(*pair("functional"))
        model.compile("sgd", loss and nets.cross_entropy())
        model.fit(x, y, **STEP)
        assert counts(model) == (2, 2)

    def test_making_and_compiling_a_model_runs_nothing(self):
        """K5: shapes are found without computing anything, adapters and all."""
        model = compiled("functional")
        assert model.terms[1].built
        assert counts(model) == (0, 0)

    def test_a_student_without_a_training_argument_is_trained(self):
        """K5: a subclassed model may be written with call(self, inputs)."""

        class Plain(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.counter, self.head = nets.Counter(name="counter"), keras.layers.Dense(3)

            def call(self, inputs: Any) -> Any:
                return self.head(self.counter(inputs))

        x, y = nets.table(16)
        model = DistillModel(Plain(), Plain(), FeatureDistillation("head", "head", name="logits"))
        model.compile("sgd", nets.cross_entropy())
        model.fit(x, y, **STEP)
        assert counts(model) == (2, 2)

    @pytest.mark.parametrize("form", ["list", "dict"])
    def test_several_inputs(self, form):
        """K5: inputs in a list or a dict reach both models as they are."""

        def two_inputs() -> keras.Model:
            inputs = {name: keras.Input((6,), name=name) for name in ("a", "b")}
            joined = keras.layers.Concatenate()([nets.Counter(name="counter")(inputs["a"]), 2.0 * inputs["b"]])
            structure = inputs if form == "dict" else list(inputs.values())
            return keras.Model(structure, keras.layers.Dense(3, name="head")(joined))

        x, y = nets.table(16)
        student, teacher = two_inputs(), two_inputs()
        data = {"a": x, "b": x[::-1].copy()} if form == "dict" else [x, x[::-1].copy()]
        expected = nets.kl64(student.predict(data, verbose=0), teacher.predict(data, verbose=0)).mean()
        model = DistillModel(student, teacher, [LogitsDistillation(), FeatureDistillation("head", "head")])
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy())
        counts(model)
        logs = model.fit(data, y, **STEP).history
        assert counts(model) == (2, 2)
        np.testing.assert_allclose(logs["logits_loss"], expected, rtol=1e-4)


def statistics(model: keras.Model) -> list[np.ndarray[Any, Any]]:
    norm = layer_of(model, "norm")
    return [nets.numpy_of(norm.moving_mean), nets.numpy_of(norm.moving_variance)]


class TestK6:
    @pytest.mark.parametrize(("kind", "run_eagerly"), WAYS)
    def test_batchnorm_statistics_are_those_of_one_forward(self, kind, run_eagerly):
        """K6: 0.9 * old + 0.1 * batch, after one step of fit; evaluate and predict change nothing."""
        x, y = nets.table(8)
        model = compiled(kind, run_eagerly=run_eagerly)
        model.student(x[:1])  # the unbuilt get their weights
        hidden = layer_of(model.student, "hidden")
        kernel, bias = (value.astype("float64") for value in hidden.get_weights())
        before = statistics(model.student)
        feature = np.tanh(x.astype("float64") @ kernel + bias)
        model.fit(x, y, **STEP)
        mean, variance = statistics(model.student)
        np.testing.assert_allclose(mean, 0.9 * before[0] + 0.1 * feature.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance, 0.9 * before[1] + 0.1 * feature.var(0), rtol=1e-4, atol=1e-6)
        counts(model)
        weights = model.student.get_weights()
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        counts(model)
        for after, value in zip(model.student.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(after, value * (value.shape != ()))  # () is the counter

    @pytest.mark.parametrize("kind", ["functional", "subclassed", "nested"])
    def test_a_fit_without_distillation_equals_the_plain_students(self, kind):
        """K6: with every term at weight 0 weights and statistics after some steps are those of a plain fit."""
        x, y = nets.table(16)
        students = []
        for distilled in (False, True):
            keras.utils.set_random_seed(3)
            student = nets.structured(kind, 8, dropout=0.4)
            if distilled:
                teacher = nets.structured(kind, 12, dropout=0.4)
                terms = [LogitsDistillation(weight=0.0), FeatureDistillation(path(kind), path(kind), weight=0.0)]
                model = DistillModel(student, teacher, terms)
            else:
                model = student
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), nets.cross_entropy())
            model.fit(x, y, epochs=2, **STEP)
            students.append(student)
        nets.assert_same_weights(*students, tolerance=1e-5)


class HeadAgain(DistillationTerm):
    """Largest difference of the student's output from its last layer applied to the captured feature."""

    def __init__(self, head: Any, tap: str) -> None:
        super().__init__(name="gap", weight=1e-20)
        self.head = [head]  # in a list of its own Keras would track it: it is the student's already
        self.student_taps = [Tap.of(tap)]

    def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        feature = student.feature(self.student_taps[0])
        again = ops.matmul(feature, self.head[0].kernel) + self.head[0].bias
        return ops.max(ops.abs(again - student.output))


class Zeros(DistillationTerm):
    """Share of zeros in the captured feature."""

    def __init__(self, tap: str) -> None:
        super().__init__(name="zeros", weight=1e-20)
        self.student_taps = [Tap.of(tap)]

    def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
        return ops.mean(ops.cast(student.feature(self.student_taps[0]) == 0, "float32"))


class TestK7:
    @pytest.mark.parametrize(("kind", "run_eagerly"), WAYS)
    def test_the_feature_comes_from_the_forward_pass_of_the_output(self, kind, run_eagerly):
        """K7: the same dropout mask in the captured feature and in y_pred; no mask in evaluation."""
        x, y = nets.table(16)
        student, teacher = pair(kind, dropout=0.5)
        student(x[:1])
        drop = "chain.3" if "subclassed" in kind else "drop"
        terms = [HeadAgain(layer_of(student, "logits"), drop), Zeros(drop), LogitsDistillation()]
        model = DistillModel(student, teacher, terms)
        model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy(), run_eagerly=run_eagerly)
        logs = model.fit(x, y, epochs=2, **STEP).history
        assert max(logs["gap_loss"]) < 1e-5
        assert 0.2 < logs["zeros_loss"][0] < 0.8
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        assert logs["gap_loss"] < 1e-5
        assert logs["zeros_loss"] < 0.1


class TestK8:
    @pytest.mark.parametrize(("kind", "run_eagerly"), WAYS)
    def test_the_teacher_runs_in_inference_mode_and_never_changes(self, kind, run_eagerly):
        """K8: its dropout is off, its BatchNorm statistics are used and kept, its trainable flags stay."""
        x, y = nets.table(16)
        model = compiled(kind, dropout=0.9, run_eagerly=run_eagerly)
        teacher = model.teacher
        teacher(x[:1])
        norm = layer_of(teacher, "norm")
        norm.moving_mean.assign(np.linspace(-1, 1, 12))
        norm.moving_variance.assign(np.linspace(0.5, 2, 12))
        layer_of(teacher, "logits").trainable = False
        flags = [(layer.name, layer.trainable) for layer in teacher._flatten_layers()]
        frozen = [variable.trainable for variable in teacher.variables]
        weights = teacher.get_weights()
        soft, logits = teacher(x, training=False), model.student(x, training=False)
        expected = nets.kl64(nets.numpy_of(logits), nets.numpy_of(soft)).mean()
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        np.testing.assert_allclose(logs["logits_loss"], expected, rtol=1e-4)
        model.fit(x, y, epochs=2, **STEP)
        layer_of(teacher, "counter").calls.assign(weights[0] if weights[0].shape == () else 1.0)
        for after, before in zip(teacher.get_weights(), weights, strict=True):
            if before.shape:
                np.testing.assert_array_equal(after, before)
        assert [(layer.name, layer.trainable) for layer in teacher._flatten_layers()] == flags
        assert [variable.trainable for variable in teacher.variables] == frozen

    def test_the_teachers_training_behaviour_is_off_while_the_student_trains(self):
        """K8: in a training step too the teacher's soft targets are those of inference."""
        x, _ = nets.table(16)
        student, teacher = nets.structured("functional"), nets.structured("functional", 12, dropout=0.9)
        target = ops.convert_to_tensor(teacher.predict(x, verbose=0))

        class Target(DistillationTerm):
            def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
                return ops.max(ops.abs(teacher.output - target))

        model = DistillModel(student, teacher, [Target(name="target", weight=1e-20), LogitsDistillation()])
        model.compile(keras.optimizers.SGD(0.1))
        assert model.fit(x, batch_size=16, shuffle=False, epochs=2, verbose=0).history["target_loss"] < [1e-5, 1e-5]

    def test_a_teacher_whose_default_is_training_runs_in_inference_mode(self):
        """K8: `training=False` is said, and not left open: Keras' wrapper of torch modules trains but for False."""

        class Noisy(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.drop, self.head = keras.layers.Dropout(0.9, seed=1), keras.layers.Dense(3)

            def call(self, inputs: Any, training: bool | None = None) -> Any:
                return self.head(self.drop(inputs, training=training is not False))

        x, y = nets.table(8)
        model = DistillModel(nets.mlp(), teacher := Noisy())
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy())
        expected = nets.kl64(
            *(nets.numpy_of(network(x, training=False)) for network in (model.student, teacher))
        ).mean()
        np.testing.assert_allclose(model.fit(x, y, **STEP).history["logits_loss"], expected, rtol=1e-4)

    def test_a_teacher_that_is_assigned_later_is_used(self):
        """K8: what has been traced with another teacher is not used again."""
        x, y = nets.table(8)
        model = DistillModel(nets.mlp(), nets.mlp(12))
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy())
        for _ in range(2):
            expected = nets.kl64(*(network.predict(x, verbose=0) for network in (model.student, model.teacher))).mean()
            np.testing.assert_allclose(model.fit(x, y, **STEP).history["logits_loss"], expected, rtol=1e-4)
            logs = model.evaluate(x, y, verbose=0, return_dict=True)
            np.testing.assert_allclose(logs["logits_loss"], expected, rtol=1e-4)
            model.teacher = nets.mlp(16)

    def test_the_teacher_is_not_part_of_the_model(self):
        """K8: it is neither counted nor among the layers, variables and optimizer's variables."""
        x, y = nets.table(16)
        student, teacher = nets.mlp(), nets.mlp(12)
        model = DistillModel(student, teacher)
        model.compile(keras.optimizers.Adam(), nets.cross_entropy())
        model.fit(x, y, **STEP)
        of_teacher = {id(variable) for variable in teacher.variables}
        assert len(model.trainable_variables) == len(student.trainable_variables)
        assert not of_teacher & {id(variable) for variable in model.variables}
        assert not any(layer is teacher for layer in model._flatten_layers())
        assert len(model.optimizer.variables) == 2 + 2 * len(student.trainable_variables)  # iterations, rate, moments

    @pytest.mark.parametrize("trainable", [True, False])
    def test_a_layer_shared_with_the_student_still_trains(self, trainable):
        """K8: no gradient of the teacher, but the student's own; a teacher frozen by the user stays frozen."""
        x, y = nets.table(16)
        shared = keras.layers.Dense(8, activation="tanh", name="shared")
        student = nets.chained([shared, keras.layers.Dense(3)], "student")
        teacher = nets.chained([shared, keras.layers.Dense(3, name="own")], "teacher")
        teacher.get_layer("own").trainable = trainable
        kept = [weight.copy() for weight in teacher.get_layer("own").get_weights()]
        before = shared.get_weights()[0].astype("float64")
        model = DistillModel(student, teacher, LogitsDistillation(), task_weight=0.0)
        model.compile(keras.optimizers.SGD(0.5), nets.cross_entropy())
        hidden = np.tanh(x.astype("float64") @ before + shared.get_weights()[1])
        kernel, bias = (weight.astype("float64") for weight in student.layers[-1].get_weights())
        p_s, p_t = (np.exp(nets.log_softmax64((hidden @ k + b) / 4)) for k, b in ((kernel, bias), kept))
        upstream = 4.0 * (p_s - p_t) / len(x) @ kernel.T * (1 - hidden**2)  # of the student's path alone
        model.fit(x, y, batch_size=16, verbose=0)
        np.testing.assert_allclose(shared.get_weights()[0], before - 0.5 * x.T @ upstream, rtol=1e-3, atol=1e-5)
        assert np.abs(shared.get_weights()[0] - before).max() > 1e-3
        for after, value in zip(teacher.get_layer("own").get_weights(), kept, strict=True):
            np.testing.assert_array_equal(after, value)
        assert teacher.get_layer("own").trainable is trainable


def operations(graph: Any) -> set[str]:
    """Kinds of operations in a TensorFlow graph and in the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return {node.op for node in nodes}


class TestK9:
    @pytest.mark.tensorflow
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("who", ["teacher", "student"])
    def test_no_gradient_operation_of_the_teacher_is_in_the_graph(self, who, own):
        """K9: an elu in the teacher leaves no EluGrad in the traced step, for any loss; the student's does."""
        import tensorflow as tf

        def net(activation: str, name: str) -> keras.Model:
            hidden = keras.layers.Dense(8, activation=activation, name="hidden")
            return nets.chained([hidden, keras.layers.Dense(3, name="logits")], name)

        student = net("elu" if who == "student" else "relu", "student")
        teacher = net("elu" if who == "teacher" else "relu", "teacher")
        # the losses of this package stop the teacher's gradient themselves, a user's own do not
        loss = [lambda a, b: ops.square(a - b)] if own else []
        terms = [LogitsDistillation(*loss), FeatureDistillation("hidden", "hidden", *loss)]
        model = DistillModel(student, teacher, terms)
        model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy())
        x, y = nets.table(8)
        model.fit(x, y, **STEP)
        step = tf.function(model.train_step).get_concrete_function((tf.constant(x), tf.constant(y)))
        names = operations(step.graph)
        assert "Elu" in names
        assert ("EluGrad" in names) == (who == "student")

    @pytest.mark.parametrize("run_eagerly", [False, True])
    def test_the_teachers_tensors_have_no_gradient(self, run_eagerly):
        """K9: neither its outputs nor its features, seen from inside the teacher and from a term."""
        asked: list[bool] = []

        class Watch(keras.layers.Layer):
            def call(self, inputs: Any) -> Any:
                asked.append(bool(getattr(inputs, "requires_grad", False)))
                return inputs

        class Look(DistillationTerm):
            teacher_taps = (Tap("hidden"),)

            def compute(self, student: Any, teacher: Any, labels: Any = None, sample_weight: Any = None) -> Any:
                tensors = (teacher.output, teacher.feature(self.teacher_taps[0]))
                asked.extend(bool(getattr(tensor, "requires_grad", False)) for tensor in tensors)
                return ops.mean(teacher.output) * ops.mean(student.output)

        x, y = nets.table(8)
        teacher = nets.chained([keras.layers.Dense(8, name="hidden"), Watch(), keras.layers.Dense(3)], "teacher")
        model = DistillModel(nets.mlp(), teacher, Look(name="look"))
        model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy(), run_eagerly=run_eagerly)
        asked.clear()
        model.fit(x, y, **STEP)
        assert asked
        assert not any(asked)
