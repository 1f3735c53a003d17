"""Losses that are computed in chunks of rows: value and gradient do not depend on the chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras_loss_cases import Result, differentiated

from keras_distill import AttentionRelationLoss, InterChannelCorrelationLoss, RelationalLoss
from keras_distill.functional import vectors

FEATURES = [np.random.default_rng(seed).normal(size=(7, 2, 3, 5)).astype("float32") for seed in (1, 2)]
TOKENS = [np.random.default_rng(seed).normal(size=(7, 3, 10)).astype("float32") for seed in (1, 2)]
# The features, and how many numbers the largest tensor has for each row.
LOSSES = {
    "angles": (RelationalLoss(distance_weight=0.0), FEATURES, 49),
    "channels": (InterChannelCorrelationLoss(), FEATURES, 25),
    "attention": (AttentionRelationLoss(relation_heads=5), TOKENS, 45),
}

every_loss = pytest.mark.parametrize("name", LOSSES)
# One row, three rows (the last chunk is not full), all of them.
every_chunk = pytest.mark.parametrize("numbers", [1, 3 * 49, 7 * 49], ids=str)


def same(result: Result, other: Result) -> None:
    np.testing.assert_allclose(result.value, other.value, rtol=1e-6)
    np.testing.assert_allclose(result.student, other.student, rtol=1e-4, atol=1e-6 * np.abs(other.student).max())
    assert result.teacher is None


@every_loss
@every_chunk
def test_chunks_change_neither_value_nor_gradient(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, features, row_size = LOSSES[name]
    whole = differentiated(loss, *features)
    calls = counted(monkeypatch)
    monkeypatch.setattr(vectors, "_CHUNK", numbers)
    same(differentiated(loss, *features), whole)
    assert bool(calls) == (numbers < 7 * row_size)


def test_equal_chunks_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight examples in chunks of at most three are four chunks of two: padding would copy all of them."""
    loss, features = LOSSES["channels"][0], [np.concatenate([feature, feature[:1]]) for feature in FEATURES]
    whole = differentiated(loss, *features)
    calls = counted(monkeypatch)
    monkeypatch.setattr(vectors, "_CHUNK", 3 * 25)
    monkeypatch.delattr(vectors.ops, "pad")
    same(differentiated(loss, *features), whole)
    assert tuple(calls[0][0].shape[:2]) == (4, 2)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows whenever something is done in chunks."""
    calls: list[Any] = []
    original = vectors.ops.map

    def counting(function: Callable[..., Any], rows: Any) -> Any:
        calls.append(rows)
        return original(function, rows)

    monkeypatch.setattr(vectors.ops, "map", counting)
    return calls


@pytest.mark.tensorflow
@every_loss
@every_chunk
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_chunks_of_a_batch_of_unknown_size(name: str, numbers: int, jit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `fit`, whose last batch may be smaller: examples and positions are known only when the graph runs."""
    import tensorflow as tf

    loss, features, _ = LOSSES[name]
    whole = differentiated(loss, *features)
    monkeypatch.setattr(vectors, "_CHUNK", numbers)
    unknown = tf.TensorSpec([None] * (features[0].ndim - 1) + [features[0].shape[-1]])

    @tf.function(input_signature=[unknown] * 2, jit_compile=jit)
    def gradient(student: Any, teacher: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = loss(teacher, student)
        return value, tape.gradient(value, student)

    value, student = (tensor.numpy() for tensor in gradient(*features))
    np.testing.assert_allclose(value, whole.value, rtol=1e-5)
    np.testing.assert_allclose(student, whole.student, rtol=1e-4, atol=1e-5 * np.abs(whole.student).max())
