"""The processes of a distributed training."""

from __future__ import annotations

import torch.distributed


def world_size() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if _started() else 1


def process_number() -> int:
    """Number of this process among them, from 0."""
    return torch.distributed.get_rank() if _started() else 0


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
