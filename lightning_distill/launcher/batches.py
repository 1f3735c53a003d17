"""Lists of batches in a form that a Trainer accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset


class Batches(Dataset[Any]):
    """A list of batches as a data set, because Lightning would treat the list as several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        return self.batches[index]


def as_loader(data: Any) -> Any:
    """A loader for a list or tuple of batches; any other data are returned unchanged."""
    return DataLoader(Batches(data), batch_size=None) if isinstance(data, (list, tuple)) else data
