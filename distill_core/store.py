"""The folder of a teacher cache: a manifest and NumPy shards.

::

    cache/
      manifest.json                  what is below, from which teacher and which data
      shard-00000.output.values.npy  rows 0 to shard_rows - 1 of one stored array, memory-mapped when read
      shard-00000.json               sizes and checksums of the shard's files; written last, so it marks a whole shard
      ...

Row ``view * length + index`` holds what the teacher gave for item ``index`` of the data in that view. A folder that is
being built has ``building.json`` in place of the manifest. There is no pickle in it: ``numpy.load`` reads every array.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.codecs import Array, Codec, make

FORMAT_VERSION = 1
MANIFEST, BUILDING = "manifest.json", "building.json"


class CacheError(ValueError):
    """A folder that is no whole cache, or not the one that is asked for."""


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Attributes:
        length: Number of items in the data.
        views: How many augmented views of each item are held.
        shard_rows: Rows in a shard; the last may have fewer.
        arrays: What is held under each name, ``"output"`` or ``"feature0"``...: ``shape`` of a row, ``dtype``, and
            ``top_k`` where only the likeliest classes are.
        layers: The layer that each feature comes from, by its name in ``arrays``.
        teacher: ``class`` and ``fingerprint`` of the teacher.
        data: ``fingerprint`` of the data and ``transform_seed``.
        versions: Versions of the libraries that wrote it.
        version: Version of the format.
    """

    length: int
    views: int
    shard_rows: int
    arrays: dict[str, dict[str, Any]]
    layers: dict[str, str]
    teacher: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def rows(self) -> int:
        """Number of rows: items times views."""
        return self.length * self.views

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each array."""
        return {name: make(description) for name, description in self.arrays.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all rows together."""
        return self.rows * sum(codec.bytes_per_row for codec in self.codecs.values())

    def to_json(self) -> str:
        """The text of the manifest's file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, file: Path) -> Manifest:
        """The manifest in a file's text.

        Raises:
            CacheError: If it is none, or one of another version.
        """
        try:
            values = json.loads(text)
            version = values["version"]
            if version == FORMAT_VERSION:
                return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(f"Expected a cache's manifest in {file}, but got something else ({error}).") from None
        raise CacheError(
            f"Expected {file} to be of format version {FORMAT_VERSION}, but got {version!r}. Build the cache anew."
        )


class Writer:
    """Writes the shards of a cache, those that are not there yet.

    Args:
        folder: Where to; made if it is not there.
        manifest: What the cache will hold.
        resume: Whether a folder that was begun is completed; without it such a folder is refused.

    Raises:
        CacheError: If the folder holds a cache already, or one begun with other settings.
    """

    def __init__(self, folder: Path, manifest: Manifest, resume: bool) -> None:
        self.folder, self.manifest, self._codecs = folder, manifest, manifest.codecs
        folder.mkdir(parents=True, exist_ok=True)
        begun, done = folder / BUILDING, folder / MANIFEST
        for there in (done, begun):
            if not there.exists():
                continue
            found = Manifest.from_json(there.read_text(encoding="utf-8"), there)
            if replace(found, versions={}) != replace(manifest, versions={}):
                raise CacheError(
                    f"Expected {folder} to be empty or begun with these settings, but {_difference(found, manifest)}."
                )
            if not resume:
                raise CacheError(
                    f"Expected {folder} to be empty, but it holds a cache. Pass resume=True, or remove it."
                )
            self.manifest = found  # with the versions that began it
        if not begun.exists() and not done.exists():
            if any(folder.glob("shard-*")):
                raise CacheError(f"Expected {folder} to be empty, but it holds shards of something else. Remove them.")
            _write(begun, manifest.to_json().encode())
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not whole."""
        return [shard for shard in range(self.manifest.shards) if not self._whole(shard)]

    def write(self, shard: int, batches: Iterable[Mapping[str, Array]]) -> None:
        """Encode and write one shard; of its rows as they come only one batch is held at a time.

        Args:
            shard: Its number.
            batches: The rows of each array, one batch after the other.

        Raises:
            ValueError: If the values do not fit the manifest.
            OSError: If they cannot be written; what was whole before stays whole.
        """
        rows, files = self.manifest.shard_range(shard), {}
        parts: dict[tuple[str, str], list[Array]] = {}
        for values in batches:
            for name, codec in self._codecs.items():
                wanted = tuple(self.manifest.arrays[name]["shape"])
                if values[name].shape[1:] != wanted:
                    raise ValueError(f"Expected rows of {name!r} to be {wanted}, but got {values[name].shape[1:]}.")
                for column, stored in codec.encode(values[name]).items():
                    parts.setdefault((name, column), []).append(stored)
        for (name, column), several in parts.items():
            stored = np.concatenate(several)
            if len(stored) != len(rows):
                raise ValueError(f"Expected {len(rows)} rows of {name!r} in a shard, but got {len(stored)}.")
            file = self.folder / _file_name(shard, name, column)
            files[file.name] = _write(file, stored)
        _write(self.folder / f"shard-{shard:05d}.json", (json.dumps(files, indent=2, sort_keys=True) + "\n").encode())

    def finish(self) -> None:
        """Give the folder its manifest.

        Raises:
            CacheError: If shards are missing.
        """
        if self.missing:
            raise CacheError(f"Expected {self.folder} to hold all shards, but {self.missing[:5]} are missing.")
        begun = self.folder / BUILDING
        if begun.exists():
            os.replace(begun, self.folder / MANIFEST)

    def _whole(self, shard: int) -> bool:
        try:
            files = json.loads((self.folder / f"shard-{shard:05d}.json").read_text(encoding="utf-8"))
            return all((self.folder / name).stat().st_size == one["bytes"] for name, one in files.items())
        except (OSError, ValueError):
            return False


class Reader:
    """Reads rows of a cache.

    Args:
        folder: The cache.

    Raises:
        CacheError: If the folder holds no whole cache; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).exists():
            why = "it is not complete: build it with resume=True" if (folder / BUILDING).exists() else "there is none"
            raise CacheError(f"Expected a cache's {MANIFEST} in {folder}, but {why}.")
        self.manifest = Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"), folder / MANIFEST)
        self._codecs = self.manifest.codecs
        self._files = [self._listed(shard) for shard in range(self.manifest.shards)]
        self._open: dict[str, Array] = {}

    def read(self, rows: Array) -> dict[str, Any]:
        """What the cache holds for some rows, decoded.

        Args:
            rows: Row numbers, shape ``(N,)``, in any order.

        Returns:
            For each array what its codec decodes: the numbers, or classes, log-probabilities and tail.

        Raises:
            CacheError: If a file is missing, truncated or altered; the message names it.
            IndexError: If there is no such row.
        """
        rows = np.asarray(rows, dtype="int64")
        if rows.size and (rows.min() < 0 or rows.max() >= self.manifest.rows):
            raise IndexError(f"Expected rows from 0 to {self.manifest.rows - 1}, but got {rows.min()} to {rows.max()}.")
        shards, places = np.divmod(rows, self.manifest.shard_rows)
        touched = [(shard, shards == shard) for shard in np.unique(shards)]
        return {
            name: codec.decode(
                {
                    column: self._gathered(name, column, places, touched, (len(rows), *shape), dtype)
                    for column, (shape, dtype) in codec.columns.items()
                }
            )
            for name, codec in self._codecs.items()
        }

    def verify(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Check every file.

        Args:
            report: Called with the name of each file that is good.

        Raises:
            CacheError: With the name of the first that is not.
        """
        for files in self._files:
            for name, facts in files.items():
                self._check(name, facts)
                report(name)

    def _gathered(
        self, name: str, column: str, places: Array, touched: Iterable[Any], shape: tuple[int, ...], dtype: str
    ) -> Array:
        gathered = np.empty(shape, dtype)
        for shard, mine in touched:
            gathered[mine] = self._mapped(int(shard), _file_name(int(shard), name, column))[places[mine]]
        return gathered

    def _mapped(self, shard: int, name: str) -> Array:
        if name not in self._open:
            self._check(name, self._files[shard][name])
            self._open[name] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return self._open[name]

    def _listed(self, shard: int) -> dict[str, Any]:
        """The files of a shard, all of them there and of the right size."""
        file = self.folder / f"shard-{shard:05d}.json"
        try:
            files: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError(f"Expected the list of a shard in {file}, but got none ({error}).") from None
        wanted = {_file_name(shard, name, column) for name, codec in self._codecs.items() for column in codec.columns}
        if set(files) != wanted:
            raise CacheError(f"Expected {file} to list {sorted(wanted)}, but got {sorted(files)}.")
        for name, facts in files.items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size != facts["bytes"]:
                got = "is not there" if size is None else f"has {size}"
                raise CacheError(f"Expected {path} to have {facts['bytes']} bytes, but it {got}. Build the cache anew.")
        return files

    def _check(self, name: str, facts: dict[str, Any]) -> None:
        path = self.folder / name
        if not path.exists() or _checksum(path) != facts["blake2b"]:
            raise CacheError(
                f"Expected {path} to be as it was written, but its checksum differs. Build the cache anew."
            )


def _file_name(shard: int, name: str, column: str) -> str:
    return f"shard-{shard:05d}.{name}.{column}.npy"


def _write(path: Path, content: bytes | Array) -> dict[str, Any]:
    """Write a file that is there either whole or not at all.

    Returns:
        Its size and checksum.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as handle:
            if isinstance(content, bytes):
                handle.write(content)
            else:
                np.save(handle, content, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        facts = {"bytes": temporary.stat().st_size, "blake2b": _checksum(temporary)}
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return facts


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(parts: Iterable[Any]) -> str:
    """A short digest of arrays, strings and numbers, in order.

    Args:
        parts: Arrays, strings, bytes or numbers.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> fingerprint(["a", np.zeros(2)]) == fingerprint(["a", np.ones(2)])
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        array = np.ascontiguousarray(part) if not isinstance(part, (str, bytes)) else None
        if array is None:
            digest.update(part.encode() if isinstance(part, str) else part)
        else:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()


def _difference(found: Manifest, wanted: Manifest) -> str:
    """Words for the first thing in which two manifests differ."""
    for name, value in asdict(wanted).items():
        there = getattr(found, name)
        if name != "versions" and there != value:
            return f"it was begun with {name}={there!r}, and now it is {value!r}"
    return "it differs"
