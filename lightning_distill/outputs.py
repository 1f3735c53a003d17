"""What networks and layers return: tensors, and tuples, lists, dicts, dataclasses and model outputs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def select(value: Any, output: int | str | Callable[[Any], Tensor] | None, what: str) -> Tensor:
    """The tensor that ``output`` picks from ``value``, or the obvious one where ``output`` is ``None``.

    Obvious are, in this order: the tensor itself; the entry named ``"logits"`` of a dict, model output or dataclass;
    its only tensor; the first element of a tuple or list.

    Args:
        value: What a network or a layer returned.
        output: An index, a key or field name, a callable, or ``None``.
        what: Name of the value in error messages.

    Returns:
        The tensor.

    Raises:
        ValueError: If nothing is obvious, or ``output`` does not pick a tensor; the message lists what there is.

    Example:
        >>> import torch
        >>> select({"logits": torch.ones(2, 3), "state": torch.zeros(2)}, None, "the student's output").shape
        torch.Size([2, 3])
    """
    if isinstance(value, Tensor) and output is None:
        return value
    picked: Any = None
    entries = _entries(value)
    if callable(output):
        picked = output(value)
    elif isinstance(value, Tensor):
        raise ValueError(f"Expected `output` to be None where {what} is a tensor, but got output={output!r}.")
    elif output is not None:
        position = output + len(entries) if isinstance(output, int) and output < 0 else output
        key = list(entries)[position] if isinstance(position, int) and 0 <= position < len(entries) else position
        picked = entries.get(key)
    elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        picked = value[0] if value else None
    else:
        tensors = {key: entry for key, entry in entries.items() if isinstance(entry, Tensor)}
        picked = tensors.get("logits", next(iter(tensors.values())) if len(tensors) == 1 else None)
    if not isinstance(picked, Tensor):
        there = ", ".join(f"{key!r}: {_describe(entry)}" for key, entry in entries.items()) or _describe(value)
        remedy = "Pass Tap(layer, output=...), or override `logits` for the model's output"
        raise ValueError(
            f"Expected `output` to pick one tensor of {what}, but got output={output!r}. {remedy}; there is {there}."
        )
    return picked


def _entries(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):
        return {name: getattr(value, name) for name in value._fields}
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return {}


def _describe(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, function) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(entry, function) for entry in value])
    if isinstance(value, dict):
        copied = dict(value) if type(value) is dict else value.copy()
        for key, entry in value.items():
            copied[key] = map_tensors(entry, function)
        return copied
    return value


def first_tensor(*values: Any) -> Tensor:
    """The first tensor in the values and their tuples, lists, dicts and dataclasses.

    Raises:
        ValueError: If there is none.
    """
    waiting = [*values]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Tensor):
            return value
        waiting[:0] = value if isinstance(value, (tuple, list)) else _entries(value).values()
    raise ValueError("Expected the student to be called with a tensor or to return one, but found none.")
