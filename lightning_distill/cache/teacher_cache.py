"""The cache of a teacher's outputs as users open, build and attach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from distill_core.parts import Part, merge
from distill_core.storage import Storage
from distill_core.store import CacheError, Manifest, Reader
from lightning_distill.cache.attached import KeyedDataset, KeyedStream
from lightning_distill.cache.builder import Builder, Forward, build, teacher_fingerprint
from lightning_distill.cache.data import AttachedDataset, IndexedCollate, check_data
from lightning_distill.cache.imported import Imported
from lightning_distill.cache.keyed import Key, SampleKeys, check_first_key
from lightning_distill.cache.positions import Mask
from lightning_distill.cache.teacher import CachedTeacher
from lightning_distill.recording import Tap


class TeacherCache:
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
    def build(
        cls,
        teacher: nn.Module,
        dataset: Any,
        path: str | PathLike[str],
        *,
        layers: Sequence[str | Tap] = (),
        outputs: bool = True,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        views: int = 1,
        transform_seed: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
        resume: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        key: Key | None = None,
        mask: Mask | None = None,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
        allow_stale_augmentation: bool = False,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Run the teacher over the data once and keep its outputs.

        A build that was stopped continues with its missing shards. Under ``torch.distributed`` the processes share the
        work.

        Args:
            teacher: The teacher; it runs in eval mode, and its mode is restored afterwards.
            dataset: The data, map-style, with a length.
            path: The folder.
            layers: Layers whose features are kept.
            outputs: Whether the outputs are kept.
            top_k: How many of the likeliest classes are kept of each output; None keeps all numbers.
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; with ``top_k`` ``"float16"`` or ``"uint8"``, 8 bits
                linear in the log-probability.
            sampled: How many classes are drawn at random from each output, with importance weights: an unbiased
                estimate of all probabilities in few bytes, for losses that are linear in them. None draws none.
            feature_dtype: Precision of the features: None is ``dtype``; ``"uint8"`` is 8 bits, linear between the
                smallest and the largest number of each channel in a shard.
            views: Number of augmented views of each item; epochs cycle through them.
            transform_seed: Makes random transforms repeatable, so that student and teacher get the same views. They
                must draw from the global generators of torch, NumPy or Python.
            batch_size: Number of items in a batch of the teacher.
            num_workers: Number of worker processes that load data.
            progress: Whether to print the size beforehand and show a progress bar.
            resume: Whether a build that was begun, or is complete, is continued.
            collate_fn: Makes a batch of items; None is torch's own.
            key: Where an item has a key of its own: a column of a dict, an index of a tuple, or a function of the item
                that returns a string, bytes or a whole number; :func:`content_key` for a digest of the item. Rows are
                then found by key, in any data that hold the items. Needed for streams. None numbers the items.
            mask: Where a batch keeps the mask of its tokens, shape ``(B, T)``: a key, an index, or a function of the
                batch. Outputs and features ``(B, T, ...)`` are stored at these positions alone. None looks for
                ``attention_mask``, then ``labels``; for the outputs of an encoder and a decoder
                ``decoder_attention_mask``, then ``labels``.
            forward: Called with the teacher and a batch, returns its output; None calls it with the batch's inputs.
            device: Where the teacher runs; None leaves it where it is.
            allow_stale_augmentation: Accept items that change between reads: the student then gets other views than
                the teacher did.
            shard_bytes: Approximate size of a shard; one is held in memory while it is built.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If a setting is wrong, items change between reads, the folder holds something else, or another
                process builds there.
            OSError: If the disk is full; resuming completes the folder.
        """
        builder = Builder(
            teacher,
            dataset,
            layers=layers,
            outputs=outputs,
            storage=Storage(dtype, top_k, sampled, feature_dtype),
            views=views,
            transform_seed=transform_seed,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            key=key,
            mask=mask,
            forward=forward,
            device=device,
            allow_stale_augmentation=allow_stale_augmentation,
            shard_bytes=shard_bytes,
        )
        try:
            build(builder, Path(path), resume=resume, progress=progress)
        finally:
            builder.close()
        return cls.open(path, mask=mask, key=key)

    @classmethod
    def build_part(
        cls, teacher: nn.Module, dataset: Any, path: str | PathLike[str], part: str, **settings: Any
    ) -> None:
        """Build every n-th shard of a cache, for jobs that run independently of each other.

        Each job builds into a folder of its own, with the same teacher, data and settings. :meth:`merge`, or
        ``lightning-distill cache merge``, makes one cache of the folders.

        Args:
            teacher: As in :meth:`build`.
            dataset: As in :meth:`build`, with a length.
            path: The folder of the part.
            part: Which part, such as ``"3/16"`` for the third of sixteen.
            **settings: Those of :meth:`build`.

        Raises:
            CacheError: As in :meth:`build`.
            ValueError: If there is no such part.
        """
        chosen = Part.of(part)
        names = ("dtype", "top_k", "sampled", "feature_dtype")
        storage = Storage(**{"dtype": "float16", **{name: settings.pop(name) for name in names if name in settings}})
        resume, progress = settings.pop("resume", True), settings.pop("progress", True)
        builder = Builder(teacher, dataset, storage=storage, **settings)
        try:
            build(builder, Path(path), resume=resume, progress=progress, part=chosen)
        finally:
            builder.close()

    @classmethod
    def merge(cls, path: str | PathLike[str], parts: Sequence[str | PathLike[str]]) -> TeacherCache:
        """Make one cache of the folders of several parts, which stay as they are.

        Every file is compared with its checksum while it is copied. A merge that was stopped continues.

        Args:
            path: The folder of the merged cache.
            parts: The folders of the parts, in any order.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the parts are not of one build, a shard is missing or differs between two parts, or a file is
                damaged; the message names the folder or the file.
            OSError: If the disk is full; shards that were copied stay.
        """
        merge(path, parts)
        return cls.open(path)

    @classmethod
    def from_arrays(
        cls,
        arrays: Any,
        path: str | PathLike[str],
        *,
        dataset: Any = None,
        teacher: nn.Module | None = None,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        key: Key | None = None,
        keys: Sequence[Any] | None = None,
        mask: Mask | None = None,
        resume: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Store outputs that exist already, such as those of another program.

        Args:
            arrays: The outputs, with a row for each item of the data, in their order: an array ``(N, ...)``, which may
                be memory-mapped, or a tensor; for sequences a list of arrays ``(T, ...)``, without padding. Or a dict
                of ``"output"`` and of names of layers to such arrays.
            path: The folder.
            dataset: The data. Some of their items are then compared with those of the training data; None compares
                their number alone.
            teacher: The teacher that the arrays come from, which :meth:`open` compares; None notes a digest of the
                arrays.
            top_k: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            dtype: As in :meth:`build`.
            sampled: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            feature_dtype: As in :meth:`build`.
            key: Where an item has its key, as in :meth:`build`.
            keys: The key of each row; None reads them from ``dataset``.
            mask: Where a batch keeps the mask of its tokens, for sequences. None is ``"attention_mask"``.
            resume: Whether a build that was begun, or is complete, is continued.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the arrays, the data and the keys do not fit each other, or the folder holds something else.
            ValueError: If the numbers do not fit the storage.
            OSError: If the disk is full; resuming completes the folder.

        Example:
            >>> import tempfile
            >>> tokens = [torch.randn(5, 30), torch.randn(2, 30)]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache = TeacherCache.from_arrays(tokens, folder, key="id", keys=["a", "b"])
            ...     cache.read([1])["output"].values.shape
            (2, 30)
        """
        imported = Imported(arrays, dataset, teacher, key, keys)
        imported.write(Path(path), Storage(dtype, top_k, sampled, feature_dtype), mask, shard_bytes, resume)
        return cls.open(path, mask=mask, key=key)

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        *,
        teacher: nn.Module | None = None,
        dataset: Any = None,
        allow_changed_inputs: bool = False,
        mask: Mask | None = None,
        key: Key | None = None,
    ) -> TeacherCache:
        """Open a cache that was built before.

        Args:
            path: The folder.
            teacher: The teacher that it must come from; None does not check.
            dataset: The data that it must come from, or a part of them; None does not check.
            allow_changed_inputs: Accept that the training step, a batch-transfer hook or the collate function changes
                the items before the student gets them (mixup, augmentation on the GPU, ``images / 255``). The cached
                outputs belong to the unchanged items. Accept changes only if they should not alter the teacher's
                outputs, or if the teacher got the changed items in :meth:`build`.
            mask: Where a batch keeps the mask of its tokens, as in :meth:`build`. None takes that of the build, which
                is remembered unless it is a function.
            key: Where an item has its key, as in :meth:`build`. None takes that of the build, which is remembered
                unless it is a function of your own.

        Returns:
            The cache.

        Raises:
            CacheError: If the cache is incomplete, or comes from another teacher or other data.
        """
        cache = cls(Reader(Path(path)), allow_changed_inputs=allow_changed_inputs, mask=mask, key=key)
        if teacher is not None and teacher_fingerprint(teacher) != cache.manifest.teacher["fingerprint"]:
            raise CacheError(
                f"Expected {path} to be of this teacher, but it was built with another"
                f" {cache.manifest.teacher['class']}. Build it again."
            )
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
