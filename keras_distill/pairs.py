"""Which of the student's outputs is compared with which of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from keras_distill import checks
from keras_distill.functional.top_k import TopK, best_scores
from keras_distill.taps import Call, select


def paired_outputs(
    student: Call, teacher: Call, output: int | str | None = None, sample_weight: Any = None
) -> list[tuple[Any, Any, Any]]:
    """The outputs that are compared with each other, and their sample weights.

    Args:
        student: The student's call.
        teacher: The teacher's call.
        output: Which of the outputs, an index or a key; None pairs all of them.
        sample_weight: The batch's weights, for all outputs or nested as they are.

    Returns:
        The student's output, the teacher's and the weights, for each pair; a :class:`TopK` is one output.

    Raises:
        ValueError: If the two models' outputs cannot be paired.

    Example:
        >>> paired_outputs(Call({"a": 1.0, "b": 2.0}), Call({"a": 3.0, "b": 4.0}), "b")
        [(2.0, 4.0, None)]
    """
    mine, theirs = student.output, teacher.output
    if output is not None:
        if keras.tree.is_nested(sample_weight):
            sample_weight = sample_weight[output]
        mine = select(mine, output, "the student's output")
        theirs = theirs if isinstance(theirs, TopK) else select(theirs, output, "the teacher's output")
    elif isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() != theirs.keys():
        received = f"{sorted(mine)} and {sorted(theirs)}"
        raise ValueError(checks.message("both models to have the same outputs", received, "Pass output=<a key>."))
    students = keras.tree.flatten(mine)
    teachers = [theirs] if isinstance(theirs, TopK) else keras.tree.flatten(theirs)
    if isinstance(mine, dict) != isinstance(theirs, dict) and len(students) == len(teachers) > 1:
        received = f"a {type(mine).__name__} and a {type(theirs).__name__}"
        raise ValueError(checks.message("both models to name their outputs, or neither", received))
    if len(students) != len(teachers):
        received = f"{len(students)} and {len(teachers)}"
        raise ValueError(checks.message("both models to have equally many outputs", received, "Pass output=..."))
    nested = isinstance(sample_weight, (dict, list, tuple))
    weights = keras.tree.flatten(sample_weight) if nested else [sample_weight] * len(students)
    return list(zip(students, teachers, weights, strict=True))


def comparable_outputs(student: Call, teacher: Call, output: int | str | None = None) -> Iterator[tuple[Any, Any]]:
    """The paired outputs of equal shape, in which the two models may agree on a class.

    Args:
        student: The student's call.
        teacher: The teacher's call.
        output: Which of the outputs, an index or a key; None pairs all of them.

    Yields:
        The student's logits and the teacher's, or what has the teacher's likeliest class in their place.
    """
    for mine, theirs, _ in paired_outputs(student, teacher, output):
        scores = best_scores(theirs) if isinstance(theirs, TopK) else theirs
        if not checks.shapes_differ(mine.shape, scores.shape):
            yield mine, scores
