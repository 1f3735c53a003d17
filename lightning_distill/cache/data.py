"""Data sets of a cache, and the row of each sample in it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from distill_core.columns import Array
from distill_core.store import CacheError, Manifest, fingerprint

Rows = Sequence[int] | Array

_PROBES, _PAIRS, _SECONDS = 8, 256, 5.0


class IndexedBatch(NamedTuple):
    """A batch, or a single sample, with its rows in the cache.

    Attributes:
        batch: The batch or sample as the data return it without a cache.
        rows: Row numbers, shape ``(N,)``; a single number for a sample.
    """

    batch: Any
    rows: Any


class AttachedDataset(Dataset[Any]):
    """A map-style data set that returns each sample with its row in a cache.

    Entry ``view * len(dataset) + index`` is sample ``index`` as augmented for that view: the random state of torch,
    NumPy and ``random`` is seeded for it, and restored.

    Args:
        dataset: The data.
        length: Number of samples in the cache.
        transform_seed: Seed of the views; None leaves random numbers alone.
        rows: Row of each sample in the cache's first view, from :func:`find_rows`; None numbers them from 0.
    """

    def __init__(self, dataset: Any, length: int, transform_seed: int | None, rows: Rows | None = None) -> None:
        self.dataset, self.length, self.transform_seed = dataset, length, transform_seed
        self._rows = range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        """Number of samples of one view."""
        return len(self.dataset)

    def __getitem__(self, code: int) -> IndexedBatch:
        """A sample and its row."""
        view, index = divmod(int(code), len(self.dataset))
        row = int(self._rows[index])
        with seeded(self.transform_seed, view, row):
            return IndexedBatch(self.dataset[index], view * self.length + row)


@contextmanager
def seeded(seed: int | None, view: int, index: int) -> Iterator[None]:
    """A context in which random numbers depend only on the seed, the view and the sample; ``None`` changes nothing."""
    if seed is None:
        yield
        return
    kept = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    drawn = int(np.random.SeedSequence([seed, view, index]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.default_generator.manual_seed(drawn)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.random.set_rng_state(kept[2])


class IndexedCollate:
    """A collate function whose batches carry their rows.

    Args:
        collate: The data loader's own.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[IndexedBatch]) -> IndexedBatch:
        """The batch of the items, and their rows."""
        return IndexedBatch(self.collate([item.batch for item in items]), torch.tensor([item.rows for item in items]))


def data_fingerprint(dataset: Any, transform_seed: int | None, stale: bool) -> str:
    """A digest of some samples.

    Args:
        dataset: The whole data.
        transform_seed: Seed of the views.
        stale: Whether the samples change between reads; then only their number is used.

    Returns:
        32 hexadecimal digits.
    """
    return fingerprint([str(len(dataset)), *([] if stale else leaves(_probes(dataset, transform_seed)))])


def changes_between_reads(dataset: Any, transform_seed: int | None) -> bool:
    """Whether some samples differ when they are read twice.

    Up to 256 samples are read twice, for at most a few seconds, because a transform may act rarely. A transform that
    changes 2 % of the samples is missed once in 30,000 times.
    """
    started, length = time.monotonic(), len(dataset)
    for round_ in range(_PAIRS):
        # spread over the data; a small data set is read several times
        index = (round_ * max(length // _PAIRS, 1)) % length if length else 0
        digests = []
        for again in (0, 1):
            with seeded(2 * round_ + again if transform_seed is None else transform_seed, 0, index):
                digests.append(fingerprint(leaves(dataset[index])))
        if digests[0] != digests[1]:
            return True
        if round_ + 1 >= _PROBES and time.monotonic() - started > _SECONDS:
            break
    return False


def check_repeatable(dataset: Any, transform_seed: int | None, allow: bool) -> bool:
    """Check that samples stay the same between reads.

    Args:
        dataset: The whole data.
        transform_seed: Seed of the views.
        allow: Whether samples that change are accepted.

    Returns:
        Whether they change.

    Raises:
        CacheError: If they change and ``allow`` is False.
    """
    changes = changes_between_reads(dataset, transform_seed)
    if changes and not allow:
        remedy = (
            "Pass transform_seed=0, which makes the augmentation of each sample repeatable, and views=... for several"
            " augmentations of each, or allow_stale_augmentation=True."
            if transform_seed is None
            else f"transform_seed={transform_seed} seeds torch, NumPy's global state and random: take random numbers"
            " from these rather than from a generator of your own, or pass allow_stale_augmentation=True."
        )
        raise CacheError(
            "Expected the dataset to return the same samples whenever they are read, but some differ on the second"
            f" read: the student would not see what the teacher saw. {remedy}"
        )
    return changes


def find_rows(dataset: Any, manifest: Manifest) -> Rows | None:
    """The row of each sample in the cache's first view.

    The cached data may be the dataset itself, or be nested in it by Subsets (including those of ``random_split``) and
    ConcatDatasets of parts of it. A cache that was built from one part of ``random_split`` fits that part.

    Args:
        dataset: The data.
        manifest: The cache's manifest.

    Returns:
        The rows, or None if the cache belongs to other data.

    Raises:
        CacheError: If the cache cannot tell which of two data sets it belongs to, or holds views augmented by Keras.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return None
    cached, rows = len(dataset) == manifest.length and _is_cached(dataset, manifest), range(manifest.length)
    if cached and _is_exact(manifest):
        return rows
    inner = _of_subset(dataset, manifest) if isinstance(dataset, Subset) else None
    if cached:
        # judged by its length alone, a shuffled Subset of all samples looks like the data themselves
        if inner is not None and not np.array_equal(inner, rows):
            raise CacheError(
                "Expected the data set that the cache was built from, but got a Subset of all its items in another"
                " order. This cache cannot distinguish them, because it stores only the number of items. Pass the data"
                " set itself, and shuffle in the data loader."
            )
        return rows
    if isinstance(dataset, ConcatDataset):
        parts = [find_rows(part, manifest) for part in dataset.datasets]
        if all(part is not None for part in parts):
            return np.concatenate([np.asarray(part) for part in parts])
    return inner


def check_data(dataset: Any, manifest: Manifest) -> Rows:
    """The row of each sample in the cache's first view, as :func:`find_rows`.

    Raises:
        CacheError: If the data are not those that the cache was built from.
    """
    rows = find_rows(dataset, manifest)
    if rows is not None:
        return rows
    levels, whole = [dataset], dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
        levels.append(whole)
    if isinstance(whole, IterableDataset) or not isinstance(whole, Sized):
        raise CacheError(
            f"Expected a map-style data set with a length, but got {type(whole).__name__}: the items of a stream"
            " have no numbers. Build the cache with key=..., or wrap it in a Dataset with __len__ and __getitem__."
        )
    lengths = [len(level) for level in levels]
    if manifest.length not in lengths:
        raise CacheError(
            f"Expected the data to have the {manifest.length} items that the cache was built from, but got"
            f" {', a part of '.join(map(str, lengths))}. Pass the whole data set, or a Subset of it; or build the cache"
            " with key=..., which finds samples in any data set that holds them."
        )
    raise CacheError(
        "Expected the data to be those that the cache was built from, but some items differ. Build a cache for"
        " these data and this transform."
    )


def _is_exact(manifest: Manifest) -> bool:
    """Whether the cache has a digest of its samples, and not only their number."""
    return manifest.data["kind"] == "torch" and not manifest.data["stale"]


def _is_cached(dataset: Any, manifest: Manifest) -> bool:
    """Whether a data set of the right length is the one that was cached."""
    if manifest.data["kind"] == "torch":
        seed, stale = manifest.data["transform_seed"], bool(manifest.data["stale"])
        return bool(data_fingerprint(dataset, seed, stale) == manifest.data["fingerprint"])
    if manifest.data["transform_seed"] is not None:
        raise CacheError(
            "Expected a cache of plain items, or a cache built in PyTorch, but Keras augmented the teacher's inputs."
            " Build the cache in PyTorch."
        )
    return True  # a cache from Keras has a digest of arrays, which cannot be compared with samples


def _of_subset(dataset: Subset[Any], manifest: Manifest) -> Rows | None:
    inner = find_rows(dataset.dataset, manifest)
    return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices, dtype="int64")]


def tensor_bits(tensor: torch.Tensor) -> Array:
    """A tensor as an array for a digest; bfloat16, which NumPy does not have, as integers of the same bits."""
    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _probes(dataset: Any, transform_seed: int | None) -> list[Any]:
    """Some samples, spread over the data."""
    length = len(dataset)
    samples = []
    for index in sorted({round(probe * (length - 1) / max(_PROBES - 1, 1)) for probe in range(_PROBES)}):
        with seeded(transform_seed, 0, index):
            samples.append(dataset[index])
    return samples


def leaves(value: Any, above: tuple[int, ...] = ()) -> Iterable[Any]:
    """The arrays and strings in a sample or a batch, the same for the same content in every process.

    Args:
        value: The sample: tensors, arrays, numbers and strings in dicts, lists, tuples and objects of any class.
        above: Ids of the objects that hold it.
    """
    if isinstance(value, torch.Tensor):
        yield tensor_bits(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key)
            yield from leaves(value[key], above)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry, above)
    elif isinstance(value, (set, frozenset)):  # their order differs between processes
        yield from sorted(map(repr, value))
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__") or isinstance(value, (int, float)):
        yield np.asarray(value)  # images of PIL too, which have an interface alone
    elif attributes := _attributes(value):  # its repr may shorten tensors or contain an address
        yield type(value).__qualname__
        if id(value) not in above:
            yield from leaves(attributes, (*above, id(value)))
    else:
        yield repr(value)


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that hold an object's content; none if its repr is the content."""
    if isinstance(value, type):
        return {}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    kind: Any = type(value)
    if attributes or kind.__repr__ is not object.__repr__:
        return attributes
    names = [name for base in kind.__mro__ for name in _names(vars(base).get("__slots__", ()))]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
