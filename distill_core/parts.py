"""Caches that independent jobs build in parts, each in a folder of its own, and their merge into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from distill_core import cache_files
from distill_core.locks import locked
from distill_core.manifest import CacheError, Manifest
from distill_core.remote import local_folder
from distill_core.store import Writer, begin, begun, difference

_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Part:
    """One of several parts of a build: every n-th shard.

    Args:
        number: Which part, from 1.
        count: Number of parts.

    Raises:
        ValueError: If the number is not from 1 to the count.

    Example:
        >>> Part.of("2/3").chosen([0, 1, 2, 3, 4, 5])
        [1, 4]
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(
                f"Expected `part` to be from 1/{self.count} to {self.count}/{self.count}, but got"
                f" {self.number}/{self.count}."
            )

    @classmethod
    def of(cls, text: str | Part | None) -> Part:
        """The part that a text such as ``"3/16"`` names; None is the whole."""
        if text is None or isinstance(text, Part):
            return text or cls()
        match = _PART.fullmatch(str(text))
        if match is None:
            raise ValueError(f"Expected `part` to be like '3/16', the third of sixteen, but got part={text!r}.")
        return cls(int(match[1]), int(match[2]))

    def chosen(self, shards: Sequence[int]) -> list[int]:
        """Those of some shards that the part has."""
        return [shard for shard in shards if shard % self.count == self.number - 1]


WHOLE = Part()


def merge(
    folder: str | PathLike[str],
    parts: Sequence[str | PathLike[str]],
    report: Callable[[str], None] = lambda name: None,
) -> None:
    """Copy the shards of several folders into one cache.

    The folders stay as they are. A merge that was stopped continues with the shards that are missing. Every file is
    compared with its checksum while it is copied.

    Args:
        folder: The folder of the merged cache.
        parts: The folders of the parts, in any order; a folder may hold several parts.
        report: Called with the name of each file that is copied.

    Raises:
        CacheError: If the parts are not of one build, a shard is missing in all of them or differs between two, or a
            file is damaged; the message names the folder or the file. Shards that were copied stay.
        OSError: If the disk is full.
    """
    if isinstance(parts, (str, PathLike)):
        raise CacheError(
            f"Expected a list of folders of parts to merge, but got {parts!r}. Pass [{str(parts)!r}, ...]."
        )
    folder, folders = Path(folder), [local_folder(part) for part in parts]
    manifests: list[Manifest] = []
    for part in folders:
        manifest = begun(part)
        if manifest is None:
            raise CacheError(f"Expected {part} to hold a part of a cache, but it holds none. Build the part first.")
        if manifests and (words := difference(manifests[0], manifest)):
            raise CacheError(f"Expected {part} to be a part of the same build as {folders[0]}, but {words}.")
        if manifest.length == 0:
            raise CacheError(f"Expected {part} to be a part of a data set with a length, but it is of a stream.")
        manifests.append(manifest)
    if not folders:
        raise CacheError("Expected folders of parts to merge, but got none.")
    with locked(folder):
        writer = Writer(folder, begin(folder, manifests[0], resume=True))
        for part, manifest in zip(folders, manifests, strict=True):
            source = Writer(part, manifest)
            for shard in range(manifest.shards):
                if source.whole(shard):
                    _take(writer, source, shard, report)
        if missing := writer.missing:
            raise CacheError(
                f"Expected the parts to hold all {writer.manifest.shards} shards, but {len(missing)} are missing, such"
                f" as {missing[:5]}. Build the parts that hold them, and merge again."
            )
        writer.finish()


def _take(writer: Writer, source: Writer, shard: int, report: Callable[[str], None]) -> None:
    """Copy a shard that is not there yet, and compare one that is."""
    files = cache_files.file_list(source.folder, source.manifest, shard)
    if writer.whole(shard):
        if cache_files.file_list(writer.folder, writer.manifest, shard) != files:
            raise CacheError(
                f"Expected shard {shard} of {source.folder} to equal that of an earlier part, but it differs. Remove"
                " the wrong one."
            )
        return
    for name, facts in files.items():
        path = cache_files.inside(source.folder, name)
        if cache_files.copy(path, writer.folder / name) != facts:
            (writer.folder / name).unlink()
            raise CacheError(
                f"Expected {path} to be unchanged since the build, but its checksum differs. Build the part again."
            )
        report(name)
    name = cache_files.list_name(shard)  # last, since it marks a whole shard
    cache_files.copy(cache_files.inside(source.folder, name), writer.folder / name)
