"""Checks of what users pass, with errors in Keras' form: what was expected, how to mend it, what was received."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras

_SHOWN = 8


def message(expected: str, received: str, remedy: str = "") -> str:
    """Error text in the form all errors of the project share.

    Args:
        expected: What the argument had to be, from the argument's name on.
        received: What came instead.
        remedy: A sentence that says what to do; may be empty.

    Returns:
        The whole message.

    Example:
        >>> message("`p` to be at least 1", "p=0.5", "Take 2.")
        'Expected `p` to be at least 1. Take 2. Received: p=0.5'
    """
    return " ".join(part for part in (f"Expected {expected}.", remedy, f"Received: {received}") if part)


def number(name: str, value: Any) -> None:
    """Check that a setting is a finite int or float; a bool is neither.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is NaN or infinite.

    Example:
        >>> number("weight", True)
        Traceback (most recent call last):
        TypeError: Expected `weight` to be an int or a float. Received: weight=True
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(f"`{name}` to be an int or a float", f"{name}={value!r}"))
    if not math.isfinite(value):
        raise ValueError(message(f"`{name}` to be finite", f"{name}={value!r}"))


def positive(name: str, value: Any) -> None:
    """Check that a setting is a finite number greater than 0.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is not finite or not greater than 0.

    Example:
        >>> positive("temperature", 0.0)
        Traceback (most recent call last):
        ValueError: Expected `temperature` to be greater than 0. Received: temperature=0.0
    """
    number(name, value)
    if value <= 0:
        raise ValueError(message(f"`{name}` to be greater than 0", f"{name}={value!r}"))


def at_least(name: str, value: Any, minimum: float) -> None:
    """Check that a setting is a finite number no smaller than a minimum.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.
        minimum: Smallest value allowed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is not finite or too small.

    Example:
        >>> at_least("p", 0.5, 1)
        Traceback (most recent call last):
        ValueError: Expected `p` to be at least 1. Received: p=0.5
    """
    number(name, value)
    if value < minimum:
        raise ValueError(message(f"`{name}` to be at least {minimum}", f"{name}={value!r}"))


def non_negative(name: str, value: Any) -> None:
    """Check that a setting is a finite number of at least 0.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is not finite or less than 0.

    Example:
        >>> non_negative("weight", -2)
        Traceback (most recent call last):
        ValueError: Expected `weight` to be at least 0. Received: weight=-2
    """
    at_least(name, value, 0)


def positives(name: str, value: Any) -> None:
    """Check that a setting is a list or tuple of finite numbers greater than 0, and not empty.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no list or tuple, or an entry is no int or float.
        ValueError: If the value is empty, or an entry is not finite or not greater than 0.

    Example:
        >>> positives("temperatures", (2.0, 0.0))
        Traceback (most recent call last):
        ValueError: Expected `temperatures[1]` to be greater than 0. Received: temperatures[1]=0.0
    """
    if not isinstance(value, (list, tuple)):
        raise TypeError(message(f"`{name}` to be a list or tuple of numbers", f"{name}={value!r}"))
    if not value:
        raise ValueError(message(f"`{name}` to hold at least one number", f"{name}={value!r}"))
    for index, entry in enumerate(value):
        positive(f"{name}[{index}]", entry)


def between(name: str, value: Any, minimum: float, maximum: float) -> None:
    """Check that a setting is a number of a closed range.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is not finite or out of the range.

    Example:
        >>> between("beta", 1.5, 0, 1)
        Traceback (most recent call last):
        ValueError: Expected `beta` to be from 0 to 1. Received: beta=1.5
    """
    number(name, value)
    if not minimum <= value <= maximum:
        raise ValueError(message(f"`{name}` to be from {minimum} to {maximum}", f"{name}={value!r}"))


def fraction(name: str, value: Any) -> None:
    """Check that a setting is a share of something that must not be the whole.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no int or float.
        ValueError: If the value is not finite, less than 0, or 1 or more.

    Example:
        >>> fraction("skew", 1.0)
        Traceback (most recent call last):
        ValueError: Expected `skew` to be at least 0 and less than 1. Received: skew=1.0
    """
    number(name, value)
    if not 0 <= value < 1:
        raise ValueError(message(f"`{name}` to be at least 0 and less than 1", f"{name}={value!r}"))


def boolean(name: str, value: Any) -> None:
    """Check that a switch is True or False.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.

    Raises:
        TypeError: If the value is no bool.

    Example:
        >>> boolean("standardize", 1)
        Traceback (most recent call last):
        TypeError: Expected `standardize` to be True or False. Received: standardize=1
    """
    if not isinstance(value, bool):
        raise TypeError(message(f"`{name}` to be True or False", f"{name}={value!r}"))


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that a setting is one of a few words.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.
        choices: The words allowed.

    Raises:
        TypeError: If the value is no string.
        ValueError: If the value is none of the words.

    Example:
        >>> one_of("kind", "cosin", ["mse", "cosine"])
        Traceback (most recent call last):
        ValueError: Expected `kind` to be one of 'mse', 'cosine'. Closest: 'cosine'. Received: kind='cosin'
    """
    allowed = list(choices)
    if isinstance(value, str) and value in allowed:
        return
    expected = f"`{name}` to be one of {', '.join(map(repr, allowed))}"
    if not isinstance(value, str):
        raise TypeError(message(expected, f"{name}={value!r}"))
    near = difflib.get_close_matches(value, allowed, n=3)
    raise ValueError(message(expected, f"{name}={value!r}", closest(value, allowed) if near else ""))


def closest(name: str, candidates: Iterable[str]) -> str:
    """Sentence that lists the candidates most like a name that was not found.

    Args:
        name: What the user wrote.
        candidates: The names that exist.

    Returns:
        The close matches, best first; the first few candidates where none is close; nothing where there are none.

    Example:
        >>> closest("layer5", ["stem", "layer3", "layer4", "head"])
        "Closest: 'layer4', 'layer3'."
        >>> closest("encoder", ["stem", "head"])
        "Known: 'stem', 'head'."
    """
    known = [candidate for candidate in candidates if candidate]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"Closest: {', '.join(map(repr, near))}."
    if not known:
        return ""
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"Known: {', '.join(map(repr, known[:_SHOWN]))}{more}."


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
    """Whether two shapes are certainly different; a size that is not known yet (None) may still be equal.

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
        names: What the message calls the two.
        remedy: A sentence that says what to do; may be empty.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> same_shape(keras.ops.ones((2, 3)), keras.ops.ones((2, 1)))
        Traceback (most recent call last):
        ValueError: Expected `student` and `teacher` to have equal shapes. Received: (2, 3) and (2, 1)
    """
    mine, theirs = tuple(student.shape), tuple(teacher.shape)
    if shapes_differ(mine, theirs):
        raise ValueError(message(f"`{names[0]}` and `{names[1]}` to have equal shapes", f"{mine} and {theirs}", remedy))
