"""The device of the tests: ``DISTILL_TEST_DEVICE=cuda`` runs them on a GPU.

Trainers of most tests train there. In files that are marked ``tensors``, new tensors of the tests lie there, with the
numbers that they have on the CPU; those that the library makes lie where it puts them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("DISTILL_TEST_DEVICE", "cpu")
ACCELERATOR = "cpu" if DEVICE == "cpu" else "gpu"
LIBRARY = ("lightning_distill", "distill_core")


class OnDevice(TorchFunctionMode):
    """Puts the tensors that the tests make on a device, and those that become arrays of NumPy back on the CPU.

    Args:
        device: The device.
    """

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch for a test or for the library."""
        options = dict(options or {})
        if function is Tensor.numpy:
            return function(*arguments, force=True)
        if function not in _device_constructors() or options.get("device") is not None or not called_by_a_test():
            return function(*arguments, **options)
        requires_grad = options.pop("requires_grad", False)
        made = function(*arguments, **options).to(self.device)
        return made.requires_grad_() if requires_grad else made


def on_cpu(batch: dict[str, Any]) -> dict[str, Any]:
    """A copy of a batch whose tensors lie on the CPU."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}


def called_by_a_test() -> bool:
    """Whether the code that called torch is neither the library nor a data loader."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("torch.utils.data"):
            return False
        if not name.startswith("torch."):
            return name.split(".")[0] not in LIBRARY
        frame = frame.f_back
    return True
