"""Building a cache from batches as they come: keys of samples, and streams that are cut into shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from distill_core.columns import Array, Ragged
from distill_core.store import CacheError, Writer
from distill_core.terminal import short
from lightning_distill.cache.data import IndexedBatch
from lightning_distill.cache.keyed import SampleKeys, content_key

Rows: TypeAlias = dict[str, Any]  # the rows of each array for a batch: arrays, or Ragged
Shards: TypeAlias = Iterator[tuple[int, Iterable[Rows]]]
_COMPARED = 16  # samples of a stream that are read twice


class Loaded(NamedTuple):
    """A batch while a cache is built.

    Attributes:
        batch: The batch.
        number: Number of its samples.
        keys: The digests of their keys, uint64; ``None`` where samples have numbers.
    """

    batch: Any
    number: int
    keys: Array | None


class BuildCollate:
    """A collate function that counts the samples, and digests their keys.

    Args:
        collate: The user's collate function.
        keys: The keys; ``None`` where samples have numbers.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], keys: SampleKeys | None) -> None:
        self.collate, self.keys = collate, keys

    def __call__(self, items: list[Any]) -> Loaded:
        """The batch of the samples."""
        samples = [item.batch if isinstance(item, IndexedBatch) else item for item in items]
        digests = None if self.keys is None else self._digests(self.keys, samples)
        return Loaded(self.collate(samples), len(samples), digests)

    def _digests(self, keys: SampleKeys, samples: Sequence[Any]) -> Array:
        values = keys.values(samples)
        digests = keys.digests(values)
        _, first = np.unique(digests, return_index=True)
        if len(first) < len(digests):
            repeated = int(np.setdiff1d(np.arange(len(digests)), first)[0])
            raise CacheError(
                "Expected every sample to have a key of its own, but two have the key"
                f" {short(values[repeated])}. Pass another key=, or leave out repeated samples."
            )
        return digests


def check_stream(dataset: Iterable[Any], keys: SampleKeys, allow: bool) -> bool:
    """Check that samples of a stream are the same on a second read; they may come in another order.

    Args:
        dataset: The stream.
        keys: The keys of its samples.
        allow: Whether samples that change are accepted.

    Returns:
        Whether they change.

    Raises:
        CacheError: If they change and ``allow`` is False.
    """
    reads: list[dict[Any, str]] = []
    for _ in range(2):
        samples = list(itertools.islice(iter(dataset), _COMPARED))
        reads.append(dict(zip(keys.digests(keys.values(samples)).tolist(), map(content_key, samples), strict=True)))
    changes = any(reads[1].get(key, value) != value for key, value in reads[0].items())
    if changes and not allow:
        raise CacheError(
            "Expected the stream to return the same samples whenever it is read, but some differ on the second read:"
            " the student would not see what the teacher saw. Leave out random augmentation, or pass"
            " allow_stale_augmentation=True."
        )
    return changes


class Stream:
    """A stream that is cut into shards; the teacher does not run for shards that are complete.

    Args:
        loader: The batches of the stream, which may have any number of samples.
        writer: Writes the shards.
        rows_of: Runs the teacher for a batch.
        advance: Called with the number of samples of each batch, for a progress bar.

    Attributes:
        length: Number of samples so far.
    """

    def __init__(
        self,
        loader: Iterable[Loaded],
        writer: Writer,
        rows_of: Callable[[Loaded], Rows],
        advance: Callable[[int], None],
    ) -> None:
        self.length = 0
        self._loader, self._writer, self._rows_of, self._advance = iter(loader), writer, rows_of, advance
        self._seen: set[int] = set()
        self._loaded: Loaded | None = None
        self._rows: Rows | None = None
        self._start = 0

    def shards(self) -> Shards:
        """The number and the rows of each shard that the writer lacks, which must be consumed before the next.

        Raises:
            CacheError: If a key occurs twice, or a complete shard holds other samples than the stream.
        """
        shard = 0
        while self._batch() is not None:
            if self._writer.whole(shard):
                self._skip(shard)
            else:
                yield shard, self._of_shard()
            shard += 1

    def _batch(self) -> Loaded | None:
        """The batch of the next sample, loaded if the last one is used up; None at the end."""
        if self._loaded is None:
            self._loaded, self._rows, self._start = next(self._loader, None), None, 0
            if self._loaded is not None:
                self._check_new(self._loaded)
                self.length += self._loaded.number
                self._advance(self._loaded.number)
        return self._loaded

    def _check_new(self, loaded: Loaded) -> None:
        keys = [] if loaded.keys is None else loaded.keys.tolist()
        before = len(self._seen)
        self._seen.update(keys)
        if len(self._seen) < before + len(keys):
            raise CacheError(
                f"Expected every sample to have a key of its own, but a key of samples {self.length} to"
                f" {self.length + len(keys) - 1} occurred before. Pass another key=, or leave out repeated samples; of"
                " several workers each must read another part of the stream."
            )

    def _parts(self) -> Iterator[tuple[Loaded, slice]]:
        """The batches of a shard; the first and the last may belong to it in part."""
        left = self._writer.manifest.shard_rows
        while left and (loaded := self._batch()) is not None:
            start = self._start
            stop = min(loaded.number, start + left)
            yield loaded, slice(start, stop)
            left -= stop - start
            self._start = stop
            if stop == loaded.number:
                self._loaded = None

    def _of_shard(self) -> Iterator[Rows]:
        for loaded, part in self._parts():
            if self._rows is None:
                self._rows = self._rows_of(loaded)
            yield {name: _cut(rows, part) for name, rows in self._rows.items()}

    def _skip(self, shard: int) -> None:
        keys = [loaded.keys[part] for loaded, part in self._parts() if loaded.keys is not None]
        if not np.array_equal(np.concatenate(keys), self._writer.keys(shard)):
            raise CacheError(
                f"Expected the stream to return the samples of shard {shard} as in the build that was begun, but it"
                " returns others or in another order. Do not shuffle it, or build into an empty folder."
            )


def _cut(rows: Any, part: slice) -> Any:
    """Some rows of an array or of a Ragged."""
    if not isinstance(rows, Ragged):
        return rows[part]
    ends = np.concatenate([[0], rows.lengths.cumsum()])
    return Ragged(rows.values[ends[part.start] : ends[part.stop]], rows.lengths[part])
