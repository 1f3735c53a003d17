"""The arguments of a layer's call: those with tensors, and the rest, to call the layer with other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

_TENSORS = object()  # stands for an argument with tensors


@dataclass(frozen=True)
class Form:
    """The arguments of a call without those that hold tensors.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.
        several: Whether more than one argument holds tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    several: bool

    def filled(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other tensors.

        Args:
            inputs: In the structure that :func:`split_arguments` returned.

        Returns:
            The positional and the keyword arguments.
        """
        if isinstance(inputs, dict) and self.several:
            return self.args, {**self.kwargs, **inputs}
        rest = iter(inputs if self.several else [inputs])
        args = tuple(next(rest) if value is _TENSORS else value for value in self.args)
        return args, {name: next(rest) if value is _TENSORS else value for name, value in self.kwargs.items()}


def split_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Form]:
    """Split the arguments of a call into those with tensors and the rest.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.

    Returns:
        The only argument with tensors, or a tuple of several, or a dict if all of several have names; and the form of
        the call.

    Example:
        >>> inputs, form = split_arguments(["small"], {"images": keras.ops.ones((2,)), "training": False})
        >>> tuple(inputs.shape), form.filled("others")
        ((2,), (('small',), {'images': 'others', 'training': False}))
    """
    unnamed = [value for value in args if _holds_tensors(value)]
    named = {name: value for name, value in kwargs.items() if _holds_tensors(value)}
    held = [*unnamed, *named.values()]
    form = Form(
        tuple(_TENSORS if _holds_tensors(value) else value for value in args),
        {name: _TENSORS if name in named else value for name, value in kwargs.items()},
        len(held) > 1,
    )
    if len(held) == 1:
        return held[0], form
    return (named if held and not unnamed else tuple(held)), form


def _holds_tensors(value: Any) -> bool:
    return any(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in keras.tree.flatten(value))
