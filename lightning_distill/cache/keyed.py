"""The keys of samples in PyTorch: a column, a function of the sample, or a digest of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_core.columns import Array
from distill_core.keys import digest, digests
from distill_core.store import CacheError, Manifest, Reader, fingerprint
from distill_core.terminal import short
from lightning_distill.cache.data import leaves
from lightning_distill.recording.batches import inputs_in

Key = str | int | Callable[[Any], Any]


def content_key(sample: Any) -> str:
    """A digest of everything in a sample, as its key where it has no name of its own.

    Pass it as ``TeacherCache.build(..., key=content_key)``. A sample that changes between reads, such as by random
    augmentation, has no row in the cache, and is refused.

    Args:
        sample: The sample: tensors, arrays, numbers and strings in dicts, lists and tuples.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> content_key({"input_ids": [5, 3]}) == content_key({"input_ids": torch.tensor([5, 3])})
        True
    """
    return fingerprint(leaves(_arrays(sample)))


class SampleKeys:
    """The keys of samples.

    Args:
        key: Where a sample has its key: a column of a dict or a field, an index of a tuple, or a function of the
            sample.
    """

    def __init__(self, key: Key) -> None:
        if isinstance(key, bool) or not (isinstance(key, (str, int)) or callable(key)):
            raise CacheError(
                f"Expected `key` to be a column, an index or a function of a sample, but got key={key!r}. Pass"
                " key=content_key for a digest of the sample."
            )
        self.key = key

    @classmethod
    def of(cls, manifest: Manifest, key: Key | None) -> SampleKeys | None:
        """The keys of a cache; None if its rows have numbers.

        Args:
            manifest: The cache's manifest.
            key: The user's setting; None takes the place in the manifest.

        Raises:
            CacheError: If the user's setting does not fit the cache.
        """
        described = manifest.key
        if described is None:
            if key is not None:
                raise CacheError(
                    f"Expected `key` to be None, since the cache was built without keys, but got key={key!r}. Build it"
                    " with key=..."
                )
            return None
        if key is not None:
            if cls(key).described != described:
                raise CacheError(f"Expected `key` to be that of the build, {described}, but got key={key!r}.")
            return cls(key)
        if described["kind"] == "function":
            raise CacheError(
                "Expected `key` to be the function that the cache was built with, but got None. Pass it to"
                " TeacherCache.open(path, key=...)."
            )
        return cls(content_key if described["kind"] == "content" else described["column"])

    @property
    def described(self) -> dict[str, Any]:
        """The keys in a manifest."""
        if callable(self.key):
            return {"kind": "content" if self.key is content_key else "function"}
        return {"kind": "column", "column": self.key}

    def values(self, samples: Sequence[Any]) -> list[Any]:
        """The keys of some samples.

        Raises:
            CacheError: If a sample has no key.
        """
        return [self._value(sample) for sample in samples]

    def of_batch(self, batch: Any) -> list[Any]:
        """The keys in a batch that a data set has made by itself.

        Raises:
            CacheError: If they are not in a column of the batch.
        """
        if callable(self.key):
            raise CacheError(
                "Expected a data loader that makes batches of samples, whose keys are computed, but got"
                " batch_size=None. Give it a batch size, or build the cache with key=<a column>."
            )
        column = self._value(batch)
        return list(column.tolist() if isinstance(column, (Tensor, np.ndarray)) else column)

    def removed(self, batch: Any, digests: Array | None) -> Any:
        """A batch without the keys of its samples, which are not inputs of the teacher.

        Args:
            batch: The batch, whose collate function may have removed them.
            digests: The digests of the keys.
        """
        if isinstance(self.key, str) and isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name != self.key}
        if isinstance(self.key, int) and isinstance(batch, (tuple, list)) and -len(batch) <= self.key < len(batch):
            entry = batch[self.key]
            values = entry.tolist() if isinstance(entry, (Tensor, np.ndarray)) else entry
            try:
                holds_keys = np.array_equal(self.digests(values), digests)  # type: ignore[arg-type]
            except (CacheError, TypeError):
                return batch
            place = self.key % len(batch)
            return [*batch[:place], *batch[place + 1 :]] if holds_keys else batch
        return batch

    def digests(self, values: Sequence[Any]) -> Array:
        """The digests of some keys, uint64.

        Raises:
            CacheError: If a key is neither a string, bytes, a whole number nor a tuple of these.
        """
        return digests(map(plain, values))

    def rows(self, values: Sequence[Any], reader: Reader) -> Array:
        """The rows of the samples with some keys.

        Raises:
            CacheError: If the cache does not hold a key; the message names it.
        """
        rows = reader.find(self.digests(values))
        if (rows < 0).any():
            missing = values[int(np.argmax(rows < 0))]
            why = (
                "The samples were changed since the build (augmentation?), or are other samples."
                if self.key is content_key
                else "Build a cache that holds this sample too, or leave it out of the training data."
            )
            raise CacheError(
                f"Expected the cache to hold the sample with the key {short(plain(missing))}, but it does not"
                f" ({reader.manifest.length} samples). {why}"
            )
        return rows

    def _value(self, sample: Any) -> Any:
        if callable(self.key):
            return self.key(sample)
        if isinstance(self.key, int):
            if isinstance(sample, (tuple, list)) and -len(sample) <= self.key < len(sample):
                return sample[self.key]
        elif isinstance(sample, Mapping):
            if self.key in sample:
                return sample[self.key]
        elif (hasattr(sample, "_fields") or is_dataclass(sample)) and hasattr(sample, self.key):
            return getattr(sample, self.key)
        names = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise CacheError(
            f"Expected every sample to have its key at key={self.key!r}, but got a sample of {short(names)}. Pass"
            " key=<a column, an index, or a function of the sample>."
        )


def plain(key: Any) -> Any:
    """A key as Python's own string or number, where it is a tensor or an array of one."""
    return key.item() if isinstance(key, (Tensor, np.ndarray, np.generic)) and key.ndim == 0 else key


def _arrays(sample: Any) -> Any:
    """The sample with its lists of numbers as arrays, which are faster to digest."""
    if isinstance(sample, Mapping):
        return {name: _arrays(value) for name, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        if sample and all(type(value) in (int, float) for value in sample):
            return np.asarray(sample)
        return [_arrays(value) for value in sample]
    return sample


def input_digests(batch: Any, mask: Tensor | None, samples: Sequence[int]) -> Array:
    """Digests of what a model reads of some samples of a batch, by which other data with the same keys are noticed.

    Args:
        batch: The batch.
        mask: The places of its tokens, shape ``(B, T)``, or ``None``.
        samples: Places of the samples in the batch.

    Returns:
        Digests, uint64; 0 where the batch has no tensor of inputs, or tokens with unknown padding.
    """
    digests = np.zeros(len(samples), "uint64")
    tensor = next((value for value in _read(batch) if _is_read(value, mask)), None)
    if tensor is None:
        return digests
    masked = mask is not None and mask.shape == tensor.shape[:2]
    for place, sample in enumerate(samples):
        row = tensor[sample][mask[sample]] if masked and mask is not None else tensor[sample]
        digests[place] = input_digest(row)
    return digests


def input_digest(row: Tensor) -> int:
    """The digest of the inputs of one sample, such as its tokens without padding; never 0."""
    numbers = row.float() if row.is_floating_point() else row.long()
    return max(digest(numbers.cpu().numpy().tobytes()), 1)


def _read(batch: Any) -> list[Any]:
    """The entries of a batch that a model may read, those that hold the samples themselves first."""
    if isinstance(batch, (tuple, list)):
        return [value for entry in batch for value in (_read(entry) if isinstance(entry, Mapping) else [entry])]
    inputs = inputs_in(batch)
    if not isinstance(inputs, Mapping):
        return [inputs]
    names = sorted(inputs, key=lambda name: name != "input_ids")  # others keep their order
    return [inputs[name] for name in names if not str(name).endswith("mask")]


def _is_read(value: Any, mask: Tensor | None) -> bool:
    """Whether a value is a tensor of numbers, or of tokens whose padding is known, and not of keys or indices."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return False
    return value.is_floating_point() or value.ndim > 2 or (mask is not None and mask.shape == value.shape[:2])


def check_first_key(dataset: Any, keys: SampleKeys, reader: Reader) -> None:
    """Check that a cache holds the first sample of some data; a stream is not opened for it.

    Args:
        dataset: The data.
        keys: The keys of the cache.
        reader: Reads the cache.

    Raises:
        CacheError: If it does not; the message names the key.
    """
    if not isinstance(dataset, torch.utils.data.IterableDataset) and len(dataset):
        keys.rows(keys.values([dataset[0]]), reader)


def first_key_is_held(dataset: Any, keys: SampleKeys, reader: Reader) -> bool:
    """Whether :func:`check_first_key` passes; the data of another loader may have other samples."""
    try:
        check_first_key(dataset, keys, reader)
    except (CacheError, LookupError, TypeError, AttributeError):
        return False
    return True
