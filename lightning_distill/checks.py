"""Checks of user arguments, with errors in one form: the expectation, the value, the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill_core.checks import Checks, message

__all__ = [
    "at_least",
    "between",
    "boolean",
    "closest",
    "device",
    "floating",
    "fraction",
    "inner_dim",
    "integer",
    "message",
    "non_negative",
    "number",
    "one_of",
    "positive",
    "positives",
    "same_shape",
]

_CHECKS = Checks(message)
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


def inner_dim(name: str, value: Any, ndim: int | None = None) -> None:
    """Check that a setting names a dimension other than the batch dimension.

    Args:
        name: Name of the argument, for the message.
        value: The user's value.
        ndim: Number of dimensions of the tensor, where it is known already.

    Raises:
        TypeError: If the value is not an int.
        ValueError: If the value is the batch dimension or outside of the tensor.

    Example:
        >>> inner_dim("class_dim", 0)
        Traceback (most recent call last):
        ValueError: Expected `class_dim` to be other than the batch dimension, but got class_dim=0.
    """
    integer(name, value)
    if value == 0 or (ndim is not None and value == -ndim):
        got = f"{name}={value!r}" + (f" for a tensor of {ndim} dimensions" if ndim is not None else "")
        raise ValueError(message(f"`{name}` to be other than the batch dimension", got))
    if ndim is not None and not -ndim < value < ndim:
        raise ValueError(message(f"`{name}` to be a dimension of a tensor of {ndim} dimensions", f"{name}={value!r}"))


def device(name: str, value: torch.device | str | None, *, present: bool = False) -> torch.device | None:
    """A setting as a device.

    Args:
        name: Name of the argument, for the message.
        value: The user's value; ``None`` stays as it is.
        present: Whether this process must have the device now.

    Raises:
        ValueError: If it does not name a device that holds values, or this process does not have it.

    Example:
        >>> device("device", "gpu")
        Traceback (most recent call last):
        ValueError: Expected `device` to name a device, but got device='gpu'. Pass 'cpu', 'cuda:0' or 'mps'.
    """
    if value is None:
        return None
    try:
        made = torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        made = torch.device("meta")
    got = f"{name}={str(value)!r}"
    if made.type == "meta":
        raise ValueError(message(f"`{name}` to name a device", got, "Pass 'cpu', 'cuda:0' or 'mps'."))
    if present:
        try:
            torch.empty(0, device=made)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(message(f"`{name}` to be a device of this machine", f"{got}: {reason}")) from error
    return made


def temperature(value: Any) -> None:
    """Check that a temperature is a number greater than 0, or a scalar tensor, which may be learned and is not read.

    Args:
        value: The temperature.

    Raises:
        TypeError: If it is neither.
        ValueError: If the number is not greater than 0.

    Example:
        >>> import torch
        >>> temperature(torch.ones(2))
        Traceback (most recent call last):
        TypeError: Expected `temperature` to be a number or a scalar tensor, but got shape (2,).
    """
    if not isinstance(value, Tensor):
        positive("temperature", value)
    elif value.ndim or not value.is_floating_point():
        raise TypeError(message("`temperature` to be a number or a scalar tensor", f"shape {tuple(value.shape)}"))


def floating(name: str, value: Any) -> None:
    """Check that a value is a tensor of real floating point numbers.

    Args:
        name: Name of the argument, for the message.
        value: The user's value.

    Raises:
        TypeError: If the value is not a tensor or holds integers, bools or complex numbers.

    Example:
        >>> import torch
        >>> floating("student", torch.tensor([1, 2]))
        Traceback (most recent call last):
        TypeError: Expected `student` to be a floating point tensor, but got a tensor of torch.int64.
    """
    if not isinstance(value, Tensor):
        raise TypeError(message(f"`{name}` to be a floating point tensor", f"a {type(value).__name__}"))
    if not value.is_floating_point():
        raise TypeError(message(f"`{name}` to be a floating point tensor", f"a tensor of {value.dtype}"))


def several_classes(output: Tensor, remedy: str) -> None:
    """Raise if an output scores a single class: cross entropy is then always 0, and the likeliest class always right.

    Args:
        output: The scores, shape ``(N, C)`` or ``(N, C, ...)``, or another output of one dimension.
        remedy: The last sentence of the message.

    Raises:
        ValueError: If so.
    """
    if output.ndim > 1 and output.shape[1] == 1:
        expected = "the model to score at least 2 classes"
        raise ValueError(message(expected, f"an output of shape {tuple(output.shape)}", remedy))


def same_shape(
    student: Tensor, teacher: Tensor, *, names: tuple[str, str] = ("student", "teacher"), remedy: str = ""
) -> None:
    """Check that two tensors have equal shapes, so that nothing is broadcast silently.

    Args:
        student: The student's tensor, any shape.
        teacher: The teacher's tensor, any shape.
        names: Names of the two tensors in the message.
        remedy: A sentence that says what to do, or an empty string.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> same_shape(torch.ones(2, 3), torch.ones(2, 1))
        Traceback (most recent call last):
        ValueError: Expected `student` and `teacher` to have equal shapes, but got (2, 3) and (2, 1).
    """
    if student.shape != teacher.shape:
        expected = f"`{names[0]}` and `{names[1]}` to have equal shapes"
        raise ValueError(message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}", remedy))
