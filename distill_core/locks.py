"""The lock that keeps two processes from building into one folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from distill_core.manifest import CacheError

LOCK: Final = ".lock"


@contextmanager
def locked(folder: Path, work: str = "building") -> Iterator[None]:
    """A context that one process at a time can be in; a process that dies leaves it.

    The lock's file is not removed afterwards: another process may already have it open, and a third process would then
    lock a new file of the same name.

    Args:
        folder: The folder; created if it does not exist.
        work: The work of the process that holds the lock, for the message.

    Raises:
        CacheError: If another process holds the lock.
    """
    import filelock  # imported late: reading a cache needs no lock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise CacheError(f"Expected {folder} to be free, but another process is {work} there. Wait for it.") from None
    try:
        yield
    finally:
        lock.release()
