"""Outputs of networks and layers: tensors, and tuples, lists, dicts, dataclasses and model outputs of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

Output = int | str | tuple[int | str, ...] | Callable[[Any], Tensor] | None


def select(value: Any, output: Output, value_name: str, *, first: bool = False) -> Tensor:
    """The tensor that ``output`` picks from ``value``, or the obvious one if ``output`` is ``None``.

    The obvious tensor is, in this order: the value itself; the entry named ``"logits"`` of a dict, model output, named
    tuple or dataclass; its only tensor with at least one dimension. Several tensors are an error. Only of an inner
    layer's tuple the first is taken: layers return their feature first, then caches or attention weights.

    Args:
        value: The output of a network or a layer.
        output: An index, a key or field name, a tuple of these for nested outputs, a callable, or ``None``.
        value_name: Name of the value in error messages.
        first: Whether the first entry of a tuple or list is the obvious one.

    Returns:
        The tensor.

    Raises:
        ValueError: If nothing is obvious, or ``output`` does not pick a tensor; the message lists the entries.

    Example:
        >>> import torch
        >>> select({"logits": torch.ones(2, 3), "state": torch.zeros(2)}, None, "the student's output").shape
        torch.Size([2, 3])
    """
    if isinstance(value, Tensor) and output is None:
        return value
    picked: Any = None
    entries = entries_of(value)
    if callable(output):
        picked = output(value)
    elif isinstance(value, Tensor):
        raise ValueError(
            f"Expected `output` to be None where {value_name} is a tensor, but got output={output!r}. Choose for each"
            f" network by itself, by LogitsDistillation(output=({output!r}, None)) or by the tap of its layer; or pass"
            " a function if a network sometimes returns a tensor and sometimes several."
        )
    elif output is not None:
        picked = entry_at(value, output if isinstance(output, tuple) else (output,))
    else:
        tensors = {key: entry for key, entry in entries.items() if isinstance(entry, Tensor) and entry.ndim > 0}
        if "logits" in entries:
            picked = entries["logits"]
        elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            # a scalar before it is a loss; a nested entry stands for several tensors
            leading = next((entry for entry in value if not (isinstance(entry, Tensor) and entry.ndim == 0)), None)
            picked = leading if first or len(tensors) == 1 else None
        elif len(tensors) == 1:
            picked = next(iter(tensors.values()))
    if not isinstance(picked, Tensor):
        present = ", ".join(f"{key!r}: {_describe(entry)}" for key, entry in entries.items()) or _describe(value)
        remedy = "Pass Tap(layer, output=...), or for the network's output LogitsDistillation(output=...)"
        raise ValueError(
            f"Expected `output` to pick one tensor of {value_name}, but got output={output!r}. {remedy}, or override"
            f" `logits`. The tensors are: {present}."
        )
    return picked


def entries_of(value: Any) -> dict[Any, Any]:
    """The entries of a tuple, list, dict, model output, named tuple or dataclass by key; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_fields"):
        return {name: getattr(value, name) for name in value._fields}
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return {}


def entry_at(value: Any, keys: Iterable[Any]) -> Any:
    """The entry at a path of keys, or ``None``."""
    for key in keys:
        value = _entry(value, key)
    return value


def _entry(value: Any, key: Any) -> Any:
    entries = entries_of(value)
    if key in entries:
        return entries[key]
    if isinstance(key, int) and -len(entries) <= key < len(entries):
        return list(entries.values())[key]
    return None


def _describe(value: Any) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value and in its tuples, lists, dicts and dataclasses, in order."""
    waiting = [value]
    while waiting:  # not recursive: this runs for every feature of every step
        first = waiting.pop()
        if isinstance(first, Tensor):
            yield first
        elif isinstance(first, (tuple, list)):
            waiting += reversed(first)
        elif not isinstance(first, (str, int, float, bytes, type(None))):
            waiting += reversed(entries_of(first).values())


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to every tensor in its tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, function) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(entry, function) for entry in value])
    if isinstance(value, Mapping):
        copied: Any = dict(value) if type(value) is dict else copy.copy(value)
        for key, entry in value.items():
            copied[key] = map_tensors(entry, function)
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for entry in fields(value):
            object.__setattr__(copied, entry.name, map_tensors(getattr(value, entry.name), function))
        return copied
    return value


def first_tensor(*values: Any) -> Tensor:
    """The first tensor in the values and their tuples, lists, dicts and dataclasses.

    Raises:
        ValueError: If the value holds no tensor.
    """
    for value in values:
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            return value[0]  # the most common case
        for tensor in tensors_in(value):
            return tensor
    raise ValueError("Expected the student to be called with a tensor or to return one, but got none.")


def obvious(output: Any) -> Any:
    """The logits in a network's output, or the whole output where they are not obvious.

    Args:
        output: The output.
    """
    try:
        return select(output, None, "the student's output")
    except ValueError:
        return output
