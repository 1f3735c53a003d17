"""Lists of batches as data for a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset


class Batches(Dataset[Any]):
    """Batches in a list as a data set: Lightning takes a bare list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        """One of them."""
        return self.batches[index]


def as_loader(data: Any) -> Any:
    """The data as a Trainer takes them: a list or tuple is one of batches."""
    return DataLoader(Batches(data), batch_size=None) if isinstance(data, (list, tuple)) else data
