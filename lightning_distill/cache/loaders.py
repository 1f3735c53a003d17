"""Data loaders whose workers read the teacher's outputs along with the samples."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill_core.columns import Ragged
from distill_core.store import CacheError, Manifest, Reader
from distill_core.terminal import short
from lightning_distill import compat
from lightning_distill.cache.data import Rows, seeded
from lightning_distill.cache.keyed import SampleKeys, input_digests
from lightning_distill.cache.positions import LABELS, Mask, needed_mask, tokens_in
from lightning_distill.patch import MISSING

_TWIN = "_twin_of"  # attribute of a twin: the original loader


class OpenCache(Protocol):
    """Interface of a cache for training: a :class:`TeacherCache`."""

    reader: Reader
    allow_changed_inputs: bool
    mask: Mask | None
    keys: SampleKeys | None

    @property
    def manifest(self) -> Manifest:
        """The cache's manifest."""


class CachedBatch(NamedTuple):
    """A batch with the teacher's outputs for its samples. A named tuple, because ``pin_memory`` goes through it.

    Attributes:
        batch: The batch as the data loader returns it without a cache.
        answers: From :func:`read_answers`.
    """

    batch: Any
    answers: dict[str, Tensor]


class _Fetched(NamedTuple):
    """The argument of the collate function: rows of the cache, and the samples."""

    rows: list[int]
    samples: Any


def read_answers(cache: OpenCache, rows: Any, batch: Any) -> dict[str, Tensor]:
    """The teacher's outputs for some rows, as CPU tensors.

    Args:
        cache: The cache.
        rows: Row numbers, shape ``(N,)``.
        batch: The batch of these samples, which says where the tokens of padded sequences are.

    Returns:
        ``"rows"``, the row numbers; ``"output"``, or ``"output.indices"``, ``"output.logs"`` and ``"output.tail"`` of
        a cache of the likeliest classes; and ``"feature0"``...; each of shape ``(N, ...)``. For sequences the positions
        of all rows, shape ``(P, ...)``; ``"output.mask"``, their places in the batch, shape ``(N, T)``; and
        ``"output.places"``, the same as indices of the flattened mask.

    Raises:
        CacheError: If the batch does not say where its tokens are, or has other numbers of tokens than the cache.
    """
    rows = torch.as_tensor(rows)
    answers = {"rows": rows}
    for name, values in cache.reader.read(rows.cpu().numpy()).items():
        if isinstance(values, Ragged):
            place = cache.manifest.arrays[name]["ragged"] if cache.mask is None else cache.mask
            mask = needed_mask(batch, place).cpu()
            _check_lengths(mask, torch.from_numpy(values.lengths), rows, place)
            answers |= {f"{name}.mask": mask, f"{name}.places": mask.flatten().nonzero()[:, 0]}
            values = values.values
        if isinstance(values, tuple):
            parts = zip(("indices", "logs", "tail"), values, strict=True)
            answers |= {f"{name}.{part}": torch.from_numpy(array) for part, array in parts}
        else:
            answers[name] = torch.from_numpy(values)
    return answers


def _check_lengths(mask: Tensor, lengths: Tensor, rows: Tensor, place: Mask | None) -> None:
    """Raise if a batch has other numbers of tokens than the cache."""
    if len(mask) != len(lengths):
        raise CacheError(
            f"Expected the batch to have {len(lengths)} sequences, one for each sample, but its mask has {len(mask)}."
            " The collate function must not drop, repeat or pack samples."
        )
    differs = (mask.sum(1) != lengths).nonzero()[:, 0].tolist()
    if differs:
        first = differs[0]
        side = (
            " Labels do not show padding on the left: put an attention_mask into the batch." if place == LABELS else ""
        )
        raise CacheError(
            f"Expected row {int(rows[first])} to have the {int(lengths[first])} tokens that the teacher got, but its"
            f" mask has {int(mask[first].sum())}: the samples are truncated or tokenized in another way than in the"
            f" build, or the mask is another one. Build the cache from these samples.{side}"
        )


class NumberedDataset:
    """The dataset as workers read it: its samples come with their rows in the cache.

    ``__getitems__`` reads a whole batch, so that datasets that read in batches still do. In everything else the object
    acts like the user's dataset, so that ``worker_init_fn`` can use ``get_worker_info().dataset``. In the main process
    the user's code never meets it.

    Args:
        dataset: The user's dataset.
        rows: Row of each sample in the first view.
        length: Number of samples in the cache.
        views: Number of views. With several, indices are ``view * len(dataset) + index``.
        transform_seed: Seed of the views; None leaves random numbers alone.
    """

    def __init__(self, dataset: Any, rows: Rows, length: int, views: int, transform_seed: int | None) -> None:
        object.__setattr__(self, "_inner", dataset)
        object.__setattr__(self, "_numbering", (rows, length, views, transform_seed))

    def __getitems__(self, indices: Any) -> _Fetched:
        _, _, _, seed = self._numbering
        places = [self._place(index) for index in indices]
        many = getattr(self._inner, "__getitems__", None)
        if many and seed is None:
            samples = many([index for index, _, _ in places])
        else:  # each sample is seeded separately
            samples = []
            for index, view, row in places:
                with seeded(seed, view, row):
                    samples.append(self._inner[index])
        return _Fetched([self._row(view, row) for _, view, row in places], samples)

    def __getitem__(self, indices: Any) -> _Fetched:
        """Samples for ``batch_size=None``: the sampler's indices, from which the dataset makes a batch itself."""
        _, _, _, seed = self._numbering
        if not isinstance(indices, (list, tuple, np.ndarray, Tensor)) or np.ndim(indices) != 1:
            raise CacheError(
                "Expected a data loader that makes batches, but got batch_size=None and a sampler of single indices."
                " Give it a batch size."
            )
        if seed is not None:
            raise CacheError(
                "Expected a data loader with a batch size where the cache was built with transform_seed, but got"
                " batch_size=None: the items of a batch could not be seeded one by one. Give it a batch size."
            )
        places = [self._place(index) for index in indices]
        plain = indices if self._numbering[2] == 1 else [index for index, _, _ in places]
        return _Fetched([self._row(view, row) for _, view, row in places], self._inner[plain])

    def _place(self, code: Any) -> tuple[Any, int, int]:
        """Index in the dataset, view, and row in the first view."""
        rows, _, views, _ = self._numbering
        try:
            number = operator.index(code)
        except TypeError:
            raise CacheError(
                f"Expected the data loader's sampler to return indices with a cached teacher, but got {code!r}."
                " Use a sampler of integers."
            ) from None
        if views == 1:
            return code, 0, int(rows[number])  # the unchanged index, as without a cache
        view, index = divmod(number, len(self._inner))
        return index, view, int(rows[index])

    def _row(self, view: int, row: int) -> int:
        length: int = self._numbering[1]
        return view * length + row

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __reduce__(self) -> Any:
        return NumberedDataset, (self._inner, *self._numbering)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the user's dataset, for ``isinstance`` in a worker."""
        return type(self._inner)


class AnswerCollate:
    """The user's collate function, and the teacher's outputs for the same samples; it runs in the worker.

    Args:
        collate: The data loader's own.
        cache: The cache.
        makes_batches: Whether the loader makes batches of samples, rather than the dataset itself.
    """

    def __init__(self, collate: Callable[[Any], Any], cache: OpenCache, makes_batches: bool) -> None:
        self.collate, self.cache, self.makes_batches = collate, cache, makes_batches

    def __call__(self, fetched: Any) -> CachedBatch:
        """The batch of the samples, and the teacher's outputs for them.

        Args:
            fetched: :class:`_Fetched`; the samples alone if the cache finds their rows by key.
        """
        keys = self.cache.keys
        if keys is None:
            rows, samples = fetched
        else:
            samples = fetched
            values = keys.values(samples) if self.makes_batches else keys.of_batch(samples)
            rows = keys.rows(values, self.cache.reader)
        before = None if self.cache.allow_changed_inputs else _random_state()
        batch = self.collate(samples)
        if before is not None and before != _random_state() and not _holds(batch, samples):
            raise CacheError(
                "Expected the data loader's collate function to keep the items unchanged, since the cache holds the"
                " teacher's outputs for these, but it changes them at random (mixup?). Pass TeacherCache.open(path,"
                " allow_changed_inputs=True) if the teacher's outputs fit the changed items too."
            )
        answers = read_answers(self.cache, rows, batch)
        if keys is not None and not self.cache.allow_changed_inputs:
            self._check_inputs(batch, answers, values[0])
        return CachedBatch(batch, answers)

    def _check_inputs(self, batch: Any, answers: dict[str, Tensor], key: Any) -> None:
        """Raise if the first sample of a batch has another content than the teacher got under the same key."""
        manifest = self.cache.manifest
        ragged = next((name for name in manifest.arrays if manifest.is_ragged(name)), None)
        mask = tokens_in(batch, None) if ragged is None else answers[f"{ragged}.mask"]
        seen = input_digests(batch, mask, [0])[0]
        expected = self.cache.reader.input_digests(answers["rows"][:1].numpy())[0]
        if not manifest.data["stale"] and seen and expected and seen != expected:
            raise CacheError(
                f"Expected the sample with the key {short(key)} to be the one that the teacher got, but its inputs"
                " differ: the keys are those of other data, or the samples are changed by augmentation or by another"
                " tokenizer. Build a cache for these data, or pass TeacherCache.open(path, allow_changed_inputs=True)"
                " if the teacher's outputs fit these inputs too."
            )


def _random_state() -> tuple[Any, ...]:
    """The states of the global generators, to be compared."""
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:], torch.get_rng_state().numpy().tobytes()


def _holds(batch: Any, samples: Any) -> bool:
    """Whether a batch holds the first and the last sample unchanged, judged by their first tensors."""
    whole = _first(batch)
    if whole is None or not isinstance(samples, (list, tuple)) or not whole.ndim or len(whole) != len(samples):
        return False
    return all(
        part is not None and part.shape == whole[place].shape and torch.equal(part.to(whole.dtype), whole[place])
        for place in (0, -1)
        for part in (_first(samples[place]),)
    )


def _first(value: Any) -> Tensor | None:
    while isinstance(value, (list, tuple, Mapping)) and len(value):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    return value if isinstance(value, Tensor) else None


class ViewSampler:
    """A sampler that changes the view in each epoch.

    Args:
        sampler: The data loader's own sampler, of indices or of lists of them.
        length: Number of samples in the data.
        views: Number of views.
        epoch: Returns the epoch.
    """

    def __init__(self, sampler: Any, length: int, views: int, epoch: Callable[[], int]) -> None:
        self._sampler, self._length, self._views, self._epoch = sampler, length, views, epoch

    def __len__(self) -> int:
        """Length of the sampler."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        """Indices ``view * length + index`` of this epoch's view."""
        start = self._length * (self._epoch() % self._views)
        for entry in self._sampler:
            yield [start + index for index in entry] if isinstance(entry, (list, tuple)) else start + entry


def original(loader: Any) -> Any:
    """The original loader of a twin; any other loader unchanged."""
    return getattr(loader, _TWIN, loader)


def with_answers(
    loader: DataLoader[Any], dataset: Any, rows: Rows | None, cache: OpenCache, epoch: Callable[[], int]
) -> DataLoader[Any]:
    """A twin of a data loader whose batches are :class:`CachedBatch`; the loader itself is not touched.

    The twin is a shallow copy with the loader's class, dataset, sampler and generator, so the order of the data and
    the attributes of ``trainer.train_dataloader`` are those of a run without a cache. Only ``_get_iterator`` differs:
    it makes the iterator from another copy, which has the wrapped dataset and collate function. If Lightning makes the
    loader again from its attributes (DistributedSampler, overfit_batches), it never meets a wrapper.

    Args:
        loader: The loader.
        dataset: Its dataset, without the wrapper of ``TeacherCache.attach``.
        rows: Row of each sample in the first view; ``None`` if rows are found by key.
        cache: The cache.
        epoch: Returns the epoch, which determines the view.

    Returns:
        The twin.
    """
    twin, made = copy.copy(loader), dict(vars(loader))
    manifest = cache.manifest

    def get_iterator() -> Any:
        view = copy.copy(loader)
        # read now: Lightning sets worker_init_fn after this twin was made, and user code may set other attributes,
        # on the trainer's loader or on its own
        changed = {name: value for name, value in vars(twin).items() if value is not made.get(name, MISSING)}
        values = {**vars(loader), **changed}
        values.pop(compat.ITERATOR_METHOD), values.pop(_TWIN)
        values["dataset"] = dataset
        if rows is not None:
            seed = manifest.data["transform_seed"]
            values["dataset"] = NumberedDataset(dataset, rows, manifest.length, manifest.views, seed)
        makes_batches = values["batch_sampler"] is not None
        values["collate_fn"] = AnswerCollate(values["collate_fn"], cache, makes_batches)
        if manifest.views > 1:
            name = "sampler" if values["batch_sampler"] is None else "batch_sampler"
            values[name] = ViewSampler(values[name], len(dataset), manifest.views, epoch)
        view.__dict__.update(values)  # without __setattr__, which refuses `dataset`
        return compat.make_iterator(view)

    twin.__dict__.update({compat.KEPT_ITERATOR: None, compat.ITERATOR_METHOD: get_iterator, _TWIN: loader})
    return twin


def dispose(twin: DataLoader[Any]) -> None:
    """Release a twin's workers now, and not when its reference cycle is collected."""
    twin.__dict__.pop(compat.ITERATOR_METHOD, None)
    twin.__dict__[compat.KEPT_ITERATOR] = None
