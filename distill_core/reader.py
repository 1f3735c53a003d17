"""Reading the rows of a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from distill_core import cache_files
from distill_core.columns import Array, Ragged
from distill_core.manifest import BUILDING, KEY, MANIFEST, CacheError, Manifest

_BLOCK: Final = 2**22  # bytes that `verify` decodes at a time
_Touched = Iterable[tuple[int, Any]]  # numbers of shards, and which of the requested items they hold


class Reader:
    """Reads rows of a cache.

    A pickled reader, as data loaders send to their workers, holds the folder and the manifest only: each process maps
    the files, and compares them with their checksums, when it first reads from them.

    Args:
        folder: The cache.

    Raises:
        CacheError: If the folder does not hold a complete cache; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / MANIFEST).exists():
            begun = (folder / BUILDING).exists()
            why = "it is not complete: build it with resume=True" if begun else "the folder has none"
            raise CacheError(f"Expected a cache's {MANIFEST} in {folder}, but {why}.")
        self.__setstate__(
            {
                "folder": folder,
                "manifest": Manifest.from_json(cache_files.inside(folder, MANIFEST).read_bytes(), folder / MANIFEST),
            }
        )
        for shard in range(self.manifest.shards):  # the first missing one ends the loop, however many there are
            self._files(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder: Path = state["folder"]
        self.manifest: Manifest = state["manifest"]
        self._codecs = self.manifest.codecs
        self._columns = self.manifest.columns
        self._lists: dict[int, dict[str, Any]] = {}
        self._open: dict[str, Array] = {}
        self._ends: dict[tuple[int, str], Array] = {}
        self._sorted_keys: tuple[Array, Array] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all files of numbers together."""
        return sum(facts["bytes"] for shard in range(self.manifest.shards) for facts in self._files(shard).values())

    def read(self, rows: Array) -> dict[str, Any]:
        """The decoded contents of some rows.

        Args:
            rows: Row numbers, shape ``(N,)``, in any order.

        Returns:
            The decoded values of each array: its numbers, or classes, log-probabilities and tail. Those of an array
            with rows of differing length are in a :class:`Ragged`.

        Raises:
            CacheError: If a file is missing, truncated or altered, or does not fit the manifest; the message names it.
            IndexError: If a row does not exist.
        """
        rows = np.asarray(rows, dtype="int64")
        if rows.size and (rows.min() < 0 or rows.max() >= self.manifest.rows):
            raise IndexError(f"Expected rows from 0 to {self.manifest.rows - 1}, but got {rows.min()} to {rows.max()}.")
        shards, places = np.divmod(rows, self.manifest.shard_rows)
        values: dict[str, Any] = {}
        for name in self._codecs:
            if self.manifest.is_ragged(name):
                lengths, shards_of_items, items = self._positions(name, shards, places)
                values[name] = Ragged(self._read(name, items, shards_of_items), lengths)
            else:
                values[name] = self._read(name, places, shards)
        return values

    def find(self, keys: Array) -> Array:
        """The rows of some samples of a cache whose rows have keys.

        Args:
            keys: Digests of the keys, uint64, shape ``(N,)``, from :func:`distill_core.keys.digest`.

        Returns:
            Row numbers, int64, -1 for keys that the cache does not hold.

        Raises:
            CacheError: If a file is missing or altered.
        """
        if self._sorted_keys is None:
            stored = [self._map(shard, KEY, "values")[:, 0] for shard in range(self.manifest.shards)]
            every = np.concatenate(stored)
            order = np.argsort(every, kind="stable")
            self._sorted_keys = every[order], order
        known, order = self._sorted_keys
        keys = np.asarray(keys, dtype="uint64")
        places = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where(known[places] == keys, order[places], -1)

    def input_digests(self, rows: Array) -> Array:
        """The digests of the inputs that the teacher got, uint64, for some rows of a cache with keys; 0 if unknown.

        Args:
            rows: Row numbers, shape ``(N,)``.

        Raises:
            CacheError: If a file is missing or altered.
        """
        shards, places = np.divmod(np.asarray(rows, "int64"), self.manifest.shard_rows)
        digests = np.zeros(len(places), "uint64")
        for shard, selected in _touched(shards):
            digests[selected] = self._map(shard, KEY, "values")[places[selected], 1]
        return digests

    def verify(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Check every file: its checksum, its header and its numbers, decoded as for training.

        A build stores finite numbers only, so a number that is not finite is an error too, except at the last position
        of a sequence, which an answer of a served model may lack. Reading does not look for them: that would take as
        long as reading itself.

        Args:
            report: Called with the name of each file that passes.

        Raises:
            CacheError: If a file does not pass; the message names the first such file.
        """
        for shard in range(self.manifest.shards):
            for name in self._codecs:
                self._verify(shard, name)
            for name, column in self._columns:
                self._map(shard, name, column)
                report(cache_files.array_name(shard, name, column))

    def _verify(self, shard: int, name: str) -> None:
        codec, file = self._codecs[name], self.folder / cache_files.array_name(shard, name, "values")
        if self.manifest.is_ragged(name):
            self._row_ends(shard, name)
        stored = {column: self._map(shard, name, column) for column in codec.columns}
        items, step = len(stored["values"]), max(1, _BLOCK // codec.bytes_per_item)
        for start in range(0, items, step):
            length = min(step, items - start)
            block = {
                column: np.broadcast_to(values, (length, *values.shape[1:]))
                if codec.columns[column].per == "shard"
                else np.asarray(values[start : start + length])
                for column, values in stored.items()
            }
            decoded = self._decoded(name, block, file)
            numbers = decoded if isinstance(decoded, tuple) else (decoded,)
            wrong = [~np.isfinite(array).reshape(length, -1).all(-1) for array in numbers]
            if np.any(wrong, 0)[~self._unknown(shard, name, start, numbers)].any():
                raise CacheError(
                    f"Expected {file} to hold finite numbers, but some are NaN or infinite. Build the cache again."
                )

    def _unknown(self, shard: int, name: str, start: int, numbers: tuple[Array, ...]) -> Array:
        """Which positions have no numbers: the last ones of sequences, of the answers of some served models."""
        unknown = np.zeros(len(numbers[0]), bool)
        if self.manifest.is_ragged(name) and self.manifest.arrays[name].get("top_k") is not None:
            ends = self._row_ends(shard, name)
            last = ends[1:][np.diff(ends) > 0] - 1 - start
            unknown[last[(last >= 0) & (last < len(unknown))]] = True
            unknown &= np.isnan(numbers[1]).all(-1)
        return unknown

    def _positions(self, name: str, shards: Array, places: Array) -> tuple[Array, Array, Array]:
        """The lengths of some rows of differing length; the shard of each of their positions, and its place there."""
        starts, lengths = np.zeros(len(places), "int64"), np.zeros(len(places), "int64")
        for shard, selected in _touched(shards):
            ends = self._row_ends(shard, name)
            starts[selected] = ends[places[selected]]
            lengths[selected] = ends[places[selected] + 1] - starts[selected]
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return lengths, np.repeat(shards, lengths), np.repeat(starts, lengths) + within

    def _row_ends(self, shard: int, name: str) -> Array:
        """The numbers of positions before each row of a shard, and before its end, shape ``(rows + 1,)``."""
        if (shard, name) not in self._ends:
            lengths = self._map(shard, name, "lengths")
            ends = np.concatenate([[0], lengths.cumsum(dtype="int64")])
            for column, described in self._codecs[name].columns.items():
                number = len(self._map(shard, name, column))
                if described.per == "item" and number != ends[-1]:
                    file = self.folder / cache_files.array_name(shard, name, "lengths")
                    raise CacheError(
                        f"Expected {file} to hold the lengths of rows with {number} positions in all, but got"
                        f" {ends[-1]}. Build the cache again."
                    )
            self._ends[shard, name] = ends
        return self._ends[shard, name]

    def _read(self, name: str, places: Array, shards: Array) -> Any:
        """The decoded items of an array at some places of some shards."""
        touched = list(_touched(shards))
        stored = {}
        for column, described in self._codecs[name].columns.items():
            if described.per == "shard" and len(touched) == 1:
                values = self._map(touched[0][0], name, column)
                stored[column] = np.broadcast_to(values, (len(places), *described.shape))
                continue
            gathered = np.empty((len(places), *described.shape), described.dtype)
            for shard, selected in touched:
                values = self._map(shard, name, column)
                gathered[selected] = values[0] if described.per == "shard" else values[places[selected]]
            stored[column] = gathered
        try:
            return self._codecs[name].decode(stored)
        except ValueError:
            for shard, selected in touched:  # raises for the shard with the fault
                file = self.folder / cache_files.array_name(shard, name, "values")
                self._decoded(name, {column: values[selected] for column, values in stored.items()}, file)
            raise

    def _decoded(self, name: str, stored: dict[str, Array], file: Path) -> Any:
        try:
            return self._codecs[name].decode(stored)
        except ValueError as error:
            raise CacheError(f"Expected {file} to be unchanged since the build, but: {error}") from None

    def _map(self, shard: int, name: str, column: str) -> Array:
        """A stored array, mapped into memory after a check of its checksum and its header when it is first read."""
        file = cache_files.array_name(shard, name, column)
        if file in self._open:
            return self._open[file]
        path, described = cache_files.inside(self.folder, file), self._columns[name, column]
        if cache_files.checksum(path) != self._files(shard)[file]["blake2b"]:
            raise CacheError(
                f"Expected {path} to be unchanged since the build, but its checksum differs. Build the cache again."
            )
        number = cache_files.entries(self.manifest, shard, name, described)
        offset, number = cache_files.array_place(path, number, described)
        shape = (number, *described.shape)
        # a file without numbers cannot be mapped
        mapped = np.memmap(path, described.dtype, "r", offset, shape) if number else np.empty(shape, described.dtype)
        self._open[file] = mapped
        return mapped

    def _files(self, shard: int) -> dict[str, Any]:
        if shard not in self._lists:
            self._lists[shard] = cache_files.file_list(self.folder, self.manifest, shard)
        return self._lists[shard]


def _touched(shards: Array) -> _Touched:
    for shard in np.unique(shards):
        yield int(shard), shards == shard
