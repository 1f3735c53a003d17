"""Another forward for one module and one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardSwap:
    """Calls a function in the place of a module's forward, inside all hooks of the module, while it is put.

    A copy of the module that is made meanwhile has the forward of its class.

    Args:
        module: The module.
        forward: Called as ``forward(module, *args, **kwargs)``.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        return self._forward(self.module, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def put(self) -> None:
        """Take the place of the forward.

        Raises:
            TypeError: If something else has taken it.
        """
        if isinstance(self.module.__dict__.get("forward"), ForwardSwap):
            raise TypeError(
                f"Expected one FusedLinearDistillation to skip the head {type(self.module).__name__}, but got two, such"
                " as those of two callbacks. Use SequenceDistillation in all of them."
            )
        if "forward" in self.module.__dict__:
            raise TypeError(
                f"Expected the head to have its own forward, but another library has replaced that of"
                f" {type(self.module).__name__} (hooks of accelerate?). Use SequenceDistillation, which reads"
                " the logits."
            )
        self.module.__dict__["forward"] = self

    def take(self) -> None:
        """Give the forward its place back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module), self.module)
        return type(copied).forward.__get__(copied)

    def __reduce__(self) -> Any:
        raise TypeError(
            "Expected the model not to be pickled inside a training step that skips its head, but it was. Save it"
            " between two steps."
        )
