"""Data whose samples carry their rows in a cache with keys, for a loop of your own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from distill_core.store import Reader
from lightning_distill.cache.data import IndexedBatch
from lightning_distill.cache.keyed import SampleKeys


class KeyedDataset(Dataset[Any]):
    """A map-style data set that returns each sample with its row in a cache, found by its key.

    Args:
        dataset: The data.
        keys: The keys of the cache.
        reader: Reads the cache.
    """

    def __init__(self, dataset: Any, keys: SampleKeys, reader: Reader) -> None:
        self.dataset, self.keys, self.reader = dataset, keys, reader

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> IndexedBatch:
        """A sample and its row."""
        return _with_row(self.dataset[index], self.keys, self.reader)


class KeyedStream(IterableDataset[Any]):
    """A stream that returns each sample with its row in a cache, found by its key.

    Args:
        dataset: The stream.
        keys: The keys of the cache.
        reader: Reads the cache.
    """

    def __init__(self, dataset: Any, keys: SampleKeys, reader: Reader) -> None:
        self.dataset, self.keys, self.reader = dataset, keys, reader

    def __iter__(self) -> Iterator[IndexedBatch]:
        """The samples and their rows."""
        for sample in self.dataset:
            yield _with_row(sample, self.keys, self.reader)


def _with_row(sample: Any, keys: SampleKeys, reader: Reader) -> IndexedBatch:
    return IndexedBatch(sample, int(keys.rows(keys.values([sample]), reader)[0]))
