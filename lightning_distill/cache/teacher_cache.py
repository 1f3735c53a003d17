"""The cache of a teacher's outputs as users open, build and attach it."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from distill_core.remote import open_reader
from distill_core.store import Manifest, Reader, check_teacher
from lightning_distill.cache.attached import KeyedDataset, KeyedStream
from lightning_distill.cache.calling import described_teacher
from lightning_distill.cache.data import AttachedDataset, IndexedCollate, check_data
from lightning_distill.cache.keyed import Key, SampleKeys, check_first_key
from lightning_distill.cache.makers import Makers
from lightning_distill.cache.positions import Mask
from lightning_distill.cache.teacher import CachedTeacher
from lightning_distill.teachers.inputs import Place


class TeacherCache(Makers):
    """The teacher's outputs for every item of a data set, in a folder; it takes the teacher's place.

    Build it once with :meth:`build`, open it with :meth:`open`, and pass it as ``DistillCallback(teacher=cache)``. The
    module, its batches and its data loaders do not change: the loader's workers read the outputs together with the
    items, and the outputs are removed again before any hook of the module gets the batch. The folder holds a JSON
    manifest and NumPy files (see :mod:`distill_core.store`); ``keras_distill.TeacherCache`` reads the same folder.

    The training data must be a map-style DataLoader over the data that the cache was built from, or over a part of it:
    a Subset, a ``random_split``, or a ConcatDataset of parts. Any sampler and collate function will do. A cache that
    was built with ``key=`` serves any data that hold its samples, streams among them. If the Trainer
    has several loaders, the cache serves the one that fits. The student must get these items unchanged, since the cache
    has no outputs for others. Mixup, augmentation or normalization in ``training_step``, in a batch-transfer hook or at
    random in the collate function is an error unless ``allow_changed_inputs=True``. Views, fixed slices, and copies in
    another dtype, layout or shape are not changes. A batch without tensors, such as one of strings, cannot be checked.
    Randomness of the collate function is only noticed if it comes from the global generators of torch, NumPy or Python.

    Sequences are stored without padding: where a batch has an ``attention_mask``, or ``labels`` that are -100 at
    padding, outputs and features ``(B, T, ...)`` are stored at the tokens alone, and come back at the places of the
    tokens in the student's batch, whatever its padding. Padding is NaN there, so terms need their masks, as
    SequenceDistillation has by itself. They are the live teacher's numbers if the teacher's own do not depend on
    padding.

    Args:
        reader: Reads the folder.
        allow_changed_inputs: Accept inputs of the student that differ from the items of the data loader.
        mask: Where a batch keeps the mask of its tokens; None takes the place in the manifest.
        key: Where a sample has its key; None takes the place in the manifest.

    Attributes:
        manifest: Contents of the cache.

    Example:
        >>> import tempfile
        >>> import torch
        >>> teacher, data = nn.Linear(4, 3), torch.utils.data.TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(teacher, data, folder, dtype="float32", progress=False)
        ...     row = cache.read([4])["output"]
        >>> bool(torch.allclose(torch.from_numpy(row), teacher(data[4][0])))
        True
    """

    def __init__(
        self,
        reader: Reader,
        *,
        allow_changed_inputs: bool = False,
        mask: Mask | None = None,
        key: Key | None = None,
    ) -> None:
        self.reader, self.allow_changed_inputs, self.mask = reader, allow_changed_inputs, mask
        self.keys = SampleKeys.of(reader.manifest, key)

    @property
    def manifest(self) -> Manifest:
        """The cache's manifest."""
        return self.reader.manifest

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        *,
        teacher: nn.Module | None = None,
        teacher_inputs: Place = None,
        dataset: Any = None,
        allow_changed_inputs: bool = False,
        mask: Mask | None = None,
        key: Key | None = None,
        local: str | PathLike[str] | None = None,
        local_bytes: int | None = None,
    ) -> TeacherCache:
        """Open a cache that was built before.

        Args:
            path: The folder, or a URL of fsspec such as ``"s3://bucket/cache"``, whose files are copied to this machine
                when they are first read.
            teacher: The teacher that it must come from; None does not check.
            teacher_inputs: The maker of the teacher's inputs that it must come from, beside ``teacher``.
            dataset: The data that it must come from, or a part of them; None does not check.
            allow_changed_inputs: Accept that the training step, a batch-transfer hook or the collate function changes
                the items before the student gets them (mixup, augmentation on the GPU, ``images / 255``). The cached
                outputs belong to the unchanged items. Accept changes only if they should not alter the teacher's
                outputs, or if the teacher got the changed items in :meth:`build`.
            mask: Where a batch keeps the mask of its tokens, as in :meth:`build`. None takes that of the build, which
                is remembered unless it is a function.
            key: Where an item has its key, as in :meth:`build`. None takes that of the build, which is remembered
                unless it is a function of your own.
            local: Where the files of a URL are kept; None is a folder of its own in ``~/.cache/distill``, or in
                ``$DISTILL_CACHE_DIR``.
            local_bytes: How many bytes of them are kept; None is 10 GiB. Those that were not read for the longest time
                are removed.

        Returns:
            The cache.

        Raises:
            CacheError: If the cache is incomplete, or comes from another teacher or other data.
        """
        reader = open_reader(path, local, local_bytes)
        cache = cls(reader, allow_changed_inputs=allow_changed_inputs, mask=mask, key=key)
        if teacher is not None:
            check_teacher(cache.manifest.teacher, described_teacher(teacher, teacher_inputs), path)
        if dataset is not None:
            cache._check(dataset)
        return cache

    def _check(self, dataset: Any) -> None:
        if self.keys is None:
            check_data(dataset, self.manifest)
        else:
            check_first_key(dataset, self.keys, self.reader)

    def as_source(self) -> CachedTeacher:
        """The source of the teacher's answers for a distiller."""
        return CachedTeacher(self)

    def attach(self, dataset: Any) -> AttachedDataset | KeyedDataset | KeyedStream:
        """The data with the row of each item, for a loop of your own. The callback does this by itself.

        In the loop, pass the whole batch of a DataLoader over it to ``total``, which finds the rows in it::

            for indexed in DataLoader(cache.attach(dataset), batch_size=32, shuffle=True):
                x, y = indexed.batch
                with distiller.record():
                    loss = F.cross_entropy(student(x), y)
                distiller.total(loss, indexed).backward()

        With a collate function of your own pass ``collate_fn=cache.collate(collate_fn)``.

        Args:
            dataset: The data that the cache was built from, or a part of them; any data of its items if it has keys.

        Returns:
            A data set of :class:`IndexedBatch`, whose item ``view * len(dataset) + index`` is augmented for that view.

        Raises:
            CacheError: If the cache was built from other data.
        """
        if self.keys is not None:
            check_first_key(dataset, self.keys, self.reader)
            kind = KeyedStream if isinstance(dataset, IterableDataset) else KeyedDataset
            return kind(dataset, self.keys, self.reader)
        rows = check_data(dataset, self.manifest)
        return AttachedDataset(dataset, self.manifest.length, self.manifest.data["transform_seed"], rows)

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A collate function for the items of :meth:`attach`, from one for the items of the data.

        Args:
            collate_fn: Makes a batch of items.
        """
        return IndexedCollate(collate_fn)

    def read(self, rows: Any) -> dict[str, Any]:
        """The teacher's outputs for some rows.

        Args:
            rows: Row numbers, ``view * length + index``.

        Returns:
            ``"output"`` and ``"feature0"``...: arrays, or for ``top_k`` classes, log-probabilities and tail. Those of
            sequences are named tuples of the positions of all rows and the rows' ``lengths``.

        Raises:
            CacheError: If a file is missing or altered.
        """
        return self.reader.read(rows)

    def verify(self) -> None:
        """Check every file against its checksum.

        Raises:
            CacheError: If a file differs; the message names the first.
        """
        self.reader.verify()
