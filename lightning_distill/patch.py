"""A reversible patch of one method of one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MISSING: Any = object()


class MethodPatch:
    """A wrapper around a method of an object; several wrappers can be removed in any order.

    It is for optimizers and for objects of the Trainer (strategy, precision plugin, fit loop), which copies and pickles
    of a LightningModule do not contain. The class of the object does not change.

    Args:
        owner: The object.
        name: Name of the method.
        around: Called as ``around(original, *args, **kwargs)`` in the method's place.

    Example:
        >>> import types
        >>> greeter = types.SimpleNamespace(greet=lambda: "hello")
        >>> patch = MethodPatch(greeter, "greet", lambda original: original() + ", you")
        >>> greeter.greet()
        'hello, you'
        >>> patch.undo()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._around: Callable[..., Any] | None = around
        self._below, self._original = owner.__dict__.get(name, MISSING), getattr(owner, name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapper, or the method itself once the patch is undone and another wrapper still holds it."""
        if self._around is None:
            return self._original(*args, **kwargs)
        return self._around(self._original, *args, **kwargs)

    def undo(self) -> None:
        """Remove the wrapper. If others wrap it, it does nothing from now on and is removed together with them."""
        self._around = None
        attributes = self._owner.__dict__
        while isinstance(top := attributes.get(self._name), MethodPatch) and top._around is None:
            put_attribute(self._owner, self._name, top._below)


def put_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute past ``__setattr__``, or remove it if the value is ``MISSING``."""
    if value is MISSING:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = value


def patch_step(strategy: Any, name: str, around: Callable[..., Any]) -> MethodPatch:
    """Call ``around(method, *args, **kwargs)`` in place of the module's step, however the strategy calls it.

    The strategy looks the step up on the module: directly, or inside the forward of DDP or FSDP. The patch is therefore
    an attribute of the module, but only from the strategy's call to the step's first line. The user's code, copies and
    pickles never see it, and autocast and DDP's forward still surround the step.

    Args:
        strategy: The Trainer's strategy.
        name: ``"training_step"`` or ``"validation_step"``.
        around: The wrapper of the module's method.

    Returns:
        The patch, to be undone.
    """

    def strategy_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module = strategy.lightning_module
        before = module.__dict__.get(name, MISSING)  # another wrapper, torch.compile's method, another callback's

        def once(*step_args: Any, **step_kwargs: Any) -> Any:
            put_attribute(module, name, before)  # before any code of the user runs
            return around(getattr(module, name), *step_args, **step_kwargs)

        module.__dict__[name] = once
        try:
            return original(*args, **kwargs)
        finally:
            if module.__dict__.get(name) is once:  # the step was never reached
                put_attribute(module, name, before)

    return MethodPatch(strategy, name, strategy_step)
