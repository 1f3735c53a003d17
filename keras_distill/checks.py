"""Checks of user arguments, with errors in Keras' form: the expectation, the remedy, the value received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from distill_core.checks import Checks


def message(expected: str, received: str, remedy: str = "") -> str:
    """Error text in the form all errors of the project share.

    Args:
        expected: The condition, beginning with the argument's name.
        received: The received value.
        remedy: A sentence that tells the user what to do, or an empty string.

    Returns:
        The whole message.

    Example:
        >>> message("`p` to be at least 1", "p=0.5", "Take 2.")
        'Expected `p` to be at least 1. Take 2. Received: p=0.5'
    """
    return " ".join(part for part in (f"Expected {expected}.", remedy, f"Received: {received}") if part)


_CHECKS = Checks(message, shown=8)
number = _CHECKS.number
integer = _CHECKS.integer
positive = _CHECKS.positive
positives = _CHECKS.positives
non_negative = _CHECKS.non_negative
at_least = _CHECKS.at_least
between = _CHECKS.between
fraction = _CHECKS.fraction
boolean = _CHECKS.boolean
one_of = _CHECKS.one_of
closest = _CHECKS.closest


def floating(name: str, value: Any) -> None:
    """Check that a tensor holds real floating point numbers.

    Args:
        name: Name of the argument, for the message.
        value: A tensor of the backend.

    Raises:
        TypeError: If it holds integers, bools or complex numbers.

    Example:
        >>> floating("student", keras.ops.convert_to_tensor([1, 2], dtype="int32"))
        Traceback (most recent call last):
        TypeError: Expected `student` to be a floating point tensor. Received: a tensor of int32
    """
    dtype = keras.backend.standardize_dtype(value.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise TypeError(message(f"`{name}` to be a floating point tensor", f"a tensor of {dtype}"))


def shapes_differ(first: Sequence[int | None], second: Sequence[int | None]) -> bool:
    """Tell whether two shapes are certainly different; a size that is not known yet (None) may still be equal.

    Args:
        first: A shape.
        second: Another shape.

    Returns:
        True where the numbers of dimensions or two known sizes differ.

    Example:
        >>> shapes_differ((None, 3), (8, 3)), shapes_differ((8, 3), (8, 1))
        (False, True)
    """
    if len(first) != len(second):
        return True
    return any(a is not None and b is not None and a != b for a, b in zip(first, second, strict=True))


def same_shape(
    student: Any, teacher: Any, *, names: tuple[str, str] = ("student", "teacher"), remedy: str = ""
) -> None:
    """Check that two tensors have equal shapes, so that nothing is broadcast silently.

    Args:
        student: The student's tensor, any shape.
        teacher: The teacher's tensor, any shape.
        names: Names of the two tensors in the message.
        remedy: A sentence that tells the user what to do, or an empty string.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> same_shape(keras.ops.ones((2, 3)), keras.ops.ones((2, 1)))
        Traceback (most recent call last):
        ValueError: Expected `student` and `teacher` to have equal shapes. Received: (2, 3) and (2, 1)
    """
    student_shape, teacher_shape = tuple(student.shape), tuple(teacher.shape)
    if shapes_differ(student_shape, teacher_shape):
        expected = f"`{names[0]}` and `{names[1]}` to have equal shapes"
        raise ValueError(message(expected, f"{student_shape} and {teacher_shape}", remedy))
