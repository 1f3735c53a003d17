"""Losses with parameters in training: they are adapters in all but name (K22, K24, K26)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras_nets import assert_same_logs, assert_same_weights, cross_entropy, numpy_of, table

from keras_distill import (
    DistillModel,
    DistillTargets,
    FeatureDistillation,
    MaskedGenerativeLoss,
    StudentCheckpoint,
    VariationalInformationLoss,
)


def network(channels: int, name: str) -> keras.Model:
    """Inputs (N, 6) as maps (N, 2, 3, 1): layers "stem", "body" (half as wide), "logits"."""
    inputs = keras.Input((6,))
    maps = keras.layers.Reshape((2, 3, 1))(inputs)
    stem = keras.layers.Conv2D(channels, 3, padding="same", activation="tanh", name="stem")(maps)
    body = keras.layers.Dense(2 * channels, activation="tanh", name="body")(keras.layers.Flatten()(stem))
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(body), name=name)


def terms(mask_ratio: float = 0.3) -> list[FeatureDistillation]:
    """Both losses, on features of other channels than the teacher's."""
    return [
        FeatureDistillation("body", "body", VariationalInformationLoss(), weight=0.5),
        FeatureDistillation("stem", "stem", MaskedGenerativeLoss(mask_ratio=mask_ratio), weight=0.01),
    ]


def teacher() -> keras.Model:
    keras.utils.set_random_seed(11)
    return network(5, "teacher")


def distilled(model_terms: Any = None, **settings: Any) -> DistillModel:
    model_teacher = teacher()
    keras.utils.set_random_seed(5)
    model = DistillModel(network(3, "student"), model_teacher, model_terms or terms(), **settings)
    model.compile(keras.optimizers.Adam(0.01), cross_entropy(), run_eagerly=True)  # a trace costs more than the steps
    return model


def fitted(model: DistillModel, epochs: int = 1, **settings: Any) -> dict[str, list[float]]:
    return model.fit(*table(16), 8, epochs, shuffle=False, verbose=0, **settings).history


def learned_weights(model: DistillModel) -> list[Any]:
    layers = [loss.layer for term in model.terms for loss in term.learned]
    return [numpy_of(ops.stop_gradient(variable.value)) for layer in layers for variable in layer.trainable_variables]


def test_every_parameter_changes_in_training_and_none_is_the_students() -> None:
    """They belong to the distillation model, and the student is as it would be alone."""
    model = distilled()
    before = learned_weights(model)
    assert [weight.shape for weight in before] == [(10,), (6, 10), (10, 10), (10, 10)] + [(3, 3, 5, 5), (5,)] * 2

    fitted(model)

    assert all((weight != other).any() for weight, other in zip(before, learned_weights(model), strict=True))
    assert len(model.student.weights) == len(network(3, "plain").weights)
    adapter = model.terms[1].adapters[0]
    trained = len(model.student.weights) + len(before) + len(adapter.weights)
    assert len(model.trainable_variables) == trained
    assert len(model.optimizer.variables) == 2 + 2 * trained  # Adam's moments, its step and learning rate


def test_the_student_learns_from_a_learned_loss() -> None:
    first, second = distilled(), distilled()
    second.terms[0].weight = 0.9
    for model in (first, second):
        fitted(model)
    assert (first.student.get_weights()[0] != second.student.get_weights()[0]).any()


def test_k22_a_loaded_model_continues_exactly(tmp_path: Path) -> None:
    """K22: two epochs equal one epoch, save, load, another epoch; the masks go on where they were, too."""
    straight, first = distilled(), distilled()
    straight_logs = fitted(straight, 2)
    fitted(first)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    for value, saved in zip(learned_weights(second), learned_weights(first), strict=True):
        np.testing.assert_array_equal(value, saved)
    for value, saved in zip(second.optimizer.variables, first.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(value), ops.convert_to_numpy(saved))

    second.teacher, second.run_eagerly = teacher(), True
    logs = fitted(second, 2, initial_epoch=1)

    assert_same_weights(second, straight, 1e-6)
    assert_same_logs(logs, {key: values[1:] for key, values in straight_logs.items()}, 1e-5)


def test_k22_the_weights_of_a_file_fit_a_new_model(tmp_path: Path) -> None:
    """K22: `save_weights` and `load_weights`."""
    model, other = distilled(), distilled()
    fitted(model)
    fitted(other, 2)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for value, expected in zip(learned_weights(other), learned_weights(model), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_k24_the_saved_student_holds_no_parameter_of_a_loss(tmp_path: Path) -> None:
    """K24: nor does a checkpoint of it; loading needs nothing of this package."""
    model = distilled()
    fitted(model, callbacks=[StudentCheckpoint(tmp_path / "kept.keras")])
    model.student.save(tmp_path / "saved.keras")
    for name in ("kept", "saved"):
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            assert "keras_distill" not in archive.read("config.json").decode()
            archive.extract("model.weights.h5", tmp_path / name)
        names: list[str] = []
        with h5py.File(tmp_path / name / "model.weights.h5") as file:
            file["layers"].visit(names.append)
            items = [file["layers"][name] for name in names]
            shapes = [item.shape for item in items if isinstance(item, h5py.Dataset)]
        assert sorted(shapes) == sorted(tuple(weight.shape) for weight in model.student.weights)
        assert_same_weights(keras.models.load_model(tmp_path / f"{name}.keras"), model.student, 0.0)


def test_evaluation_masks_nothing() -> None:
    """Two evaluations agree, and with what is trained without a mask."""
    masked, plain = distilled(terms(0.9)), distilled(terms(0.0))
    for variable, other in zip(plain.trainable_variables, masked.trainable_variables, strict=True):
        variable.assign(other)
    values = [model.evaluate(*table(16), verbose=0, return_dict=True) for model in (masked, masked, plain)]
    assert values[0] == values[1] == values[2]
    trained = [fitted(model, 1)["stem_loss"] for model in (masked, plain)]
    assert trained[0] != trained[1]


def test_every_pair_of_layers_has_parameters_of_its_own() -> None:
    loss = VariationalInformationLoss()
    model = distilled([FeatureDistillation(["stem", "body"], ["stem", "body"], loss)])
    before = learned_weights(model)
    fitted(model)
    assert [loss.layer.rho.shape[0] for loss in model.terms[0].learned] == [5, 10]
    assert all((weight != other).any() for weight, other in zip(before, learned_weights(model), strict=True))
    assert loss.layer is None  # what was passed stays as it was, and may serve another term


def test_a_user_s_adapter_comes_before_a_learned_loss() -> None:
    """The mean then maps the output of the adapter."""
    term = FeatureDistillation("body", "body", VariationalInformationLoss(), adapter=keras.layers.Dense(2))
    distilled([term])
    assert term.learned[0].layer.parts[0].kernel.shape == (2, 10)


def test_targets_that_carry_the_teacher_s_features_serve_a_learned_loss() -> None:
    """K26: the parameters are then made from the shapes of the data, and the numbers are those of a live teacher."""
    asked, served = distilled(terms(0.0)), distilled(terms(0.0))
    x, y = table(16)
    targets = asked.teacher_targets(x, y)
    assert isinstance(targets, DistillTargets)
    expected = fitted(asked)
    served.teacher = None
    logs = served.fit(x, targets, 8, 1, shuffle=False, verbose=0).history
    assert_same_logs({key: logs[key] for key in ("loss", "body_loss", "stem_loss")},
                     {key: expected[key] for key in ("loss", "body_loss", "stem_loss")})  # fmt: skip


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_parameters_stay_in_float32_under_mixed_precision(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = distilled()
    history = fitted(model)
    learned = [loss.layer for term in model.terms for loss in term.learned]
    kinds = {variable.dtype for layer in learned for variable in layer.trainable_variables}
    assert kinds == {"float32"}
    assert np.isfinite(history["loss"]).all()


@pytest.mark.tensorflow
def test_xla_trains_the_losses() -> None:
    model = distilled()
    model.compile("sgd", cross_entropy(), jit_compile=True)
    before = learned_weights(model)
    fitted(model)
    assert all((weight != other).any() for weight, other in zip(before, learned_weights(model), strict=True))


def test_a_mask_of_positions_leaves_padding_out() -> None:
    """A masked token counts neither in the mean nor in the number of tokens."""
    layers = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 3, mask_zero=True, name="tokens")]
    students, teachers = (keras.Sequential([*layers, keras.layers.GlobalAveragePooling1D()]) for _ in range(2))
    term = FeatureDistillation("tokens", "tokens", VariationalInformationLoss())
    model = DistillModel(students, teachers, [term])
    model.compile("sgd", "mse")
    loss = term.learned[0]
    embedded = layers[1].get_weights()[0][None, 1:3]
    expected = numpy_of(ops.stop_gradient(loss(embedded, embedded))).item()
    values = model.evaluate(np.array([[1, 2, 0, 0]]), np.zeros((1, 3)), verbose=0, return_dict=True)
    assert values["tokens_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (FeatureDistillation("stem", "body", VariationalInformationLoss()), r"the same number of dimensions, 2 to 5\."),
        (FeatureDistillation("body", "body", MaskedGenerativeLoss()), r"positions for mask='spatial'\. Pass mask='ch"),
        (
            FeatureDistillation("stem", "stem", MaskedGenerativeLoss(), adapter=None),
            r"student feature 'stem' and teacher feature 'stem' to have equal shapes\. Pass adapter=.auto",
        ),
    ],
    ids=["dimensions", "positions", "shapes"],
)
def test_shapes_that_do_not_fit_raise_before_training(term: FeatureDistillation, words: str) -> None:
    """As soon as both models are known."""
    with pytest.raises(ValueError, match=words):
        distilled([term])
