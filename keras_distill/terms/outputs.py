"""Pair the student's outputs with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.functional.top_k import TopK
from keras_distill.recording import Call, select
from keras_distill.recording.taps import entry_at


def output_names(student: keras.Model) -> tuple[str, ...]:
    """The names of a functional student's outputs, in their order; empty for other students."""
    return tuple(getattr(student, "output_names", None) or ())


def by_output(values: Any, output: Any, names: Sequence[str]) -> Any:
    """Labels or weights in the structure of a model's outputs, paired as Keras pairs them for the compiled loss.

    Args:
        values: One value for all outputs, or one for each in a dict, list or tuple.
        output: The model's output.
        names: Names of the model's outputs in their order, if they are known.

    Returns:
        A dict belongs to named outputs by their keys, also if the outputs are a list; other keys are left out, and an
        output without a value gets None. A list belongs to a dict of outputs in the order of the sorted keys.

    Example:
        >>> by_output({"a": 1, "b": 2}, [0.0, 0.0], names=["b", "a"])
        [2, 1]
    """
    if isinstance(values, (list, tuple)) and isinstance(output, dict) and len(values) == len(output):
        return dict(zip(sorted(output), values, strict=True))
    if not isinstance(values, dict):
        return values
    if isinstance(output, dict):
        return {key: values.get(key) for key in output} if output.keys() & values.keys() else values
    if not names or not set(names) & values.keys():
        return values
    if isinstance(output, (list, tuple)):
        return [values.get(name) for name in names] if len(names) == len(output) else values
    return values.get(names[0])


def paired_outputs(
    student: Call,
    teacher: Call,
    output: int | str | None = None,
    sample_weight: Any = None,
    names: Sequence[str] = (),
) -> list[tuple[Any, Any, Any]]:
    """Pair the outputs of the two models, with their sample weights.

    Args:
        student: The student's call.
        teacher: The teacher's call.
        output: Which of the outputs, an index or a key; None pairs all of them.
        sample_weight: The batch's weights, one tensor for all outputs or nested like the outputs.
        names: Names of the student's outputs in their order, for weights in a dict.

    Returns:
        For each pair the student's output, the teacher's, its weights or None; a :class:`TopK` counts as one output.

    Raises:
        ValueError: If the two models' outputs cannot be paired.

    Example:
        >>> paired_outputs(Call({"a": 1.0, "b": 2.0}), Call({"a": 3.0, "b": 4.0}), "b")
        [(2.0, 4.0, None)]
    """
    student_output, teacher_output = student.output, teacher.output
    sample_weight = by_output(sample_weight, student_output, names)
    if output is not None:
        if keras.tree.is_nested(sample_weight):
            sample_weight = entry_at(sample_weight, [output])
        student_output = select(student_output, output, "the student's output")
        if not isinstance(teacher_output, TopK):
            teacher_output = select(teacher_output, output, "the teacher's output")
    elif isinstance(student_output, dict) and isinstance(teacher_output, dict):
        if student_output.keys() != teacher_output.keys():
            received = f"{sorted(student_output)} and {sorted(teacher_output)}"
            raise ValueError(checks.message("both models to have the same outputs", received, "Pass output=<a key>."))
    else:
        _refuse_ambiguous(student)
        _refuse_ambiguous(teacher)
    students = keras.tree.flatten(student_output)
    teachers = [teacher_output] if isinstance(teacher_output, TopK) else keras.tree.flatten(teacher_output)
    named = isinstance(student_output, dict), isinstance(teacher_output, dict)
    if named[0] != named[1] and len(students) == len(teachers) > 1:
        received = f"a {type(student_output).__name__} and a {type(teacher_output).__name__}"
        raise ValueError(checks.message("both models to name their outputs, or neither", received))
    if len(students) != len(teachers):
        received = f"{len(students)} and {len(teachers)}"
        raise ValueError(checks.message("both models to have the same number of outputs", received, "Pass output=..."))
    nested = isinstance(sample_weight, (dict, list, tuple))
    weights = keras.tree.flatten(sample_weight) if nested else [sample_weight] * len(students)
    if len(weights) != len(students):
        expected = f"sample weights for each of the {len(students)} outputs, or one for all of them"
        raise ValueError(checks.message(expected, f"{len(weights)}"))
    return list(zip(students, teachers, weights, strict=True))


def _refuse_ambiguous(call: Call) -> None:
    """Refuse several tensors of different shapes from a subclassed model: some may not be logits.

    Raises:
        ValueError: If the call returned such tensors.
    """
    if call.declared or isinstance(call.output, (dict, TopK)) or not isinstance(call.output, (list, tuple)):
        return
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in keras.tree.flatten(call.output)]
    if len(set(shapes)) > 1:
        expected = f"the {call.who} to return one tensor, or several that are named in a dict"
        remedy = "Pass LogitsDistillation(output=<the index of the logits>)."
        raise ValueError(checks.message(expected, f"a {type(call.output).__name__} of shapes {shapes}", remedy))
