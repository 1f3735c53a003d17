"""The student's last call in a user's own loop."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from lightning_distill.recording import Call, first_tensor


class LastCall(list[Call]):
    """A list that keeps the last call only, so that a single graph is held however often the student is called."""

    def __init__(self) -> None:
        super().__init__()
        self._earlier: list[weakref.ref[Tensor]] = []

    def append(self, call: Call) -> None:
        """Keep a call in place of the last one, and only a weak reference to the last one's output."""
        for last in self:
            tensor = _tensor_of(last.output)
            self._earlier = [ref for ref in self._earlier if ref() is not None]
            self._earlier += [] if tensor is None else [weakref.ref(tensor)]
        self[:] = [call]

    def clear(self) -> None:
        """Drop every call."""
        super().clear()
        self._earlier.clear()

    def replaced(self, output: Any) -> bool:
        """Whether an output comes from an earlier call, which is not kept any more."""
        tensor = _tensor_of(output)
        return tensor is not None and any(ref() is tensor for ref in self._earlier)


def _tensor_of(output: Any) -> Tensor | None:
    try:
        return first_tensor(output)
    except ValueError:  # it holds no tensor
        return None
