"""Run the rows of the table in docs/comparison.md about keras.distillation, with it and with keras_distill."""

from __future__ import annotations

import functools
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_distill import DistillModel, FeatureDistillation, LogitsDistillation, SoftTargetLoss

if not hasattr(keras, "distillation"):
    pytest.skip(f"Keras {keras.__version__} has no keras.distillation", allow_module_level=True)
if not keras.__version__.startswith("3.15."):
    reason = f"the table in docs/comparison.md is about Keras 3.15, and this is {keras.__version__}"
    pytest.skip(reason, allow_module_level=True)

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 4)).astype("float32")
LABELS = RNG.integers(0, 3, 8)


def network(name: str, width: int = 5, regularizer: keras.regularizers.Regularizer | None = None) -> keras.Model:
    """Four inputs, a layer ``hidden``, batch normalisation, three classes."""
    inputs = keras.Input((4,))
    hidden = layers.Dense(width, name="hidden", kernel_regularizer=regularizer)(inputs)
    normal = layers.BatchNormalization(name="normal")(hidden)
    return keras.Model(inputs, layers.Dense(3, name="head")(normal), name=name)


def peer_model(student: keras.Model, teacher: keras.Model, *features: str, weight: float = 0.5) -> keras.Model:
    """keras.distillation with the divergence of softmaxes, and some features."""
    losses = [
        keras.distillation.LogitsDistillation(4.0, keras.losses.KLDivergence()),
        *(keras.distillation.FeatureDistillation("mse", name, name) for name in features),
    ]
    return compiled(keras.distillation.Distiller(teacher, student, losses, student_loss_weight=weight))


def distill_model(student: keras.Model, teacher: keras.Model, *features: str) -> DistillModel:
    """keras_distill with the same."""
    terms = [LogitsDistillation(weight=0.5), *(FeatureDistillation(name, name, weight=0.5) for name in features)]
    return compiled(DistillModel(student, teacher, terms, task_weight=0.5))


def compiled(model: keras.Model, optimizer: str = "sgd") -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


BOTH = pytest.mark.parametrize("make", [peer_model, distill_model], ids=["keras.distillation", "keras_distill"])


def step(make, **fit):
    """Logs and weights of the student after a step on all of the data, from the same start each time."""
    regularizer = fit.pop("regularizer", None)
    keras.utils.set_random_seed(1)
    student, teacher = network("student", regularizer=regularizer), network("teacher", 7)
    model = make(student, teacher)
    logs = model.fit(IMAGES, LABELS, batch_size=8, verbose=0, **fit).history
    return logs, student.get_weights()


@functools.cache
def plain_step(make):
    return step(make)


def same(value, other) -> bool:
    return all(np.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(value, other, strict=True))


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# The formula of the logits -------------------------------------------------------------------------------------------


class TestLogits:
    student = (3 * RNG.normal(size=(6, 4))).astype("float32")
    teacher = (3 * RNG.normal(size=(6, 4))).astype("float32")

    def kl(self, temperature: float) -> float:
        student, teacher = softmax(self.student / temperature), softmax(self.teacher / temperature)
        return temperature**2 * float((teacher * (np.log(teacher) - np.log(student))).sum(-1).mean())

    def test_the_default_there_is_not_a_divergence_of_softmaxes(self):
        default = keras.distillation.LogitsDistillation(temperature=4.0)
        value = float(default.compute_loss(self.teacher, self.student))
        student, teacher = (np.clip(logits / 4.0, 1e-7, 1.0) for logits in (self.student, self.teacher))
        clipped = float((teacher * np.log(teacher / student)).sum(-1).mean())
        assert value == pytest.approx(clipped, rel=1e-4)  # the logits themselves, cut to [1e-7, 1], and no T^2
        assert abs(value - self.kl(4.0)) > 0.1

    def test_the_default_there_vanishes_where_all_logits_are_above_the_temperature(self):
        default = keras.distillation.LogitsDistillation(temperature=4.0)
        assert float(default.compute_loss(self.teacher, self.student)) > 0.1
        assert float(default.compute_loss(self.teacher + 20.0, self.student + 20.0)) == pytest.approx(0.0, abs=1e-6)

    def test_a_loss_object_there_is_the_divergence_of_softmaxes(self):
        loss = keras.distillation.LogitsDistillation(4.0, keras.losses.KLDivergence())
        assert float(loss.compute_loss(self.teacher, self.student)) == pytest.approx(self.kl(4.0), rel=1e-4)

    def test_the_default_here_is_the_divergence_of_softmaxes(self):
        """K1."""
        assert float(SoftTargetLoss()(self.teacher, self.student)) == pytest.approx(self.kl(4.0), rel=1e-5)
        shifted = float(SoftTargetLoss()(self.teacher + 20.0, self.student + 20.0))
        assert shifted == pytest.approx(self.kl(4.0), rel=1e-4)

    @pytest.mark.parametrize("library", [False, True], ids=["keras.distillation", "keras_distill"])
    def test_learning_from_a_teacher_alone_with_the_defaults(self, library):
        """K4: far from the teacher with the default there, close to it with the default here."""
        inputs = RNG.normal(size=(512, 8)).astype("float32")
        student, teacher = (keras.Sequential([keras.Input((8,)), layers.Dense(10)]) for _ in range(2))
        teacher.set_weights([RNG.normal(size=(8, 10)), np.zeros(10)])
        if library:
            model = DistillModel(student, teacher, task_weight=0.0)
            model.compile(keras.optimizers.Adam(0.02))
            model.fit(inputs, batch_size=64, epochs=20, verbose=0)
        else:
            loss = keras.distillation.LogitsDistillation()
            model = keras.distillation.Distiller(teacher, student, loss, student_loss_weight=0.0)
            model.compile(keras.optimizers.Adam(0.02), "mse")
            model.fit(inputs, np.zeros((512, 10)), batch_size=64, epochs=20, verbose=0)
        chosen = [ops.convert_to_numpy(network(inputs)).argmax(-1) for network in (student, teacher)]
        agreement = float((chosen[0] == chosen[1]).mean())
        assert agreement > 0.95 if library else agreement < 0.75, agreement


# The forward passes --------------------------------------------------------------------------------------------------


class Counted(layers.Layer):
    """Hands its input on and counts the calls of eager steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def call(self, inputs):
        self.calls += not isinstance(inputs, keras.KerasTensor)
        return inputs


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # on JAX it warns of the structure of its inputs
        pytest.param(peer_model, 2, marks=pytest.mark.not_jax, id="keras.distillation"),
        pytest.param(distill_model, 1, id="keras_distill"),
    ],
)
def test_forward_passes_of_the_student_with_a_feature(make, expected):
    """K5."""
    inputs = keras.Input((4,))
    counter = Counted(name="counter")
    hidden = layers.Dense(5, name="hidden")(counter(inputs))
    student = keras.Model(inputs, layers.Dense(3)(hidden))
    model = make(student, network("teacher"), "hidden")
    model.run_eagerly = True
    model.fit(IMAGES, LABELS, batch_size=8, verbose=0)  # one step; the second fit has no call for building in it
    counter.calls = 0
    model.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    assert counter.calls == expected


@pytest.mark.parametrize(
    ("make", "moves"), [(peer_model, True), (distill_model, False)], ids=["keras.distillation", "keras_distill"]
)
def test_statistics_of_batch_normalisation_in_evaluate(make, moves):
    """K6."""
    student = network("student")
    model = make(student, network("teacher"), "hidden")
    before = student.get_layer("normal").get_weights()
    model.evaluate(IMAGES, LABELS, verbose=0)
    assert same(before, student.get_layer("normal").get_weights()) is not moves


@pytest.mark.parametrize(
    ("make", "frozen"), [(peer_model, True), (distill_model, False)], ids=["keras.distillation", "keras_distill"]
)
def test_the_teachers_trainable_flag(make, frozen):
    """K8."""
    teacher = network("teacher")
    make(network("student"), teacher)
    assert teacher.trainable is not frozen


# Sample weights, regularisers and outputs ----------------------------------------------------------------------------


WEIGHTS = {"sample_weight": np.arange(8.0)}, {"class_weight": {0: 1.0, 1: 5.0, 2: 0.0}}


@pytest.mark.parametrize("weights", WEIGHTS, ids=["sample_weight", "class_weight"])
def test_weights_of_the_examples_change_nothing_there(weights):
    (plain_logs, plain), (weighted_logs, weighted) = plain_step(peer_model), step(peer_model, **weights)
    assert plain_logs == weighted_logs
    assert same(plain, weighted)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["sample_weight", "class_weight"])
def test_weights_of_the_examples_count_here(weights):
    """K11, in the task loss and in the distillation."""
    (plain_logs, plain), (weighted_logs, weighted) = plain_step(distill_model), step(distill_model, **weights)
    for key in ("task_loss", "logits_loss"):
        assert abs(plain_logs[key][0] - weighted_logs[key][0]) > 1e-3
    assert not same(plain, weighted)


@pytest.mark.parametrize(
    ("make", "counts"), [(peer_model, False), (distill_model, True)], ids=["keras.distillation", "keras_distill"]
)
def test_the_students_regularizers(make, counts):
    """K2."""
    (plain_logs, plain), (regular_logs, regular) = plain_step(make), step(make, regularizer=keras.regularizers.L2(0.1))
    assert (regular_logs["loss"][0] > plain_logs["loss"][0] + 1e-3) is counts
    assert same(plain, regular) is not counts


def two_outputs() -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, {"a": layers.Dense(3, name="a")(inputs), "b": layers.Dense(2, name="b")(inputs)})


def test_a_model_with_two_outputs_cannot_be_trained_there():
    divergence = {"a": keras.losses.KLDivergence(), "b": keras.losses.KLDivergence()}
    losses = keras.distillation.LogitsDistillation(4.0, divergence)
    model = keras.distillation.Distiller(two_outputs(), two_outputs(), losses)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"a": crossentropy, "b": crossentropy})
    with pytest.raises(ValueError, match=r"[Tt]ype mismatch"):
        model.fit(IMAGES, {"a": LABELS, "b": LABELS % 2}, verbose=0)


def test_a_model_with_two_outputs_trains_here():
    """K13."""
    model = DistillModel(two_outputs(), two_outputs())
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"a": crossentropy, "b": crossentropy})
    logs = model.fit(IMAGES, {"a": LABELS, "b": LABELS % 2}, verbose=0).history
    assert np.isfinite(logs["logits_loss"][0])


# Features ------------------------------------------------------------------------------------------------------------


def plain_network(width: int) -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(width, name="hidden")(inputs)))


def test_a_feature_of_one_channel_is_broadcast_there():
    model = peer_model(plain_network(5), plain_network(1), "hidden")
    assert np.isfinite(model.fit(IMAGES, LABELS, verbose=0).history["distillation_loss"][0])


def test_a_feature_of_one_channel_is_an_error_here_without_an_adapter():
    """K14."""
    terms = FeatureDistillation("hidden", "hidden", adapter=None)
    with pytest.raises(ValueError, match="to have equal shapes"):
        DistillModel(plain_network(5), plain_network(1), terms)


def test_features_of_different_widths_cannot_be_compared_there():
    model = peer_model(plain_network(5), plain_network(7), "hidden")
    with pytest.raises(Exception, match="5") as error:  # an error of the backend's, in the first step
        model.fit(IMAGES, LABELS, verbose=0)
    assert "7" in str(error.value)


def test_features_of_different_widths_are_compared_through_an_adapter_here():
    """K14."""
    model = distill_model(plain_network(5), plain_network(7), "hidden")
    assert np.isfinite(model.fit(IMAGES, LABELS, verbose=0).history["hidden_loss"][0])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(5, name="hidden"), layers.Dense(3)

    def call(self, inputs, training=None):
        return self.head(self.hidden(inputs))


def test_features_of_subclassed_models_are_refused_there():
    with pytest.raises(ValueError, match="requires Functional or Sequential models"):
        peer_model(Subclassed(), Subclassed(), "hidden")


def test_features_of_subclassed_models_are_read_here():
    """K5."""
    logs = distill_model(Subclassed(), Subclassed(), "hidden").fit(IMAGES, LABELS, verbose=0).history
    assert logs["hidden_loss"][0] > 0


# Schedules, files, resuming ------------------------------------------------------------------------------------------


@pytest.mark.tensorflow  # where a graph keeps the old temperature; torch computes eagerly
def test_a_temperature_that_is_set_while_training_has_no_effect_there():
    losses = keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence())
    model = keras.distillation.Distiller(plain_network(5), plain_network(5), losses)
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    before = model.fit(IMAGES, LABELS, batch_size=8, verbose=0).history["distillation_loss"]
    losses.temperature = 20.0
    assert model.fit(IMAGES, LABELS, batch_size=8, verbose=0).history["distillation_loss"] == before


def test_a_temperature_that_is_set_while_training_takes_effect_here():
    """K20."""
    model = compiled(DistillModel(plain_network(5), plain_network(5)))
    model.optimizer.learning_rate = 0.0
    before = model.fit(IMAGES, LABELS, batch_size=8, verbose=0).history["logits_loss"][0]
    model.terms[0].temperature = 20.0
    after = model.fit(IMAGES, LABELS, batch_size=8, verbose=0).history["logits_loss"][0]
    assert abs(after - before) > 1e-4


@pytest.mark.parametrize(
    ("make", "holds"), [(peer_model, True), (distill_model, False)], ids=["keras.distillation", "keras_distill"]
)
def test_the_teachers_weights_in_the_saved_file(make, holds, tmp_path: Path):
    """K23: the teacher is much the larger of the two."""
    student, teacher = network("student"), network("teacher", 2000)
    model = make(student, teacher)
    model.fit(IMAGES, LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    teacher_bytes = 4 * teacher.count_params()
    assert ((tmp_path / "model.keras").stat().st_size > teacher_bytes) is holds


def test_training_does_not_continue_after_loading_there(tmp_path: Path):
    model = peer_model(network("student"), network("teacher"))
    model.fit(IMAGES, LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="was not called as part of model loading"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert getattr(loaded, "optimizer", None) is None
    with pytest.raises(AttributeError, match=r"has no attribute '(_student_loss|optimizer)'"):
        loaded.fit(IMAGES, LABELS, verbose=0)


def test_training_continues_after_loading_here(tmp_path: Path):
    """K22."""
    model = distill_model(network("student"), network("teacher"))
    model.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.teacher = model.teacher
    for trained in (model, loaded):
        trained.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    assert same(model.student.get_weights(), loaded.student.get_weights())
    assert int(loaded.optimizer.iterations) == 2


def test_a_loss_of_the_task_is_demanded_there():
    model = keras.distillation.Distiller(
        plain_network(5), plain_network(5), keras.distillation.LogitsDistillation(), student_loss_weight=0.0
    )
    with pytest.raises(ValueError, match="'loss' cannot be `None`"):
        model.compile("sgd")


def test_no_loss_of_the_task_and_no_labels_are_needed_here():
    """K28."""
    model = DistillModel(plain_network(5), plain_network(5))
    model.compile("sgd")
    logs = model.fit(IMAGES, verbose=0).history
    assert logs["loss"] == logs["distillation_loss"]
