"""Processes that build one cache together: an error in one of them ends the build in all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

from distill_core.store import CacheError
from lightning_distill.processes import process_number, world_size


def process_rank() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return process_number(), world_size()


@contextmanager
def together() -> Iterator[None]:
    """A context that all processes enter, and leave only when all of them have come to its end.

    Raises:
        CacheError: If the context raised an error in another process, for which this one would otherwise wait forever.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    world = process_rank()[1]
    if world > 1:
        errors: list[str | None] = [None] * world
        torch.distributed.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    else:
        errors = [None]
    if error is not None:
        raise error
    for other, words in enumerate(errors):
        if words is not None:
            raise CacheError(
                f"Expected all processes to build the cache, but the process of rank {other} failed: {words}"
            )
