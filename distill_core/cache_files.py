"""The files of a cache: their names, atomic writing, and checks before reading."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from distill_core.columns import Array, Column
from distill_core.manifest import CacheError, Manifest, check_file_list, read_json
from distill_core.terminal import short

# Temporary names that only this module uses. They identify the files that a killed build has left.
_PARTIAL: Final = re.compile(
    r"\.(shard-[0-9]{5,}(\.(output|feature[0-9]+|key)\.[a-z]+\.npy|\.json)|building\.json)\.distill-partial"
)
_LARGEST_HEADER: Final = 4096  # bytes; NumPy writes 118


def file_list(folder: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    """Read the list of a shard's files, with their sizes and checksums, and check that every file has its size.

    Args:
        folder: The cache.
        manifest: Its manifest.
        shard: Number of the shard.

    Returns:
        ``bytes`` and ``blake2b`` of each file, by the file's name.

    Raises:
        CacheError: If something is missing or wrong; the message names the file.
    """
    file = inside(folder, list_name(shard))
    files = read_json(file.read_bytes(), file)
    needed = {array_name(shard, *names): column for names, column in manifest.columns.items()}
    check_file_list(files, needed, file)
    for (name, described), column in manifest.columns.items():
        path = inside(folder, array_name(shard, name, described))
        size, expected = path.stat().st_size, files[path.name]["bytes"]
        if size != expected:
            raise CacheError(f"Expected {path} to have {expected} bytes, but it has {size}. Build the cache again.")
        array_place(path, entries(manifest, shard, name, column), column)
    return files


def entries(manifest: Manifest, shard: int, name: str, column: Column) -> int | None:
    """The number of entries of a stored array in a shard, or None for positions: their number is in the file.

    Args:
        manifest: The manifest.
        shard: Number of the shard.
        name: Name of the array that the column belongs to.
        column: The column.
    """
    if column.per == "shard":
        return 1
    return None if column.per == "item" and manifest.is_ragged(name) else len(manifest.shard_range(shard))


def array_place(path: Path, number: int | None, column: Column) -> tuple[int, int]:
    """Check a ``.npy`` file, and return where its numbers begin and how many entries they are.

    The header must be the one that NumPy writes for an array of this shape and dtype. It is compared and never
    evaluated, so a forged header can do nothing.

    Args:
        path: The file.
        number: Number of entries; None takes as many as the file has bytes for.
        column: Shape and dtype of an entry.

    Returns:
        The number of bytes before the array's numbers, and the number of entries.

    Raises:
        CacheError: If the header differs, or the file is shorter or longer than the array.
    """
    with open(path, "rb") as handle:
        start = handle.read(10)
        header = handle.read(min(int.from_bytes(start[8:], "little"), _LARGEST_HEADER))
    size, before = path.stat().st_size, len(start) + len(header)
    if number is None:
        number = max(size - before, 0) // column.bytes
    shape, dtype = (number, *column.shape), np.dtype(column.dtype)
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    if start[:8] != b"\x93NUMPY\x01\x00" or header.rstrip(b" \n") != text:
        got = header.strip().decode("ascii", "replace") if start[:6] == b"\x93NUMPY" else "no header"
        raise CacheError(
            f"Expected {path} to be a .npy file of {column.dtype}, shape {shape}, but got {short(got)}."
            " Build the cache again."
        )
    expected = before + number * column.bytes
    if size != expected:
        raise CacheError(
            f"Expected {path} to have {expected} bytes for shape {shape}, but it has {size}. Build the cache again."
        )
    return before, number


def inside(folder: Path, name: str) -> Path:
    """The path of a file, after a check that it is a plain file inside a folder and not a link to another place.

    Args:
        folder: The folder.
        name: The file's name.

    Returns:
        The path.

    Raises:
        CacheError: If the file does not exist, is not a plain file, or is a link out of the folder.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        raise CacheError(f"Expected {path} to exist, but it does not. Build the cache again.") from None
    except RuntimeError:  # a link to itself, before Python 3.13
        regular, target = False, path
    if not regular:
        raise CacheError(f"Expected {path} to be a file, but it is something else. Build the cache again.")
    if not target.is_relative_to(folder.resolve()):
        raise CacheError(
            f"Expected {path} to be in the cache's folder, but it is a link to {target}. Copy the file into the folder."
        )
    return path


def list_name(shard: int) -> str:
    """Name of the list of a shard's files."""
    return f"shard-{shard:05d}.json"


def array_name(shard: int, name: str, column: str) -> str:
    """Name of the file of one stored array of a shard."""
    return f"shard-{shard:05d}.{name}.{column}.npy"


def _partial(path: Path) -> Path:
    """The temporary name of a file that is being written."""
    return path.with_name(f".{path.name}.distill-partial")


def remove_partial(folder: Path) -> None:
    """Remove the files that a killed build left half written, and nothing else.

    Args:
        folder: The cache; no process may be writing into it.
    """
    for leftover in folder.glob(".*"):
        if _PARTIAL.fullmatch(leftover.name):
            leftover.unlink()


def write(path: Path, content: bytes | Array) -> dict[str, Any]:
    """Write a file atomically: if writing fails, an older file of that name stays unchanged.

    Args:
        path: The file.
        content: Its bytes, or an array for a ``.npy`` file.

    Returns:
        Its size and checksum.
    """
    facts: dict[str, Any] = {}
    with _replacing(path, facts) as handle:
        if isinstance(content, bytes):
            handle.write(content)
        else:
            np.save(handle, content, allow_pickle=False)
    return facts


def copy(source: Path, path: Path) -> dict[str, Any]:
    """Copy a file atomically, in small pieces.

    Args:
        source: The file to copy.
        path: The copy; an older file of that name is replaced.

    Returns:
        The copy's size and checksum.
    """
    facts: dict[str, Any] = {}
    with open(source, "rb") as file, _replacing(path, facts) as copied:
        shutil.copyfileobj(file, copied, 1 << 20)
    return facts


@contextlib.contextmanager
def _replacing(path: Path, facts: dict[str, Any]) -> Iterator[BinaryIO]:
    """A context with a temporary file, which takes the place of a file at the end, or is removed after an error.

    Args:
        path: The file.
        facts: Gets the size and the checksum at the end.
    """
    temporary = _partial(path)
    # "x": a file of that name is not overwritten, and a link is not followed
    handle = open(temporary, "xb")  # noqa: SIM115 - closed below, inside the clean-up
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        facts |= {"bytes": temporary.stat().st_size, "blake2b": checksum(temporary)}
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def checksum(path: Path) -> str:
    """Digest of a file's content, 32 hexadecimal digits."""
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
        if isinstance(part, (str, bytes)):
            digest.update(part.encode() if isinstance(part, str) else part)
        else:
            array = np.ascontiguousarray(part)
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()
