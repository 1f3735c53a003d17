"""Numbers of a device that the host reads once they have arrived, so that it need not wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 8  # number of first comparisons on a GPU that are waited for, so that most faults show at once


def later(values: Tensor, *, wait: bool = False) -> Callable[[], Tensor | None]:
    """Copy values to the host.

    Args:
        values: On any device.
        wait: Whether to wait for them now.

    Returns:
        A function that returns the copy, or None until it has arrived.
    """
    values = values.detach()
    if values.device.type == "cpu":
        return lambda: values
    if wait:
        at_once = values.cpu()
        return lambda: at_once
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
    host.copy_(values, non_blocking=True)
    event = torch.Event(values.device)
    event.record()
    return lambda: host if event.query() else None
