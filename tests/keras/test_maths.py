"""K1 to K4: the numbers of the total loss, against float64 NumPy written from the formulas."""

from __future__ import annotations

from typing import Any

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import ops

from keras_distill import (
    DistillModel,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
)

STEP = {"batch_size": 16, "verbose": 0, "shuffle": False}


def close(value: Any, expected: Any, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-6)


def evaluated(model: DistillModel, *data: Any, **kwargs: Any) -> dict[str, float]:
    return model.evaluate(*data, **{"batch_size": 16, "verbose": 0, "return_dict": True, **kwargs})


class TestK1:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_kd_equals_float64_at_50000_classes_and_scale_10(self, temperature):
        """K1: T^2 KL, 50,000 classes, logits of scale 10, 1e-4 relative, for every single row too."""
        generator = np.random.default_rng(3)
        student, teacher = (10 * generator.normal(size=(4, 50_000)).astype("float32") for _ in range(2))
        loss = SoftTargetLoss(temperature=temperature)
        expected = nets.kl64(student, teacher, temperature)
        close(float(loss(teacher, student)), expected.mean())
        rows = SoftTargetLoss(temperature=temperature, reduction=None)(teacher, student)
        close(nets.numpy_of(rows), expected)

    @pytest.mark.parametrize("shift", [-300.0, 1000.0])
    @pytest.mark.parametrize("who", ["student", "teacher", "both"])
    def test_kd_ignores_a_constant_added_to_the_logits(self, shift, who):
        """K1: softmax knows no common shift."""
        generator = np.random.default_rng(4)
        student, teacher = (10 * generator.normal(size=(6, 7)).astype("float32") for _ in range(2))
        loss = SoftTargetLoss(temperature=2.0)
        before = float(loss(teacher, student))
        moved = loss(teacher + shift * (who != "student"), student + shift * (who != "teacher"))
        close(float(moved), before)
        close(before, nets.kl64(student, teacher, 2.0).mean())

    def test_kd_of_a_model_equals_float64_at_many_classes(self):
        """K1: what fit logs, and not the loss alone."""
        generator = np.random.default_rng(5)
        x = generator.normal(size=(4, 5)).astype("float32")
        models = []
        for _ in range(2):
            inputs = keras.Input((5,))
            outputs = keras.layers.Dense(20_000, kernel_initializer=keras.initializers.RandomNormal(0, 4))(inputs)
            models.append(keras.Model(inputs, outputs))
        student, teacher = models
        expected = nets.kl64(student.predict(x, verbose=0), teacher.predict(x, verbose=0)).mean()
        model = DistillModel(student, teacher)
        model.compile(keras.optimizers.SGD(0.0))
        logs = model.fit(x, **STEP).history
        close(logs["logits_loss"], expected)
        close(logs["loss"], expected)


def regularized(width: int = 8, **hidden: Any) -> keras.Model:
    inputs = keras.Input((6,))
    outputs = keras.layers.Dense(width, activation="tanh", name="hidden", **hidden)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(outputs))


class TestK2:
    TASK, LOGITS, FEATURE = 0.3, 0.7, 2.5

    def terms(self, **kwargs: Any) -> list[Any]:
        return [
            LogitsDistillation(SoftTargetLoss(temperature=3.0), weight=self.LOGITS),
            FeatureDistillation("hidden", "hidden", "mse", weight=self.FEATURE, **kwargs),
        ]

    @pytest.mark.parametrize("run_eagerly", [False, True])
    @pytest.mark.parametrize("mode", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
    def test_the_loss_is_the_sum_of_its_parts(self, mode, run_eagerly):
        """K2: task_weight * task + sum weight * term + regularisers, those once and at full weight."""
        l2, l1, activity = 0.02, 0.01, 0.05
        student = regularized(
            kernel_regularizer=keras.regularizers.L2(l2),
            bias_initializer="ones",
            bias_regularizer=keras.regularizers.L1(l1),
            activity_regularizer=keras.regularizers.L2(activity),
        )
        teacher = regularized(kernel_regularizer=keras.regularizers.L2(9.0))  # the teacher's count nowhere
        x, y = nets.table()
        feature, target = (
            keras.Model(network.input, network.get_layer("hidden").output).predict(x, verbose=0).astype("float64")
            for network in (student, teacher)
        )
        logits, soft = student.predict(x, verbose=0), teacher.predict(x, verbose=0)
        kernel, bias = student.get_layer("hidden").get_weights()
        task, kd = nets.ce64(logits, y).mean(), nets.kl64(logits, soft, 3.0).mean()
        hint = ((feature - target) ** 2).mean()
        penalty = l2 * (kernel.astype("float64") ** 2).sum() + l1 * np.abs(bias).sum()
        penalty += activity * (feature**2).sum() / len(x)  # Keras divides the activity's by the number of examples

        model = DistillModel(student, teacher, self.terms(), task_weight=self.TASK)
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy(), run_eagerly=run_eagerly)
        if mode == "fit":
            logs = {key: values[-1] for key, values in model.fit(x, y, epochs=2, **STEP).history.items()}
        elif mode == "evaluate":
            logs = evaluated(model, x, y)
        else:
            logs = getattr(model, mode)(x, y, return_dict=True)
        close(logs["task_loss"], task)
        close(logs["logits_loss"], kd)
        close(logs["hidden_loss"], hint)
        close(logs["distillation_loss"], self.LOGITS * kd + self.FEATURE * hint)
        close(logs["loss"], self.TASK * task + self.LOGITS * kd + self.FEATURE * hint + penalty)
        agreement = (logits.argmax(-1) == soft.argmax(-1)).mean()
        close(logs["teacher_agreement"], agreement)

    @pytest.mark.parametrize("task_weight", [0.0, 1.0, 0.25])
    def test_regularizers_alone_move_the_weights_as_in_a_plain_fit(self, task_weight):
        """K2: with both weights at 0 only the regulariser is left, whatever the task's weight."""
        student = regularized(kernel_regularizer=keras.regularizers.L2(0.1))
        before = student.get_layer("hidden").get_weights()[0].astype("float64")
        x, y = nets.table()
        terms = [LogitsDistillation(weight=0.0)]
        model = DistillModel(student, regularized(), terms, task_weight=task_weight)
        if task_weight:
            model.compile(keras.optimizers.SGD(0.5), lambda y_true, y_pred: 0.0 * ops.sum(y_pred, axis=-1))
        else:
            model.compile(keras.optimizers.SGD(0.5), nets.cross_entropy())
        model.fit(x, y, **STEP)
        close(student.get_layer("hidden").get_weights()[0], before * (1 - 0.5 * 2 * 0.1))

    def test_the_mean_of_an_epoch_weighs_batches_by_their_examples(self):
        """K2: the logs of an epoch with a short last batch are those of all examples at once."""
        x, y = nets.table(20)
        student, teacher = nets.mlp(), nets.mlp(12)
        logits, soft = student.predict(x, verbose=0), teacher.predict(x, verbose=0)
        task, kd = nets.ce64(logits, y).mean(), nets.kl64(logits, soft).mean()
        model = DistillModel(student, teacher, task_weight=0.5)
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy())
        for logs in (evaluated(model, x, y), {k: v[0] for k, v in model.fit(x, y, **STEP).history.items()}):
            close(logs["task_loss"], task)
            close(logs["logits_loss"], kd)
            close(logs["distillation_loss"], kd)
            close(logs["loss"], 0.5 * task + kd)

    def test_an_adapter_has_its_regularizer_and_learns(self):
        """K2: the adapter's regulariser is one of R, and its weights get the gradient of the loss in NumPy."""
        student, teacher = nets.mlp(4), nets.mlp(7)
        adapter = keras.layers.Dense(7, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.3))
        term = FeatureDistillation("hidden", "hidden", "mse", weight=2.0, adapter=adapter)
        x, _ = nets.table()
        feature, target = (
            keras.Model(network.input, network.get_layer("hidden").output).predict(x, verbose=0).astype("float64")
            for network in (student, teacher)
        )
        # without the second term Keras would warn that the last layer has no gradient
        model = DistillModel(student, teacher, [term, LogitsDistillation(weight=1e-20)])
        model.compile(keras.optimizers.SGD(0.1))
        kernel = adapter.get_weights()[0].astype("float64")
        error = feature @ kernel - target
        loss = 2.0 * (error**2).mean()
        logs = model.fit(x, **STEP).history
        close(logs["loss"], loss + 0.3 * (kernel**2).sum())
        close(logs["hidden_loss"], (error**2).mean())
        gradient = 2.0 * 2.0 * feature.T @ error / error.size + 2 * 0.3 * kernel
        close(adapter.get_weights()[0], kernel - 0.1 * gradient, 1e-3)

    def test_weights_assigned_later_count_from_the_next_step(self):
        """K2: numbers assigned to the weights and to the temperature reach the compiled step."""
        x, y = nets.table()
        student, teacher = nets.mlp(), nets.mlp(12)
        logits, soft = student.predict(x, verbose=0), teacher.predict(x, verbose=0)
        model = DistillModel(student, teacher, LogitsDistillation())
        model.compile(keras.optimizers.SGD(0.0), nets.cross_entropy())
        model.fit(x, y, **STEP)
        model.task_weight, model.terms[0].weight, model.terms[0].temperature = 0.2, 3.0, 1.5
        logs = model.fit(x, y, **STEP).history
        task, kd = nets.ce64(logits, y).mean(), nets.kl64(logits, soft, 1.5).mean()
        close(logs["logits_loss"], kd)
        close(logs["loss"], 0.2 * task + 3.0 * kd)

    def test_one_loss_object_in_two_terms_keeps_two_temperatures(self):
        """K2: each term has a copy of the loss it is given."""
        x, _ = nets.table()
        student, teacher = nets.mlp(), nets.mlp(12)
        logits, soft = student.predict(x, verbose=0), teacher.predict(x, verbose=0)
        loss = SoftTargetLoss(temperature=2.0)
        model = DistillModel(student, teacher, [LogitsDistillation(loss, name="a"), LogitsDistillation(loss, name="b")])
        model.compile(keras.optimizers.SGD(0.0))
        model.terms[0].temperature = 5.0
        logs = evaluated(model, x)
        close(logs["a_loss"], nets.kl64(logits, soft, 5.0).mean())
        close(logs["b_loss"], nets.kl64(logits, soft, 2.0).mean())

    def test_several_layers_are_averaged(self):
        """K2: a term on two pairs of layers is the mean of both distances."""
        x, _ = nets.table()
        student, teacher = nets.mlp(), nets.mlp()
        term = FeatureDistillation(["hidden", "logits"], ["hidden", "logits"], "l1", name="both")
        values = []
        for layer in ("hidden", "logits"):
            student_value, teacher_value = (
                keras.Model(m.input, m.get_layer(layer).output).predict(x, verbose=0) for m in (student, teacher)
            )
            values.append(np.abs(student_value.astype("float64") - teacher_value).mean())
        model = DistillModel(student, teacher, term)
        model.compile(keras.optimizers.SGD(0.0))
        close(evaluated(model, x)["both_loss"], np.mean(values))

    @pytest.mark.parametrize("order", ["student_teacher", "y_true_y_pred", "keras_loss", "keras_function"])
    def test_a_loss_of_the_users_own_gets_its_arguments_in_order(self, order):
        """K2: plain functions get (student, teacher), Keras' losses and functions (teacher, student)."""
        x, _ = nets.table()
        student, teacher = nets.mlp(), nets.mlp(12)
        logits, soft = (m.predict(x, verbose=0).astype("float64") for m in (student, teacher))
        expected = (np.exp(soft) * (soft - logits)).mean()
        loss: Any = {
            "student_teacher": lambda student, teacher: ops.exp(teacher) * (teacher - student),
            "y_true_y_pred": lambda y_true, y_pred: ops.exp(y_true) * (y_true - y_pred),
            "keras_loss": keras.losses.Huber(delta=0.5),
            "keras_function": keras.losses.mean_squared_logarithmic_error,
        }[order]
        if order == "keras_loss":
            size = np.abs(logits - soft)
            expected = np.where(size <= 0.5, 0.5 * size**2, 0.5 * size - 0.125).mean()
        if order == "keras_function":
            expected = ((np.log(np.maximum(soft, 1e-7) + 1) - np.log(np.maximum(logits, 1e-7) + 1)) ** 2).mean()
        model = DistillModel(student, teacher, LogitsDistillation(loss, name="own"))
        model.compile(keras.optimizers.SGD(0.0))
        close(evaluated(model, x)["own_loss"], expected)


def squashed(kind: str, **kwargs: Any) -> keras.Model:
    """A model whose last step is a softmax or a sigmoid, in the ways users write one."""
    layers: list[Any] = {
        "dense": lambda: [keras.layers.Dense(3, activation="softmax")],
        "sigmoid": lambda: [keras.layers.Dense(3, activation="sigmoid")],
        "activation": lambda: [keras.layers.Dense(3), keras.layers.Activation("softmax")],
        "softmax": lambda: [keras.layers.Dense(3), keras.layers.Softmax()],
        "float32": lambda: [keras.layers.Dense(3), keras.layers.Activation("softmax", dtype="float32")],
        "nested": lambda: [nets.chained([keras.layers.Dense(3, activation="softmax")], "inner")],
        "subclassed": lambda: [keras.layers.Dense(3, activation="softmax")],
        "unbuilt": lambda: [keras.layers.Dense(3, activation="softmax")],
    }[kind]()
    if kind == "subclassed":
        return nets.Chain(layers, **kwargs)
    if kind == "unbuilt":
        return keras.Sequential(layers, **kwargs)
    return keras.Sequential([keras.Input((6,)), *layers], **kwargs)


SQUASHED = ("dense", "sigmoid", "activation", "softmax", "float32", "nested", "subclassed", "unbuilt")


class TestK3:
    @pytest.mark.parametrize("who", ["student", "teacher"])
    @pytest.mark.parametrize(
        ("kind", "loss"),
        [*((kind, SoftTargetLoss) for kind in SQUASHED), ("dense", SoftCrossEntropyLoss), ("dense", LogitMSELoss)],
    )
    def test_probabilities_taken_for_logits_raise(self, kind, loss, who):
        """K3: a softmax or sigmoid at the end with from_logits=True, before anything has trained."""
        plain, ends = nets.mlp(), squashed(kind, name="ends")
        student, teacher = (ends, plain) if who == "student" else (plain, ends)
        x, y = nets.table()
        words = (
            rf"^Expected the {who}'s output to be logits, since the loss has from_logits=True\. Leave out the last"
            rf" softmax or sigmoid of the {who}: the other model returns logits\."
            r" Received: probabilities of a softmax or sigmoid$"
        )
        if kind not in ("subclassed", "unbuilt"):
            with pytest.raises(ValueError, match=words):
                DistillModel(student, teacher, LogitsDistillation(loss()))
            return
        # only a model without known inputs is checked later, at its first batch
        model = DistillModel(student, teacher, LogitsDistillation(loss()))
        model.compile("sgd", nets.cross_entropy())
        with pytest.raises(ValueError, match=words):
            model.fit(x, y, **STEP)

    @pytest.mark.parametrize("kind", ["softmax", "subclassed"])
    def test_probabilities_temper_their_logarithm(self, kind):
        """K3: with from_logits=False z is log p: q = p^(1/T) / sum p^(1/T)."""
        x, _ = nets.table()
        student, teacher = squashed(kind, name="student"), squashed("dense", name="teacher")
        p_s, p_t = (np.asarray(m.predict(x, verbose=0), "float64") for m in (student, teacher))
        temperature = 3.0
        q_s, q_t = (p ** (1 / temperature) / (p ** (1 / temperature)).sum(-1, keepdims=True) for p in (p_s, p_t))
        loss = SoftTargetLoss(temperature=temperature, from_logits=False)
        model = DistillModel(student, teacher, LogitsDistillation(loss))
        model.compile(keras.optimizers.SGD(0.0))
        expected = temperature**2 * (q_t * np.log(q_t / q_s)).sum(-1).mean()
        close(evaluated(model, x)["logits_loss"], expected)
        close(model.fit(x, **STEP).history["loss"], expected)

    def test_probabilities_far_below_keras_epsilon_count(self):
        """K3: with many classes most probabilities lie below 1e-7, and are not clipped there."""
        p_t = np.array([[1e-12, 1e-9, 1 - 1e-9]], "float64")
        p_s = np.array([[1e-9, 1e-12, 1 - 1e-9]], "float64")
        q_s, q_t = (p ** (1 / 4) / (p ** (1 / 4)).sum(-1, keepdims=True) for p in (p_s, p_t))
        expected = 16 * (q_t * np.log(q_t / q_s)).sum()
        value = SoftTargetLoss(from_logits=False)(p_t.astype("float32"), p_s.astype("float32"))
        close(float(value), expected)

    def test_logits_are_accepted(self):
        """K3: a softmax inside the model, or a linear activation at the end, is accepted."""
        inputs = keras.Input((6,))
        attention = keras.layers.Dense(6, activation="softmax")(inputs)
        outputs = keras.layers.Dense(3, activation="linear")(attention * inputs)
        model = DistillModel(keras.Model(inputs, outputs), nets.mlp())
        model.compile("sgd")
        assert "logits_loss" in model.fit(nets.table()[0], **STEP).history


class TestK4:
    def test_pure_distillation_reaches_the_teachers_choices(self):
        """K4: task_weight 0 and no labels: more than 85 % agreement with the teacher, on data not trained on."""
        generator = np.random.default_rng(0)
        x = generator.normal(size=(1280, 6)).astype("float32")
        y = x[:, :3].argmax(-1)
        teacher = nets.mlp(32, name="teacher")
        teacher.compile(keras.optimizers.Adam(0.02), nets.cross_entropy())
        teacher.fit(x[:1024], y[:1024], epochs=5, batch_size=64, verbose=0)
        model = DistillModel(nets.mlp(16), teacher, task_weight=0.0)
        model.compile(keras.optimizers.Adam(0.02))
        model.fit(x[:1024], epochs=8, batch_size=64, verbose=0)
        held_out = x[1024:]
        choices = [m.predict(held_out, verbose=0).argmax(-1) for m in (model.student, teacher)]
        share = (choices[0] == choices[1]).mean()
        assert share > 0.85
        close(evaluated(model, held_out)["teacher_agreement"], share)

    def test_the_task_loss_is_logged_but_trains_nothing_at_weight_zero(self):
        """K4: with task_weight 0 wrong labels change nothing."""
        x, y = nets.table()
        students = []
        for labels in (y, (y + 1) % 3):
            keras.utils.set_random_seed(1)
            model = DistillModel(nets.mlp(), nets.mlp(12), task_weight=0.0)
            model.compile(keras.optimizers.SGD(0.1), nets.cross_entropy())
            assert model.fit(x, labels, epochs=2, **STEP).history["task_loss"][0] > 0
            students.append(model.student)
        nets.assert_same_weights(*students, tolerance=1e-6)
