"""Keys of samples: a cache finds the row of a sample by its key, where samples have no numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from distill_core.columns import Array
from distill_core.manifest import CacheError


def digest(key: Any) -> int:
    """The digest of a key, which a cache stores in its place.

    Args:
        key: A string, bytes, or a whole number; or a tuple of these.

    Returns:
        A number below 2**64.

    Raises:
        TypeError: If the key is something else.

    Example:
        >>> digest(7) == digest(np.int32(7)), digest(7) == digest("7"), digest(("a", 7)) == digest(("a7",))
        (True, False, False)
    """
    return int.from_bytes(hashlib.blake2b(_content(key), digest_size=8).digest(), "little")


def digests(keys: Iterable[Any]) -> Array:
    """The digests of some keys, uint64, shape ``(N,)``.

    Args:
        keys: The keys, as in :func:`digest`.

    Raises:
        CacheError: If a key is something else.
    """
    try:
        return np.array([digest(key) for key in keys], dtype="uint64")
    except TypeError as error:
        raise CacheError(str(error)) from None


def _content(key: Any) -> bytes:
    if isinstance(key, np.generic):
        key = key.item()
    if isinstance(key, str):
        return b"s" + key.encode("utf-8", "surrogatepass")
    if isinstance(key, bytes):
        return b"b" + key
    if isinstance(key, int) and not isinstance(key, bool):
        return b"i" + str(key).encode()
    if isinstance(key, tuple):
        parts = [_content(part) for part in key]
        return b"t" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    raise TypeError(
        f"Expected the key of a sample to be a string, bytes, a whole number, or a tuple of these, but got"
        f" {type(key).__name__}. Pass key=<a column of such values, or a function that returns one>."
    )
