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


MISSING = object()


class MethodPatch:
    """A wrapper around a method of an object that outlives its owner's use of it; undone in any order among several.

    It stands in the instance's ``__dict__`` as an object, not as a function: ``functools.wraps`` of a foreign wrapper
    copies nothing from it, so that ``undo`` never removes a foreign wrapper. Put it on objects that the Trainer owns,
    never on the user's module, whose copies and pickles would hold it.

    Args:
        owner: The object.
        name: Name of the method.
        around: Called as ``around(original, *args, **kwargs)`` in the method's place.

    Example:
        >>> import types
        >>> greeter = types.SimpleNamespace(greet=lambda: "hello")
        >>> first = MethodPatch(greeter, "greet", lambda original: original() + ", you")
        >>> second = MethodPatch(greeter, "greet", lambda original: original() + "!")
        >>> first.undo()
        >>> greeter.greet()
        'hello!'
        >>> second.undo()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._around: Callable[..., Any] | None = around
        self._below = owner.__dict__.get(name, MISSING)  # MISSING: the method is the class's own
        self._original = getattr(owner, name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapper, or after :meth:`undo` the original method."""
        if self._around is None:  # undone, but a wrapper that was put over it still calls it
            return self._original(*args, **kwargs)
        return self._around(self._original, *args, **kwargs)

    def undo(self) -> None:
        """Take the wrapper off. One that others were put over is silent from now on and leaves together with them."""
        self._around = None
        attributes = self._owner.__dict__
        while isinstance(top := attributes.get(self._name), MethodPatch) and top._around is None:
            if top._below is MISSING:
                del attributes[self._name]
            else:
                attributes[self._name] = top._below
