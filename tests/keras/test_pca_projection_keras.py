"""Projections that start in the teacher's principal components, in Keras (V21)."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_distill import DistillModel, FeatureDistillation, PCAProjection

FEATURES = np.random.default_rng(0).normal(size=(40, 5)) * [3, 1, 0.5, 0.1, 2] + 1


def network(width: int) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(width, name="body"), keras.layers.Dense(3)])


def model() -> DistillModel:
    term = FeatureDistillation("body", "body", adapter=PCAProjection(FEATURES))
    made = DistillModel(network(2), network(5), term)
    made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def components() -> np.ndarray:
    centred = FEATURES - FEATURES.mean(0)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:2]
    return vectors * np.sign([row[np.abs(row).argmax()] for row in vectors])[:, None]


def test_the_adapter_starts_in_the_components() -> None:
    adapter = PCAProjection(FEATURES)((None, 2), (None, 5))
    weights, mean = adapter.get_weights()
    np.testing.assert_allclose(weights, components(), atol=1e-5)
    np.testing.assert_allclose(mean, FEATURES.mean(0), atol=1e-5)


def test_it_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).normal(size=(16, 4)).astype("float32"), np.arange(16) % 3
    trained = model()
    trained.fit(x, y, verbose=0)
    (adapter,) = trained.terms[0].adapters
    weights = adapter.get_weights()
    assert not np.allclose(weights[0], components())

    trained.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    for before, after in zip(weights, loaded.terms[0].adapters[0].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_term_made_from_its_config_starts_there_too() -> None:
    term = FeatureDistillation.from_config(model().terms[0].get_config())
    np.testing.assert_allclose(term.adapter((None, 2), (None, 5)).get_weights()[0], components(), atol=1e-5)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="with two rows or more, but got"):
        PCAProjection(np.ones(4))
    with pytest.raises(ValueError, match="to have the 7 dimensions of the teacher's layer, but got 5"):
        PCAProjection(FEATURES)((None, 2), (None, 7))
    with pytest.raises(ValueError, match="the features of both networks to have a fixed width"):
        PCAProjection(FEATURES)((None, None), (None, 5))
