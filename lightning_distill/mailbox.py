"""A file by which a spawned process sends its adapters to the process that started it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any
from weakref import finalize

import torch


class Mailbox:
    """Letters from a process to the one that started it: the copy that is pickled for the child writes to the original.

    Each object has a file of its own to read from. A pickled copy knows the original's file, to write to, and takes a
    new one to read from, so two copies of one object never read each other's letters. The file can be read by its
    owner alone and is removed with the object.
    """

    def __init__(self, replies_to: Path | None = None) -> None:
        self._inbox = Path(tempfile.gettempdir()) / f"lightning_distill-{uuid.uuid4().hex}.pt"
        self._replies_to = replies_to
        self._process = os.getpid()
        finalize(self, _remove, self._inbox, self._process)

    def send(self, state: Any) -> None:
        """Write to the object that this one was copied from, in another process; do nothing if this is not a copy."""
        forked = os.getpid() != self._process
        path = self._inbox if forked else self._replies_to
        if path is None:
            return
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            torch.save(state, file)

    def receive(self) -> Any | None:
        """The state that a process started by this one has sent; ``None`` before it has. It can be received once."""
        if not self._inbox.exists():
            return None
        state = torch.load(self._inbox, weights_only=True)
        self._inbox.unlink()
        return state

    def __reduce__(self) -> Any:
        return Mailbox, (self._inbox,)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
