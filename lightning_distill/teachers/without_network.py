"""The base of the sources of a teacher's outputs that have no network of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_distill.teachers.fixed import FixedTeacher


class WithoutNetwork(FixedTeacher):
    """Base of the sources that have no network of their own: nothing is held, moved, frozen or recorded."""

    live, stored = True, False

    def hold(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """No-op: no network."""

    def release(self) -> None:
        """No-op: no network."""

    def cast(self, value: Any) -> Any:
        """The unchanged value."""
        return value

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """The batch; no answers come with it."""
        return batch, None

    def clear(self) -> None:
        """No-op: nothing is recorded."""

    def modules(self) -> Iterator[nn.Module]:
        """No network."""
        return iter(())
