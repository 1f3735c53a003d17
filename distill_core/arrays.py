"""A cache of arrays that exist already: outputs that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from distill_core.columns import Array, Ragged
from distill_core.locks import locked
from distill_core.manifest import BY_KEY, KEY
from distill_core.storage import Storage
from distill_core.store import CacheError, Manifest, Writer, begin, check_folder, fingerprint

_ROWS: Final = 256  # rows that are read at a time


def named_arrays(arrays: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays by their names in a cache, and the layers of the features.

    Args:
        arrays: The outputs; or a mapping of ``"output"`` and of layers to their arrays.

    Raises:
        CacheError: If it holds no arrays, or they have different numbers of rows.

    Example:
        >>> named_arrays({"body": np.zeros((2, 3)), "output": np.zeros((2, 5))})[1]
        {'feature0': 'body|output'}
    """
    entries = dict(arrays) if isinstance(arrays, Mapping) else {"output": arrays}
    layers = [name for name in entries if name != "output"]
    named = {f"feature{index}": entries[layer] for index, layer in enumerate(layers)}
    named |= {"output": entries["output"]} if "output" in entries else {}
    lengths = {name: len(rows) for name, rows in entries.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise CacheError(
            f"Expected `arrays` to have as many rows each, 1 or more, but got {lengths}. Pass a row for each sample."
        )
    return named, {f"feature{index}": f"{layer}|output" for index, layer in enumerate(layers)}


def manifest_of_outputs(
    length: int,
    layers: dict[str, str],
    *,
    kind: str,
    data: str | None,
    teacher: dict[str, Any],
    key: dict[str, Any] | None,
) -> Manifest:
    """The manifest of a cache of outputs that come from elsewhere, without the descriptions of its arrays.

    Args:
        length: Number of samples.
        layers: The layers of the features.
        kind: The framework, ``"torch"`` or ``"keras"``.
        data: A digest of the data; None if they are not known: then their number alone is compared.
        teacher: ``class`` and ``fingerprint`` of the teacher.
        key: Where the keys of the samples come from, or None.
    """
    number_alone = data is None and key is None
    digest = fingerprint([str(length)]) if data is None else data
    return Manifest(
        length=length,
        views=1,
        shard_rows=1,
        arrays={},
        layers=layers,
        teacher=teacher,
        data={
            "fingerprint": digest if key is None else BY_KEY,
            "transform_seed": None,
            "stale": number_alone,
            "kind": kind,
        },
        versions={"numpy": np.__version__},
        key=key,
    )


def write_arrays(
    folder: Path,
    named: Mapping[str, Any],
    manifest: Manifest,
    storage: Storage,
    *,
    keys: Array | None,
    mask: Any,
    shard_bytes: int,
    resume: bool,
) -> None:
    """Write a cache of arrays.

    Args:
        folder: The folder.
        named: The arrays, from :func:`named_arrays`: rows ``(N, ...)``; or for sequences a list of arrays ``(T, ...)``.
        manifest: Its manifest, without the arrays.
        storage: How the numbers are stored.
        keys: The digests of the samples' keys, uint64, or None.
        mask: Where a batch keeps the mask of its tokens, for sequences; None for a function.
        shard_bytes: Approximate size of a shard.
        resume: Whether a build that was begun is continued.

    Raises:
        CacheError: If the folder holds something else, or rows have different shapes.
        ValueError: If the numbers do not fit the storage.
        OSError: If the disk is full; resuming completes the folder.
    """
    described: dict[str, Any] = {}
    first = {name: _items(name, rows, 0, _ROWS) for name, rows in named.items()}
    storage.check_scores(first)
    for name, rows in first.items():
        shape = (rows.values if isinstance(rows, Ragged) else rows).shape[1:]
        described[name] = storage.describe(name, shape, channels_first=manifest.data["kind"] == "torch")
        if isinstance(rows, Ragged):
            described[name]["ragged"] = mask
    manifest = replace(manifest, arrays=described)
    row_bytes = mean_bytes(manifest, first)
    manifest = replace(manifest, shard_rows=max(1, int(shard_bytes / max(row_bytes, 1))))

    def batches(rows: range) -> Iterator[dict[str, Any]]:
        for start in range(rows.start, rows.stop, _ROWS):
            stop = min(start + _ROWS, rows.stop)
            batch = {name: _items(name, array, start, stop) for name, array in named.items()}
            if keys is not None:
                batch[KEY] = np.stack([keys[start:stop], np.zeros_like(keys[start:stop])], -1)
            yield batch

    check_folder(folder)
    with locked(folder):
        begin(folder, manifest, resume)
        writer = Writer(folder, manifest)
        for shard in writer.missing:
            writer.write(shard, batches(manifest.shard_range(shard)))
        writer.finish()


def teacher_of_arrays(named: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher in the manifest of arrays from an unknown one: a digest of all their numbers.

    It tells them from others when a build is continued.

    Args:
        named: The arrays, from :func:`named_arrays`.
    """

    def parts() -> Iterator[Any]:
        for name, rows in named.items():
            yield name
            for start in range(0, len(rows), _ROWS):
                items = _items(name, rows, start, start + _ROWS)
                yield from (items.lengths, items.values) if isinstance(items, Ragged) else (items,)

    return {"class": "arrays", "fingerprint": fingerprint(parts())}


def mean_bytes(manifest: Manifest, rows: Mapping[str, Any]) -> float:
    """The mean number of bytes of a row, from some rows.

    Args:
        manifest: The manifest.
        rows: Rows of each array.
    """
    total = 0.0
    for name, codec in manifest.codecs.items():
        items = rows[name]
        positions = len(items.values) / len(items.lengths) if isinstance(items, Ragged) else 1
        total += positions * codec.bytes_per_item
    return total


def _items(name: str, rows: Any, start: int, stop: int) -> Any:
    """Some rows as float32, a Ragged for a list of sequences."""
    part = rows[start:stop]
    if not isinstance(rows, (list, tuple)):
        return as_numbers(name, part)
    sequences = [as_numbers(name, sequence) for sequence in part]
    shapes = {sequence.shape[1:] for sequence in sequences}
    if any(sequence.ndim < 2 for sequence in sequences) or len(shapes) > 1:
        raise CacheError(
            f"Expected {name!r} to be a list of sequences of the shape (tokens, ...), the last sizes the same, but got"
            f" {sorted({sequence.shape for sequence in sequences})[:3]}. Stack rows without tokens into one array."
        )
    return Ragged(np.concatenate(sequences), np.array([len(sequence) for sequence in sequences]))


def as_numbers(name: str, values: Any) -> Array:
    """Outputs or features as real numbers in float32.

    Args:
        name: Their name, for the message.
        values: An array, or what NumPy can turn into one.

    Raises:
        CacheError: If they are not numbers: complex ones would lose a part, bools are decisions, and masked entries
            have no value.
    """
    if np.ma.is_masked(values):
        raise CacheError(f"Expected {name!r} to have a value everywhere, but got masked entries. Leave those rows out.")
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":  # which NumPy itself lacks
        raise CacheError(f"Expected {name!r} to hold numbers, but got dtype {array.dtype}. Pass arrays of floats.")
    return array.astype("float32", copy=False)


def checked_keys(keys: Sequence[Any], length: int) -> Sequence[Any]:
    """The keys of the samples, after a check of their number.

    Raises:
        CacheError: If there are more or fewer than rows.
    """
    if len(keys) != length:
        raise CacheError(f"Expected `keys` to have {length} entries, one for each row, but got {len(keys)}.")
    return keys
