"""A reversible patch of one method of one object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """A wrapper around a method of an instance that can be taken off again, in any order among several.

    The class of the object is left alone. ``functools.wraps`` keeps the signature that the Trainer inspects.

    Args:
        owner: The object.
        name: Name of the method.
        wrapper: Called as ``wrapper(original, *args, **kwargs)`` in the method's place.

    Example:
        >>> import types
        >>> greeter = types.SimpleNamespace(greet=lambda: "hello")
        >>> patch = Patch(greeter, "greet", lambda original: original() + ", you")
        >>> greeter.greet()
        'hello, you'
        >>> patch.undo()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._owner, self._name, self._active = owner, name, True
        self._previous = owner.__dict__.get(name)  # None: the method is the class's own
        original = getattr(owner, name)

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        patched._patch = self  # type: ignore[attr-defined]
        owner.__dict__[name] = patched

    def undo(self) -> None:
        """Take the wrapper off. One that others were put over goes silent now and leaves together with them."""
        self._active = False
        attributes = self._owner.__dict__
        while (top := getattr(attributes.get(self._name), "_patch", None)) is not None and not top._active:
            if top._previous is None:
                attributes.pop(self._name)
            else:
                attributes[self._name] = top._previous
