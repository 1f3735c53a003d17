"""The first steps of every formula: check both tensors, choose the precision, cut the teacher's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import checks
from keras_distill.functional.primitives import bounded

IGNORE_INDEX = -100

_LOGITS = ("student_logits", "teacher_logits")


def prepare(student: Any, teacher: Any, names: tuple[str, str] = ("student", "teacher")) -> tuple[Any, Any]:
    """Both tensors in one precision of at least float32, the teacher's without gradient.

    Args:
        student: The student's tensor, any shape.
        teacher: The teacher's tensor, any shape.
        names: Names of the two tensors in the message.

    Returns:
        The student's and the teacher's tensor, float32 where both are float32 or narrower, else float64.

    Raises:
        TypeError: If one of them is not a floating point tensor.

    Example:
        >>> student, teacher = prepare(ops.ones(2, dtype="float16"), ops.ones(2, dtype="bfloat16"))
        >>> keras.backend.standardize_dtype(student.dtype), keras.backend.standardize_dtype(teacher.dtype)
        ('float32', 'float32')
    """
    student, teacher = ops.convert_to_tensor(student), ops.convert_to_tensor(teacher)
    checks.floating(names[0], student)
    checks.floating(names[1], teacher)
    dtype = keras.backend.result_type(student.dtype, teacher.dtype, "float32")
    return ops.cast(student, dtype), ops.stop_gradient(ops.cast(teacher, dtype))


def prepare_logits(
    student_logits: Any,
    teacher_logits: Any,
    *,
    from_logits: bool = True,
    at_least: int = 2,
    finite: bool = True,
    same_classes: bool = True,
) -> Any:
    """Both models' logits as :func:`prepare` returns them, after a check of their shapes.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        from_logits: Whether these are logits; probabilities are turned into their logarithms, which are logits too.
        at_least: The fewest classes that the formula makes sense for.
        finite: Whether scores of minus infinity become the least finite score, so that their probability of 0 has a
            finite logarithm.
        same_classes: Whether both models must score the same classes. False compares two vocabularies, whose sizes may
            differ.

    Returns:
        The student's and the teacher's logits, float32 or float64.

    Raises:
        TypeError: If the logits are not floating point tensors, or ``from_logits`` is not a bool.
        ValueError: If the shapes differ, or there are too few classes.

    Example:
        >>> student, teacher = prepare_logits(ops.ones((2, 3), dtype="float16"), ops.zeros((2, 3)))
        >>> keras.backend.standardize_dtype(student.dtype), tuple(teacher.shape)
        ('float32', (2, 3))
    """
    checks.boolean("from_logits", from_logits)
    student, teacher = prepare(student_logits, teacher_logits, _LOGITS)
    shapes = tuple(student.shape), tuple(teacher.shape)
    if same_classes or len(shapes[0]) != len(shapes[1]):
        checks.same_shape(student, teacher, names=_LOGITS, remedy="Both models must score the same classes.")
    elif checks.shapes_differ(shapes[0][:-1], shapes[1][:-1]):
        expected = "`student_logits` and `teacher_logits` to have equal shapes"
        remedy = "Both models must score the same rows, and only the number of classes may differ."
        raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}", remedy))
    if len(shapes[0]) < 2:
        expected = "`student_logits` to have a batch dimension and a class dimension"
        raise ValueError(checks.message(expected, f"shape {shapes[0]}", "Expand the last dimension of single scores."))
    for name, shape in zip(_LOGITS, shapes, strict=True):
        if shape[-1] is not None and shape[-1] < at_least:
            # The softmax over one class is always 1: the loss would be zero for any student.
            expected = f"`{name}` to have at least {at_least} classes in the last dimension"
            remedy = "Use BinarySoftTargetLoss for a single score before a sigmoid, or LogitMSELoss for a regression."
            raise ValueError(checks.message(expected, f"shape {shape}", remedy))
    if not from_logits:
        return logarithm(student), logarithm(teacher)
    return (bounded(student), bounded(teacher)) if finite else (student, teacher)


def prepare_labels(labels: Any, logits: Any) -> Any:
    """Class indices as int32, one for each row of logits.

    Args:
        labels: Class index of each row, shape ``(N, ...)`` or ``(N, ..., 1)``.
        logits: Shape ``(N, ..., C)``.

    Returns:
        Shape ``(N, ...)``.

    Raises:
        ValueError: If the labels do not fit.
    """
    labels = ops.cast(ops.convert_to_tensor(labels), "int32")
    if len(labels.shape) == len(logits.shape) and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    rows = tuple(logits.shape)[:-1]
    if checks.shapes_differ(tuple(labels.shape), rows):
        expected = f"`labels` to have one class index for each row of logits, shape {rows}"
        remedy = "Pass class indices; keras.ops.argmax(labels, axis=-1) makes them from one-hot or mixed labels."
        raise ValueError(checks.message(expected, f"shape {tuple(labels.shape)}", remedy))
    return labels


def ignored(labels: Any, ignore_index: int = IGNORE_INDEX) -> Any:
    """Rows without a class, which do not count: their label is negative or ``ignore_index``.

    Args:
        labels: Class indices, any shape.
        ignore_index: A label that marks rows without a class, beside the negative ones.

    Returns:
        True where a label is ignored, same shape.

    Example:
        >>> ops.convert_to_numpy(ignored(ops.array([2, -100, 255, -1]), 255))
        array([False,  True,  True,  True])
    """
    labels = ops.convert_to_tensor(labels)
    return ops.logical_or(ops.less(labels, 0), ops.equal(labels, ops.cast(ignore_index, labels.dtype)))


def prepare_equal(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Two features of equal shape as :func:`prepare` returns them.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, same shape.

    Returns:
        Both features, in float32 or better.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the batch dimension is missing.
    """
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy="Map the student's feature to the teacher's shape with an adapter.")
    if len(student.shape) < 1:
        raise ValueError(checks.message("`student` to have a batch dimension", "shape ()"))
    return student, teacher


def prepare_temperature(temperature: Any, like: Any) -> Any:
    """A temperature, a number or a variable that a schedule sets, in the precision of the logits.

    Args:
        temperature: A number greater than 0, or a scalar variable.
        like: The logits.

    Returns:
        The number itself, or a scalar tensor.

    Raises:
        TypeError: If it is neither.
        ValueError: If the number is not greater than 0.
    """
    return prepare_number("temperature", temperature, like, checks.positive)


def prepare_number(name: str, value: Any, like: Any, check: Callable[[str, Any], None]) -> Any:
    """A setting, a number or a variable that a schedule sets, in the precision of the logits.

    Args:
        name: Name of the setting.
        value: A number, or a scalar variable.
        like: The logits, or a loss of them.
        check: Called with the name and a number; raises if the number is not allowed.

    Returns:
        The number itself, or a scalar tensor.

    Raises:
        TypeError: If the check raises it.
        ValueError: If the check raises it.
    """
    if isinstance(value, keras.Variable) or ops.is_tensor(value):
        return ops.cast(ops.convert_to_tensor(value), like.dtype)
    check(name, value)
    return float(value)


def epsilon_of(tensor: Any) -> float:
    """Relative rounding error of a float32 or float64 tensor."""
    return float(np.finfo(keras.backend.standardize_dtype(tensor.dtype)).eps)


def logarithm(probabilities: Any) -> Any:
    """Logarithm of probabilities, finite also for a probability of 0."""
    # The smallest normal number, not keras.config.epsilon(): with 50,000 classes most probabilities lie below 1e-7.
    tiny = float(np.finfo(keras.backend.standardize_dtype(probabilities.dtype)).tiny)
    return ops.log(ops.maximum(probabilities, tiny))


def log_odds(probabilities: Any) -> Any:
    """The logits of which the sigmoid makes these probabilities, finite also for probabilities of 0 and 1."""
    return logarithm(probabilities) - logarithm(1.0 - probabilities)
