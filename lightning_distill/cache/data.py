"""Data whose items say which row of a cache is theirs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from distill_core.store import CacheError, Manifest, fingerprint

_PROBES = 8


class IndexedBatch(NamedTuple):
    """A batch, or one item of it, with its rows in the cache.

    Attributes:
        batch: What the data give without a cache.
        rows: Row numbers, shape ``(N,)``; a number for one item.
    """

    batch: Any
    rows: Any


class AttachedDataset(Dataset[Any]):
    """A map-style data set that gives each item with its row in a cache.

    Item ``view * len(dataset) + index`` is item ``index`` as augmented for that view: the random state of torch, NumPy
    and ``random`` is seeded for it, and put back.

    Args:
        dataset: The data, as they were for the cache, or a Subset of them.
        length: Number of items in the cache.
        transform_seed: What the views are seeded with; None seeds nothing.
    """

    def __init__(self, dataset: Any, length: int, transform_seed: int | None) -> None:
        self.dataset, self.length, self.transform_seed = dataset, length, transform_seed
        self._indices = _base_indices(dataset)

    def __len__(self) -> int:
        """Number of items of one view."""
        return len(self.dataset)

    def __getitem__(self, code: int) -> IndexedBatch:
        """An item and its row."""
        view, index = divmod(int(code), len(self.dataset))
        base = index if self._indices is None else self._indices[index]
        with seeded(self.transform_seed, view, base):
            return IndexedBatch(self.dataset[index], view * self.length + base)


@contextmanager
def seeded(seed: int | None, view: int, index: int) -> Iterator[None]:
    """A context in which everything random is drawn for one item and one view; ``None`` leaves it as it is."""
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


class ViewSampler:
    """A batch sampler that asks for another view in each epoch.

    Args:
        sampler: The data loader's own batch sampler.
        length: Number of items in the data.
        views: How many views there are.
        epoch: Gives the epoch.
    """

    def __init__(self, sampler: Any, length: int, views: int, epoch: Callable[[], int]) -> None:
        self.batches, self._length, self._views, self._epoch = sampler, length, views, epoch
        self.sampler = getattr(sampler, "sampler", None)  # whose epoch Lightning sets

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of items of this epoch's view."""
        start = self._length * (self._epoch() % self._views)
        for batch in self.batches:
            yield [start + index for index in batch]


def index_loader(
    loader: DataLoader[Any], attached: AttachedDataset, views: int, epoch: Callable[[], int]
) -> Callable[[], None]:
    """Let a data loader give :class:`IndexedBatch`.

    Args:
        loader: The loader; changed in place, past its own protection of what must not change while it is in use.
        attached: Its data with rows.
        views: How many views there are.
        epoch: Gives the epoch.

    Returns:
        What undoes it.

    Raises:
        CacheError: If the loader does not collate batches of single items.
    """
    if loader.batch_sampler is None:
        raise CacheError("Expected a data loader that makes batches, but got batch_size=None. Give it a batch size.")
    new = {"dataset": attached, "collate_fn": IndexedCollate(loader.collate_fn)}
    if views > 1:
        new["batch_sampler"] = ViewSampler(loader.batch_sampler, len(attached), views, epoch)
    old = {name: getattr(loader, name) for name in new}
    for name, value in new.items():
        object.__setattr__(loader, name, value)

    def undo() -> None:
        for name, value in old.items():
            object.__setattr__(loader, name, value)

    return undo


def data_fingerprint(dataset: Any, transform_seed: int | None, stale: bool) -> str:
    """A digest of some items.

    Args:
        dataset: The whole data.
        transform_seed: What the views are seeded with.
        stale: Whether the items change between reads, so that only their number tells anything.

    Returns:
        32 hexadecimal digits.
    """
    return fingerprint([str(len(dataset)), *([] if stale else _leaves(_probes(dataset, transform_seed, None)))])


def changes_between_reads(dataset: Any, transform_seed: int | None) -> bool:
    """Whether some items differ when they are read twice."""
    first, second = (_probes(dataset, transform_seed, other) for other in (0, 1))
    return fingerprint(_leaves(first)) != fingerprint(_leaves(second))


def check_data(dataset: Any, manifest: Manifest) -> None:
    """Raise if data are not those that a cache was built from.

    Raises:
        CacheError: If so.
    """
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if not isinstance(whole, Sized):
        raise CacheError(f"Expected a map-style data set with a length, but got {type(whole).__name__}.")
    if len(whole) != manifest.length:
        raise CacheError(
            f"Expected the data to have the {manifest.length} items that the cache was built from, but got"
            f" {len(whole)}. Pass the whole data set, or a Subset of it."
        )
    if manifest.data["kind"] != "torch":
        if manifest.data["transform_seed"] is not None:
            raise CacheError(
                "Expected a cache of plain items or one that was built in PyTorch, but Keras has augmented what the"
                " teacher was shown. Build it in PyTorch."
            )
        return  # the other half has seen arrays, and not these items
    stale = bool(manifest.data["stale"])
    if data_fingerprint(whole, manifest.data["transform_seed"], stale) != manifest.data["fingerprint"]:
        raise CacheError(
            "Expected the data to be those that the cache was built from, but some items differ. Build a cache for"
            " these data and this transform."
        )


def _base_indices(dataset: Any) -> Sequence[int] | None:
    """Where the items of a Subset are in the whole data."""
    if not isinstance(dataset, Subset):
        return None
    inner = _base_indices(dataset.dataset)
    return dataset.indices if inner is None else [inner[index] for index in dataset.indices]


def _probes(dataset: Any, transform_seed: int | None, other: int | None) -> list[Any]:
    """Some items, spread over the data; ``other`` tells several reads apart where no seed does."""
    length = len(dataset)
    indices = sorted({round(one * (length - 1) / max(_PROBES - 1, 1)) for one in range(_PROBES)})
    items = []
    for index in indices:
        with seeded(other if transform_seed is None else transform_seed, 0, index):
            items.append(dataset[index])
    return items


def _leaves(value: Any) -> Iterable[Any]:
    """The arrays and strings in an item."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        yield (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key)
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    elif hasattr(value, "__array__") or isinstance(value, (int, float)):  # images of PIL too
        yield np.asarray(value)
    else:
        yield repr(value)
