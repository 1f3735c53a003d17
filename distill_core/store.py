"""The folder of a teacher cache: a manifest and NumPy shards.

::

    cache/
      manifest.json                  description of the files below, the teacher and the data
      shard-00000.output.values.npy  rows 0 to shard_rows - 1 of one stored array, memory-mapped when read
      shard-00000.output.lengths.npy number of positions of each row, where rows have differing lengths
      shard-00000.key.values.npy     digests of each sample's key and inputs (0: unknown), where rows are found by key
      shard-00000.json               sizes and checksums of the shard's files; written last, so it marks a whole shard
      ...

Row ``view * length + index`` holds the teacher's outputs for sample ``index`` of the data in that view. The rows of
sequences have no padding: all positions of a shard's rows follow each other in one array. A folder that
is being built has ``building.json`` in place of the manifest. Pickle is never used: every array is read as a plain
``.npy`` file. A folder from an untrusted source can hold wrong numbers, but it cannot run code, make the reader leave
the folder, or make it allocate more memory than its files need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill_core import cache_files
from distill_core.cache_files import fingerprint
from distill_core.columns import Array, Ragged
from distill_core.manifest import BUILDING, FORMAT_VERSION, KEY, MANIFEST, CacheError, Manifest
from distill_core.reader import Reader

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "CacheError",
    "Manifest",
    "Reader",
    "Writer",
    "begin",
    "check_folder",
    "check_teacher",
    "fingerprint",
]


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


def check_teacher(built: Mapping[str, Any], expected: Mapping[str, Any], path: Any) -> None:
    """Raise an error if a cache is of another teacher, or of other inputs of the same teacher.

    Args:
        built: The manifest's entry of the teacher.
        expected: The entry that it must have.
        path: The cache, for the message.

    Raises:
        CacheError: If so.
    """
    if built["fingerprint"] != expected["fingerprint"]:
        raise CacheError(
            f"Expected {path} to be of this teacher, but it was built with another {built['class']}. Build it again."
        )
    if built.get("inputs") != expected.get("inputs"):
        raise CacheError(
            f"Expected {path} to be of teacher_inputs={expected.get('inputs')}, but it was built with"
            f" {built.get('inputs')}. Pass the same teacher_inputs, or build it again."
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
    before = begun(folder)
    if before is not None and (words := difference(before, manifest)):
        raise CacheError(
            f"Expected {folder} to be empty or begun with these settings, but {words}. Remove it, or choose another."
        )
    if before is not None and not resume:
        raise CacheError(f"Expected {folder} to be empty, but it holds a cache. Pass resume=True, or remove it.")
    cache_files.remove_partial(folder)
    if before is None:
        cache_files.write(folder / BUILDING, manifest.to_json().encode())
    return before or manifest


def begun(folder: Path) -> Manifest | None:
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
        before = begun(folder)
        words = "it is not" if before is None else difference(before, manifest)
        if before is None or words:
            raise CacheError(f"Expected {folder} to be begun with these settings, but {words}.")
        self.folder, self.manifest, self._codecs = folder, before, before.codecs

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet or are incomplete."""
        return [shard for shard in range(self.manifest.shards) if not self.whole(shard)]

    def write(self, shard: int, batches: Iterable[Mapping[str, Any]]) -> None:
        """Encode and write one shard; of most codecs only one batch of its rows is held before encoding.

        Args:
            shard: Its number.
            batches: The rows of each array, one batch after the other: an array ``(N, ...)``, or a :class:`Ragged`
                where rows have differing lengths; and in a cache with keys ``"key"``, uint64 ``(N, 2)``: the digests of
                the samples' keys, and of their inputs, which are 0 where they are not known.

        Raises:
            ValueError: If the values do not fit the manifest.
            OSError: If they cannot be written. Shards that were complete stay complete.
        """
        parts: dict[tuple[str, str], list[Array]] = {names: [] for names in self.manifest.columns}
        waiting: dict[str, list[Array]] = {name: [] for name, codec in self._codecs.items() if codec.whole_shard}
        num_rows, files = 0, {}
        for number, values in enumerate(batches):
            sizes = set()
            for name, codec in self._codecs.items():
                rows = values[name]
                items = self._items(name, rows)
                if isinstance(rows, Ragged):
                    parts[name, "lengths"].append(rows.lengths.astype("uint32"))
                sizes.add(len(rows.lengths) if isinstance(rows, Ragged) else len(rows))
                if codec.whole_shard:
                    waiting[name].append(items)
                    continue
                for column, stored in codec.encode(items, (shard, number)).items():
                    parts[name, column].append(stored)
            if self.manifest.key is not None:
                parts[KEY, "values"].append(values[KEY])
                sizes.add(len(values[KEY]))
            if len(sizes) != 1:
                raise ValueError(f"Expected as many rows of each array in a batch, but got {sorted(sizes)}.")
            num_rows += sizes.pop()
        for name, batches_of_items in waiting.items():
            for column, stored in self._codecs[name].encode(np.concatenate(batches_of_items)).items():
                parts[name, column].append(stored)
        expected = len(self.manifest.shard_range(shard))
        # the last shard of a stream may have fewer
        if not (num_rows == expected or (self.manifest.length == 0 and 0 < num_rows < expected)):
            raise ValueError(f"Expected {expected} rows in a shard, but got {num_rows}.")
        for (name, column), batches_stored in parts.items():
            file = self.folder / cache_files.array_name(shard, name, column)
            files[file.name] = cache_files.write(file, np.ascontiguousarray(np.concatenate(batches_stored)))
        cache_files.write(
            self.folder / cache_files.list_name(shard), (json.dumps(files, indent=2, sort_keys=True) + "\n").encode()
        )

    def _items(self, name: str, rows: Any) -> Array:
        """The items of some rows, after a check of their shape."""
        if self.manifest.is_ragged(name) != isinstance(rows, Ragged):
            raise ValueError(f"Expected rows of {name!r} to be all of one length, or all without padding.")
        items: Array = rows.values if isinstance(rows, Ragged) else rows
        shape = tuple(self.manifest.arrays[name]["shape"])
        if items.shape[1:] != shape:
            raise ValueError(f"Expected rows of {name!r} to be {shape}, but got {items.shape[1:]}.")
        return items

    def finish(self, length: int = 0) -> None:
        """Write the manifest, which marks the cache as complete.

        Args:
            length: Number of samples of a stream, whose length was not known before.

        Raises:
            CacheError: If shards are missing, or two rows have the same key.
        """
        unfinished = self.folder / BUILDING
        if not unfinished.exists():
            return
        if length:
            self.manifest = replace(self.manifest, length=length)
        if missing := self.missing:
            raise CacheError(f"Expected {self.folder} to hold all shards, but {missing[:5]} are missing.")
        if self.manifest.key is not None:
            self._check_keys()
        if length:
            cache_files.write(unfinished, self.manifest.to_json().encode())
        os.replace(unfinished, self.folder / MANIFEST)

    def check_inputs(self, digests: Array) -> None:
        """Check that some samples have the inputs with which the first shard holds them, if it does.

        Args:
            digests: The digests of the samples' keys and inputs, uint64, shape ``(N, 2)``.

        Raises:
            CacheError: If a sample has other inputs.
        """
        if not self.whole(0):
            return
        stored = np.load(self.folder / cache_files.array_name(0, KEY, "values"), allow_pickle=False)
        inputs = dict(stored.tolist())
        # the digest of unknown inputs is 0
        if any(seen and inputs.get(key) and inputs[key] != seen for key, seen in digests.tolist()):
            raise CacheError(
                f"Expected {self.folder} to hold a cache of these samples, but it holds others with the same keys:"
                " other data, or another tokenizer. Remove it, or choose another folder."
            )

    def keys(self, shard: int) -> Array:
        """The digests of the keys of a complete shard."""
        stored = np.load(self.folder / cache_files.array_name(shard, KEY, "values"), allow_pickle=False)
        return np.asarray(stored[:, 0])

    def _check_keys(self) -> None:
        keys = np.concatenate([self.keys(shard) for shard in range(self.manifest.shards)])
        order = np.argsort(keys, kind="stable")
        repeated = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if len(repeated):
            rows = sorted(order[repeated[0] : repeated[0] + 2].tolist())
            raise CacheError(
                f"Expected every sample to have a key of its own, but samples {rows[0]} and {rows[1]} have the same."
                " Pass another key=, or leave out repeated samples."
            )

    def whole(self, shard: int) -> bool:
        """Whether a shard exists and is complete."""
        try:
            cache_files.file_list(self.folder, self.manifest, shard)
        except CacheError:
            return False
        return True


def difference(before: Manifest, requested: Manifest) -> str:
    """Words for the first setting in which two manifests differ; empty if only the versions of libraries do."""
    for name, value in asdict(requested).items():
        old = getattr(before, name)
        of_stream = name == "length" and requested.length == 0 and requested.key is not None
        # a complete cache of format 1 that holds the same is left as it is
        if name not in ("versions", "version") and not of_stream and old != value:
            return f"it was begun with {name}={old!r}, and now it is {value!r}"
    return ""
