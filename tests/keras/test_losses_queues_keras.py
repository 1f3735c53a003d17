"""The queue of the teacher's embeddings in Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import oracle_learned as oracle
import pytest
from keras import layers, ops

from keras_distill import DistillModel, FeatureDistillation, QueueSimilarityLoss, functional


def drawn(seed: int, count: int = 4, width: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype("float32")


def embedder(width: int, name: str) -> keras.Model:
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(width, name="embed")(inputs), name=name)


@pytest.mark.not_jax
def test_a_training_step_adds_the_batch_and_evaluation_leaves_the_queue_alone() -> None:
    student, teacher = embedder(5, "student"), embedder(5, "teacher")
    model = DistillModel(student, teacher, FeatureDistillation("embed", "embed", QueueSimilarityLoss(size=6)))
    model.compile(keras.optimizers.SGD(0.1))
    queue = model.terms[0].learned[0].layer.queue
    x = drawn(0)
    before = ops.convert_to_numpy(queue).copy()
    expected = oracle.queue_similarity(
        ops.convert_to_numpy(student(x)), ops.convert_to_numpy(teacher(x)), parameters={"queue": before}, size=6
    )
    assert model.evaluate(x, return_dict=True, verbose=0)["embed_loss"] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(ops.convert_to_numpy(queue), before)
    history = model.fit(x, batch_size=4, shuffle=False, verbose=0).history
    assert history["embed_loss"][0] == pytest.approx(expected, rel=1e-4)
    embeddings = ops.convert_to_numpy(teacher(x))
    newest = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(ops.convert_to_numpy(queue), np.concatenate([newest, before[:2]]), rtol=1e-5, atol=1e-6)
    assert sorted(weight.name for weight in student.weights) == ["bias", "kernel"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QueueSimilarityLoss(size=0), ValueError, "`size` to be at least 1"),
        (lambda: QueueSimilarityLoss(size=1.5), TypeError, "`size` to be an int"),
        (lambda: QueueSimilarityLoss(student_temperature=0), ValueError, "`student_temperature` to be greater than 0"),
        (lambda: QueueSimilarityLoss()(drawn(0), drawn(1)), ValueError, "to be built before it is called"),
        (
            lambda: QueueSimilarityLoss(size=2).build((None, 4, 3), (None, 4, 3)),
            ValueError,
            r'embeddings \(N, D\) of equal width\. Pass adapter="pool"',
        ),
        (
            lambda: functional.queue_similarity(drawn(0), drawn(1), queue=drawn(2, 2, 4)),
            ValueError,
            r"`queue` to hold embeddings of width 3, shape \(K, 3\)",
        ),
        (
            lambda: functional.queue_similarity(ops.ones((2, 3, 4)), ops.ones((2, 3, 4)), queue=ops.ones((2, 4))),
            ValueError,
            r"embeddings of shape \(N, D\)",
        ),
    ],
)
def test_bad_settings_and_features_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_settings_are_kept_in_the_config() -> None:
    loss = QueueSimilarityLoss(size=7, teacher_temperature=0.05)
    again = QueueSimilarityLoss.from_config(loss.get_config())
    assert (again.size, again.student_temperature, again.teacher_temperature) == (7, 0.2, 0.05)
