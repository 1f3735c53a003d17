"""The folder of a teacher cache: a manifest and NumPy shards.

::

    cache/
      manifest.json                  description of the files below, the teacher and the data
      shard-00000.output.values.npy  rows 0 to shard_rows - 1 of one stored array, memory-mapped when read
      shard-00000.json               sizes and checksums of the shard's files; written last, so it marks a whole shard
      ...

Row ``view * length + index`` holds the teacher's outputs for sample ``index`` of the data in that view. A folder that
is being built has ``building.json`` in place of the manifest. Pickle is never used: every array is read as a plain
``.npy`` file. A folder from an untrusted source can hold wrong numbers, but it cannot run code, make the reader leave
the folder, or make it allocate more memory than its files need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from distill_core import cache_files
from distill_core.cache_files import fingerprint
from distill_core.codecs import Array
from distill_core.manifest import BUILDING, FORMAT_VERSION, MANIFEST, CacheError, Manifest

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "CacheError",
    "Manifest",
    "Reader",
    "Writer",
    "begin",
    "check_folder",
    "fingerprint",
]

_BLOCK: Final = 2**22  # bytes that `verify` decodes at a time


def check_folder(folder: Path) -> None:
    """Raise an error if a folder holds other things than a cache; hidden files, such as ``.gitignore``, do not count.

    Args:
        folder: The folder; it need not exist.

    Raises:
        CacheError: If the folder holds other things. Nothing has been written or removed.
    """
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"Expected {folder} to be a folder, but it is a file. Choose another folder.")
    names = {path.name for path in folder.glob("*")}
    if MANIFEST in names or BUILDING in names:
        return
    others = sorted(name for name in names if not name.startswith("."))
    if others:
        raise CacheError(
            f"Expected {folder} to be empty or to hold a cache, but it holds {others[0]!r}. Choose a new folder."
        )


def begin(folder: Path, manifest: Manifest, resume: bool) -> Manifest:
    """Begin or resume a build. Call it once, in one process, before any :class:`Writer` writes.

    Args:
        folder: The folder; created if it does not exist.
        manifest: Contents of the cache.
        resume: Whether to complete a build that was begun. If False, a folder that holds one is refused.

    Returns:
        The manifest of the folder, with the versions of the libraries that began the build.

    Raises:
        CacheError: If the folder holds other things, a cache with other settings, or any cache without ``resume``.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Manifest.from_json(manifest.to_json().encode(), folder / BUILDING)  # refuse a manifest that no reader would accept
    begun = _begun(folder)
    if begun is not None and (difference := _difference(begun, manifest)):
        raise CacheError(f"Expected {folder} to be empty or begun with these settings, but {difference}.")
    if begun is not None and not resume:
        raise CacheError(f"Expected {folder} to be empty, but it holds a cache. Pass resume=True, or remove it.")
    cache_files.remove_partial(folder)
    if begun is None:
        cache_files.write(folder / BUILDING, manifest.to_json().encode())
    return begun or manifest


def _begun(folder: Path) -> Manifest | None:
    """The manifest of a cache that is complete or was begun."""
    for name in (MANIFEST, BUILDING):
        if (folder / name).exists():
            return Manifest.from_json(cache_files.inside(folder, name).read_bytes(), folder / name)
    return None


class Writer:
    """Writes the shards of a cache that :func:`begin` began.

    Args:
        folder: The folder.
        manifest: Contents of the cache.

    Raises:
        CacheError: If the build was not begun, or was begun with other settings.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        begun = _begun(folder)
        difference = "it is not" if begun is None else _difference(begun, manifest)
        if begun is None or difference:
            raise CacheError(f"Expected {folder} to be begun with these settings, but {difference}.")
        self.folder, self.manifest, self._codecs = folder, begun, begun.codecs

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet or are incomplete."""
        return [shard for shard in range(self.manifest.shards) if not self._whole(shard)]

    def write(self, shard: int, batches: Iterable[Mapping[str, Array]]) -> None:
        """Encode and write one shard; only one batch of its rows is held before encoding.

        Args:
            shard: Its number.
            batches: The rows of each array, one batch after the other.

        Raises:
            ValueError: If the values do not fit the manifest.
            OSError: If they cannot be written. Shards that were complete stay complete.
        """
        rows, files = self.manifest.shard_range(shard), {}
        parts: dict[tuple[str, str], list[Array]] = {}
        for values in batches:
            for name, codec in self._codecs.items():
                shape = tuple(self.manifest.arrays[name]["shape"])
                if values[name].shape[1:] != shape:
                    raise ValueError(f"Expected rows of {name!r} to be {shape}, but got {values[name].shape[1:]}.")
                for column, stored in codec.encode(values[name]).items():
                    parts.setdefault((name, column), []).append(stored)
        for (name, column), batches_stored in parts.items():
            stored = np.ascontiguousarray(np.concatenate(batches_stored))
            if len(stored) != len(rows):
                raise ValueError(f"Expected {len(rows)} rows of {name!r} in a shard, but got {len(stored)}.")
            file = self.folder / cache_files.array_name(shard, name, column)
            files[file.name] = cache_files.write(file, stored)
        cache_files.write(
            self.folder / cache_files.list_name(shard), (json.dumps(files, indent=2, sort_keys=True) + "\n").encode()
        )

    def finish(self) -> None:
        """Write the manifest, which marks the cache as complete.

        Raises:
            CacheError: If shards are missing.
        """
        if missing := self.missing:
            raise CacheError(f"Expected {self.folder} to hold all shards, but {missing[:5]} are missing.")
        begun = self.folder / BUILDING
        if begun.exists():
            os.replace(begun, self.folder / MANIFEST)

    def _whole(self, shard: int) -> bool:
        try:
            cache_files.file_list(self.folder, self.manifest, shard)
        except CacheError:
            return False
        return True


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
        self._lists: dict[int, dict[str, Any]] = {}
        self._open: dict[str, Array] = {}

    def read(self, rows: Array) -> dict[str, Any]:
        """The decoded contents of some rows.

        Args:
            rows: Row numbers, shape ``(N,)``, in any order.

        Returns:
            The decoded values of each array: its numbers, or classes, log-probabilities and tail.

        Raises:
            CacheError: If a file is missing, truncated or altered, or does not fit the manifest; the message names it.
            IndexError: If a row does not exist.
        """
        rows = np.asarray(rows, dtype="int64")
        if rows.size and (rows.min() < 0 or rows.max() >= self.manifest.rows):
            raise IndexError(f"Expected rows from 0 to {self.manifest.rows - 1}, but got {rows.min()} to {rows.max()}.")
        shards, places = np.divmod(rows, self.manifest.shard_rows)
        touched = [(shard, shards == shard) for shard in np.unique(shards)]
        return {
            name: self._decoded(
                name,
                {
                    column: self._gathered(name, column, places, touched, (len(rows), *shape), dtype)
                    for column, (shape, dtype) in codec.columns.items()
                },
            )
            for name, codec in self._codecs.items()
        }

    def verify(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Check every file: its checksum, its header and its numbers, decoded as for training.

        A build stores finite numbers only, so a number that is not finite is an error too. Reading does not look for
        them: that would take as long as reading itself.

        Args:
            report: Called with the name of each file that passes.

        Raises:
            CacheError: If a file does not pass; the message names the first such file.
        """
        for shard in range(self.manifest.shards):
            for name, codec in self._codecs.items():
                files = {column: cache_files.array_name(shard, name, column) for column in codec.columns}
                stored = {column: self._map(shard, file) for column, file in files.items()}
                rows, step = len(self.manifest.shard_range(shard)), max(1, _BLOCK // codec.bytes_per_row)
                for start in range(0, rows, step):
                    block = {column: np.asarray(values[start : start + step]) for column, values in stored.items()}
                    decoded = self._decoded(name, block, files["values"])
                    numbers = decoded if isinstance(decoded, tuple) else (decoded,)
                    if not all(np.isfinite(array).all() for array in numbers):
                        raise CacheError(
                            f"Expected {self.folder / files['values']} to hold finite numbers, but some are NaN or"
                            " infinite. Build the cache again."
                        )
                for file in files.values():
                    report(file)

    def _decoded(self, name: str, stored: dict[str, Array], file: str | None = None) -> Any:
        try:
            return self._codecs[name].decode(stored)
        except ValueError as error:
            where = f"{name!r} in {self.folder}" if file is None else f"{self.folder / file}"
            raise CacheError(f"Expected {where} to be unchanged since the build, but: {error}") from None

    def _gathered(
        self, name: str, column: str, places: Array, touched: Iterable[Any], shape: tuple[int, ...], dtype: str
    ) -> Array:
        gathered = np.empty(shape, dtype)
        for shard, selected in touched:
            gathered[selected] = self._mapped(int(shard), cache_files.array_name(int(shard), name, column))[
                places[selected]
            ]
        return gathered

    def _mapped(self, shard: int, file: str) -> Array:
        if file not in self._open:
            self._open[file] = self._map(shard, file)
        return self._open[file]

    def _map(self, shard: int, file: str) -> Array:
        """Map a file into memory as an array, after a check of its checksum and its header."""
        path = cache_files.inside(self.folder, file)
        if cache_files.checksum(path) != self._files(shard)[file]["blake2b"]:
            raise CacheError(
                f"Expected {path} to be unchanged since the build, but its checksum differs. Build the cache again."
            )
        name, column = file.split(".")[1:3]
        shape, dtype = self._codecs[name].columns[column]
        expected = (len(self.manifest.shard_range(shard)), *shape)
        offset = cache_files.header_size(path, expected, dtype)
        return np.memmap(path, dtype, "r", offset, expected)

    def _files(self, shard: int) -> dict[str, Any]:
        if shard not in self._lists:
            self._lists[shard] = cache_files.file_list(self.folder, self.manifest, shard)
        return self._lists[shard]


def _difference(begun: Manifest, requested: Manifest) -> str:
    """Words for the first setting in which two manifests differ; empty if only the versions of libraries do."""
    for name, value in asdict(requested).items():
        before = getattr(begun, name)
        if name != "versions" and before != value:
            return f"it was begun with {name}={before!r}, and now it is {value!r}"
    return ""
