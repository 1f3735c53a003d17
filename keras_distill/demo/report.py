"""The demonstration's proof: its best student, saved and loaded without this library."""

from __future__ import annotations

from pathlib import Path

import keras

from distill_core.demo_report import best_run, proof
from distill_core.guidance.comparison import Comparison
from keras_distill.demo.digits import Array, hit_rate, make_student, predict


def prove_plain(path: Path, comparison: Comparison, test: tuple[Array, Array]) -> str:
    """The best student with few labels, saved, loaded as any Keras model is, and tested again.

    Args:
        path: File to write.
        comparison: The comparison with few labels, which has kept the weights of its students.
        test: Images ``(N, 8, 8, 1)`` and classes ``(N,)``.

    Returns:
        The proof in words.
    """
    best = best_run(comparison)
    student = make_student()
    student.load_weights(comparison.folder / str(best.weights))
    student.save(path)
    bare = keras.saving.load_model(path)
    accuracy = hit_rate(predict(bare, test[0]) == test[1])
    return proof(path, best, "by keras.saving.load_model", accuracy)
