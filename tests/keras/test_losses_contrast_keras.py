"""ContrastiveRepresentationLoss in Keras: published numbers, memories, rows from inputs and caches, files, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import oracle_learned as oracle
import pytest
from keras import layers, ops
from loss_case import golden_arrays, golden_index

from keras_distill import ContrastiveRepresentationLoss, DistillModel, FeatureDistillation, TeacherCache, functional

GOLDEN = golden_index("crd")


def drawn(seed: int, count: int = 8, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype("float32")


def embedder(width: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,), name="x")
    return keras.Model({"x": inputs}, layers.Dense(width, name="body")(inputs))


def contrast(index: Any = "row", **settings: Any) -> FeatureDistillation:
    loss = ContrastiveRepresentationLoss(**{"size": 8, "width": 4, **settings})
    return FeatureDistillation("body", "body", loss, index=index, name="contrast")


def distilled(**settings: Any) -> DistillModel:
    model = DistillModel(embedder(3, 1), embedder(5, 2), contrast(**settings))
    model.compile(keras.optimizers.SGD(0.1))
    return model


def memories(model: DistillModel) -> dict[str, np.ndarray]:
    layer = model.terms[0].learned[0].layer
    names = ("student_memory", "teacher_memory", "log_normalizers")
    return {name: np.array(ops.convert_to_numpy(getattr(layer, name))) for name in names if hasattr(layer, name)}


@pytest.mark.tensorflow  # the others compute a float64 array in float32
@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["case"])
def test_value_and_memories_are_the_published_ones(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, reference = golden_arrays(entry), entry["hyperparameters"]
    names = {"size": "n_data", "width": "feat_dim", "negatives": "nce_k", "temperature": "nce_t", "momentum": "nce_m"}
    loss = ContrastiveRepresentationLoss(**{name: reference[key] for name, key in names.items()}, dtype="float64")
    loss.build(arrays["student_feat"].shape, arrays["teacher_feat"].shape)
    for side, short, memory in (("student", "s", "v1"), ("teacher", "t", "v2")):
        embedding = getattr(loss.layer, f"{side}_embedding")
        embedding.kernel.assign(arrays[f"param_embed_{short}.linear.weight"].T)
        embedding.bias.assign(arrays[f"param_embed_{short}.linear.bias"])
        getattr(loss.layer, f"{side}_memory").assign(arrays[f"memory_{memory}"])
    monkeypatch.setattr(loss, "_chosen", lambda index: ops.convert_to_tensor(arrays["contrast_idx"], "int32"))
    constants = [float(arrays[f"Z_{side}_initial"]) for side in ("v1", "v2")]
    if min(constants) > 0:
        loss.layer.log_normalizers.assign(np.log(constants))
    loss.training = True
    value = loss((arrays["teacher_feat"], arrays["idx"]), arrays["student_feat"])
    assert float(value) == pytest.approx(float(arrays["loss"]), rel=2e-6)  # the authors' eps of 1e-7
    for side, memory in (("student", "v1"), ("teacher", "v2")):
        after = ops.convert_to_numpy(getattr(loss.layer, f"{side}_memory"))
        np.testing.assert_allclose(after, arrays[f"memory_{memory}_after"], rtol=1e-7)
    used = [float(arrays["Z_v1_used"]), float(arrays["Z_v2_used"])]
    np.testing.assert_allclose(np.exp(ops.convert_to_numpy(loss.layer.log_normalizers)), used)


def test_negatives_are_drawn_from_all_other_examples_alone() -> None:
    loss = ContrastiveRepresentationLoss(size=5, negatives=3, width=2)
    loss.build((None, 3), (None, 3))
    index = ops.convert_to_tensor([0, 4, 2], "int32")
    chosen = np.stack([ops.convert_to_numpy(loss._chosen(index)) for _ in range(200)])
    assert (chosen[..., 0] == [0, 4, 2]).all()
    for place, own in enumerate((0, 4, 2)):
        counts = np.bincount(chosen[:, place, 1:].ravel(), minlength=5)
        assert counts[own] == 0
        assert np.abs(counts[[row for row in range(5) if row != own]] - 150).max() < 55  # five standard deviations


@pytest.mark.not_jax
def test_fit_reads_rows_from_the_inputs_and_evaluation_leaves_the_term_out() -> None:
    model, x = distilled(normalizer=2.0), drawn(0)
    rows = np.array([6, 1, 0, 3, 2, 5, 4, 7])
    before = memories(model)
    layer = model.terms[0].learned[0].layer
    features = [
        ops.convert_to_numpy(keras.Model(network.inputs, network.get_layer("body").output)({"x": x[:4]}))
        for network in (model.student, model.teacher)
    ]
    parameters = {
        f"{side}_embedding.{kind}": ops.convert_to_numpy(value).T
        for side in ("student", "teacher")
        for kind, value in zip(("weight", "bias"), getattr(layer, f"{side}_embedding").weights, strict=True)
    }
    settings: dict[str, Any] = {"size": 8, "width": 4, "temperature": 0.07, "normalizer": 2.0}
    expected = oracle.contrastive_representation(*features, parameters=parameters | before, index=rows[:4], **settings)
    history = model.fit({"x": x[:4], "row": rows[:4]}, batch_size=4, shuffle=False, verbose=0).history
    assert history["contrast_loss"][0] == pytest.approx(expected, rel=1e-4)
    after = memories(model)
    for name in ("student_memory", "teacher_memory"):
        changed = (after[name] != before[name]).any(axis=1)
        assert sorted(np.flatnonzero(changed)) == [0, 1, 3, 6]
        np.testing.assert_allclose(np.linalg.norm(after[name], axis=1), 1, rtol=1e-5)
    results = model.evaluate({"x": drawn(1, 20)}, return_dict=True, verbose=0)
    assert "contrast_loss" not in results
    assert all(np.array_equal(values, after[name]) for name, values in memories(model).items())


@pytest.mark.not_jax
def test_validation_within_fit_has_no_value_of_the_term() -> None:
    model, x = distilled(), {"x": drawn(0), "row": np.arange(8)}
    history = model.fit(x, validation_data=({"x": drawn(1, 20)},), epochs=2, verbose=0).history
    assert "contrast_loss" in history
    assert not [name for name in history if name.startswith("val_") and "contrast" in name]


@pytest.mark.tensorflow  # on torch no term without a teacher can make its parts after the optimizer
def test_a_cache_with_features_knows_the_rows(tmp_path: Path) -> None:
    x = {"x": drawn(0)}
    cache = TeacherCache.build(embedder(5, 2), x, tmp_path, layers=["body"])
    model = DistillModel(embedder(3, 1), None, contrast(None))
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(cache.attach(x, batch_size=4, shuffle=True), steps_per_epoch=1, verbose=0)
    first = memories(model)
    model.fit(cache.attach(x, batch_size=4, shuffle=True), verbose=0)
    assert first["student_memory"].shape == (8, 4)
    assert (memories(model)["student_memory"] != first["student_memory"]).any(axis=1).all()
    assert np.isfinite(first["log_normalizers"]).all()


@pytest.mark.not_jax
def test_a_file_keeps_memories_constants_and_the_place_of_the_rows(tmp_path: Path) -> None:
    model, x = distilled(), {"x": drawn(0), "row": np.arange(8)}
    model.fit(x, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.terms[0].index == "row"
    for name, values in memories(model).items():
        np.testing.assert_array_equal(memories(loaded)[name], values)
    assert sorted(weight.name for weight in model.student.weights) == ["bias", "kernel"]


@pytest.mark.not_jax
@pytest.mark.parametrize(
    ("term", "x", "words"),
    [
        (
            contrast(None),
            {},
            r"`index` to say where the inputs keep the row .*\. Pass the inputs as a dict.*index=None",
        ),
        (
            contrast("number"),
            {"row": np.arange(8)},
            "the inputs to hold the rows 'number'.*index=<that key>.*'row', 'x'",
        ),
        (contrast(), {"row": np.ones(8, "float32")}, "integers of shape .*float32 of shape"),
        (contrast(), {"row": np.ones((8, 2), "int32")}, "integers of shape"),
        (contrast(), {"row": np.arange(8) + 1}, "`index` to be rows of the data set, 0 to 7"),
    ],
)
def test_rows_that_are_not_known_are_an_error(term: Any, x: dict[str, Any], words: str) -> None:
    model = DistillModel(embedder(3, 1), embedder(5, 2), term)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    with pytest.raises(ValueError, match=words):
        model.fit({"x": drawn(0), **x}, verbose=0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ContrastiveRepresentationLoss(size=1), ValueError, "`size` to be at least 2"),
        (lambda: ContrastiveRepresentationLoss(negatives=0), ValueError, "`negatives` to be at least 1"),
        (lambda: ContrastiveRepresentationLoss(width=1.5), TypeError, "`width` to be an int"),
        (lambda: ContrastiveRepresentationLoss(temperature=0), ValueError, "`temperature` to be greater than 0"),
        (lambda: ContrastiveRepresentationLoss(momentum=1), ValueError, "`momentum` to be"),
        (lambda: ContrastiveRepresentationLoss(normalizer=-1), ValueError, "`normalizer` to be greater than 0"),
        (
            lambda: ContrastiveRepresentationLoss()((drawn(0), np.arange(8)), drawn(1)),
            ValueError,
            "to be built before it is called",
        ),
        (
            lambda: DistillModel(embedder(3, 1), embedder(5, 2), contrast(size=None)),
            ValueError,
            r"`size` to be the number of examples in the data set\. .*size=cache.manifest.length",
        ),
        (
            lambda: FeatureDistillation("body", "body", "mse", index="row"),
            ValueError,
            "`index` to be None for FeatureDistance, which needs no rows",
        ),
        (
            lambda: functional.contrastive_representation(
                drawn(0), drawn(1), student_entries=drawn(2)[:, None], teacher_entries=drawn(3)[:, None], size=9
            ),
            ValueError,
            r"`student_entries` to hold an example's own entry .*\(N, K \+ 1, D\)",
        ),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_built_loss_says_that_it_needs_rows() -> None:
    loss = ContrastiveRepresentationLoss(size=8, width=2)
    loss.build((None, 4), (None, 4))
    with pytest.raises(ValueError, match=r"`y_true` to be the pair \(teacher_feature, rows\)"):
        loss(drawn(0), drawn(1))


def test_settings_are_kept_in_the_config() -> None:
    loss = ContrastiveRepresentationLoss(size=7, negatives=3, normalizer=2.0)
    again = ContrastiveRepresentationLoss.from_config(loss.get_config())
    assert (again.size, again.negatives, again.width, again.temperature, again.normalizer) == (7, 3, 128, 0.07, 2.0)
