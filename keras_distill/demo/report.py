"""The demonstration's proof: its best student, saved and loaded without this library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from distill_core.demo_report import Run, best_run, proof
from keras_distill.demo.digits import Array, hit_rate, make_student, predict


def prove_plain(
    path: Path,
    runs: Sequence[Run],
    students: Mapping[tuple[str, str, int], list[Array]],
    test: tuple[Array, Array],
) -> dict[str, Any]:
    """The best student with few labels, saved, loaded as any Keras model is, and tested again.

    Args:
        path: File to write.
        runs: The teacher's run, then the students'.
        students: Each student's weights by labels, method and seed.
        test: Images ``(N, 8, 8, 1)`` and classes ``(N,)``.

    Returns:
        The saved run, its accuracy before and after, and the proof in words.
    """
    best = best_run(runs)
    weights = students[best.labels, best.method, best.seed]
    student = make_student(best.seed)
    student.set_weights(weights)
    student.save(path)
    bare = keras.saving.load_model(path)
    accuracy = hit_rate(predict(bare, test[0]) == test[1])
    return proof(path, best, "by keras.saving.load_model", accuracy)
