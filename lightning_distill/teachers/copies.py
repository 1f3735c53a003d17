"""Copies of networks that compute with weights of their own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_distill import compat

_DEPTH = 4  # of functions inside functions


def independent_copy(network: nn.Module) -> nn.Module:
    """A deep copy of a network, which does not call the network itself.

    ``copy.deepcopy`` keeps functions as they are: one that was put into an attribute, such as another ``forward``, goes
    on with the weights of the module that it was made for. A ``forward`` that was only compiled is compiled no more.

    Args:
        network: The network.

    Raises:
        ValueError: If a function in it belongs to the network, or it cannot be copied.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():  # copies may be updated later, outside it
            copied = copy.deepcopy(network)
    except Exception as error:
        raise ValueError(
            f"Expected the student of an EMATeacher to be one that copy.deepcopy can copy, but got {error}"
        ) from error
    own = {id(module) for module in network.modules()}
    for (path, module), twin in zip(network.named_modules(), copied.modules(), strict=True):
        for name, value in [*vars(twin).items()]:
            if value is not vars(module).get(name) or not any(id(owner) in own for owner in _owners(value)):
                continue
            if name == "forward" and compat.is_compiled_method(value, type(module).forward):
                del vars(twin)["forward"]
                continue
            place = ".".join(part for part in (path, name) if part)
            raise ValueError(
                "Expected the student of an EMATeacher to be one that copy.deepcopy can copy, but its attribute"
                f" {place!r} is a function that would call the student instead of the copy. Define it as a method of"
                " the class, or set it to types.MethodType(function, module)."
            )
    return copied


def _owners(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The modules that a function keeps: those in its closure and its defaults, and those whose methods they are."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and callable(value) and not isinstance(value, type):
        inside = [getattr(value, "__self__", None), *(getattr(value, "__defaults__", None) or ())]
        for part in [*inside, *_enclosed(value)]:
            yield from _owners(part, depth - 1)


def _enclosed(function: Any) -> list[Any]:
    """The values that a function has taken from the functions around it."""
    values = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not set yet
            values.append(cell.cell_contents)
    return values
