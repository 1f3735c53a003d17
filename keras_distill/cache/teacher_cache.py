"""The cache of a teacher's outputs: build it, open it and attach it to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import keras
import numpy as np

from distill_core.arrays import checked_keys, manifest_of_outputs, named_arrays, teacher_of_arrays, write_arrays
from distill_core.columns import Ragged
from distill_core.keys import digests
from distill_core.remote import building, open_reader
from distill_core.storage import Storage
from distill_core.store import CacheError, Reader, check_teacher
from distill_core.terminal import short
from keras_distill.cache.builder import Builder, described_teacher
from keras_distill.cache.data import CachedData, as_array, check_length, chosen_views, zipped
from keras_distill.cache.positions import TokenPlaces, padded
from keras_distill.cache.views import Augmentation, PassingItems, Transform, data_fingerprint, requested
from keras_distill.functional.top_k import Sampled, TopK
from keras_distill.recording import Tap, looks_like
from keras_distill.recording.rows import ROWS
from keras_distill.teachers import StoredTeacher

_UNKNOWN = -2  # the cardinality of a tf.data.Dataset of unknown length


class TeacherCache(StoredTeacher):
    """The teacher's outputs for every item of a data set, in a folder, as targets for ``DistillModel.fit``.

    The folder has the format of ``lightning_distill.TeacherCache``, described in :mod:`distill_core.store`: each half
    reads caches of the other. Feature maps of a PyTorch teacher are returned with channels last. If a cache holds the
    likeliest classes only, the loss treats all other classes as one, which divergences such as SoftTargetLoss allow.
    In a list of teachers, ``teacher=[cache, model]``, a cache stands for the outputs that the targets hold.

    Args:
        reader: Reads the folder.

    Attributes:
        manifest: The manifest of the folder.

    Example:
        >>> import tempfile
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> x = np.random.rand(6, 4).astype("float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(teacher, x, folder, dtype="float32", progress=False)
        ...     inputs, targets = cache.attach((x, np.arange(6) % 3), batch_size=2)[1]
        >>> bool(np.allclose(targets.teacher, teacher.predict(x[2:4], verbose=0), atol=1e-6))
        True
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._compares_tokens = reader.manifest.key is not None and not reader.manifest.data["stale"]
        self._maps: dict[str, bool] = {}  # arrays written by PyTorch: whether they are maps, with channels first

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        *,
        teacher: keras.Model | None = None,
        teacher_inputs: Any = None,
        allow_changed_inputs: bool = False,
    ) -> TeacherCache:
        """Open a cache that was built before.

        Args:
            path: The folder, or a URL of fsspec such as ``"s3://bucket/cache"``.
            teacher: The Keras model that the cache must come from; None skips this check.
            teacher_inputs: The maker of the teacher's inputs that it must come from, beside ``teacher``.
            allow_changed_inputs: Whether sequences with a known key may have other tokens than the teacher got.

        Returns:
            The cache.

        Raises:
            CacheError: If the cache is incomplete, or comes from another teacher.
        """
        cache = cls(open_reader(path))
        cache._compares_tokens &= not allow_changed_inputs
        if teacher is not None:
            check_teacher(cache.manifest.teacher, described_teacher(teacher, teacher_inputs), path)
        return cache

    @classmethod
    def build(
        cls,
        teacher: keras.Model,
        inputs: Any,
        path: str | PathLike[str],
        *,
        layers: Sequence[str | Tap] = (),
        outputs: bool = True,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        views: int = 1,
        transform: Transform | None = None,
        transform_seed: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        teacher_inputs: Callable[[Any], Any] | None = None,
        resume: bool = True,
        progress: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Run the teacher over arrays once and store its outputs.

        Args:
            teacher: The teacher, which must have one output; it runs in inference mode.
            inputs: The student's inputs: an array of all items, or several arrays in a list or dict.
            path: The folder, or a URL of fsspec: the cache is then built in a local folder and copied there.
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
            transform: Augments an item: ``transform(x, seed)``, where ``x`` is one item, NumPy arrays in the structure
                of the inputs, and ``seed`` holds two int32 numbers, the only allowed source of randomness: use
                ``np.random.default_rng(seed)``, or pass it as the seed of ``tf.image.stateless_random_crop``.
            transform_seed: Seed from which these numbers are drawn, for each item and view.
            batch_size: Number of items in a batch of the teacher.
            workers: Number of threads that prepare batches while the teacher runs: they transform the items.
            teacher_inputs: Makes the teacher's inputs of a batch, as in :class:`DistillModel`: a function such as
                ``Normalize.between(...)``. Its settings, or the source of a function of a module, are remembered: other
                inputs are another teacher.
            resume: Whether a build that was begun, or is complete, is continued; only complete shards are kept.
            progress: Whether to show a progress bar.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the folder holds something else. If the teacher has several outputs, or returns probabilities
                although ``top_k`` is set. If ``views``, ``transform`` and ``transform_seed`` contradict each other, or
                the transform returns different items for the same seed.
            TypeError: If ``transform`` cannot be called.
            ValueError: If ``top_k``, ``dtype`` or ``workers`` is out of range.
            OSError: If the disk is full; resuming completes the folder.
        """
        builder = Builder(
            teacher,
            inputs,
            layers=layers,
            outputs=outputs,
            storage=Storage(dtype, top_k, sampled, feature_dtype),
            views=views,
            augmentation=requested(transform, transform_seed, views),
            batch_size=batch_size,
            shard_bytes=shard_bytes,
            teacher_inputs=teacher_inputs,
        )
        with building(path) as folder:
            builder.write(folder, resume, workers=workers, progress=progress)
        return cls.open(path)

    @classmethod
    def from_arrays(
        cls,
        arrays: Any,
        path: str | PathLike[str],
        *,
        inputs: Any = None,
        teacher: keras.Model | None = None,
        top_k: int | None = None,
        dtype: str = "float16",
        sampled: int | None = None,
        feature_dtype: str | None = None,
        key: str | int | None = None,
        keys: Sequence[Any] | None = None,
        mask: str | int = "attention_mask",
        resume: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Store outputs that exist already, such as those of another program.

        Args:
            arrays: The outputs, with a row for each item of the data, in their order: an array ``(N, ...)``, which may
                be memory-mapped; for sequences a list of arrays ``(T, ...)``, without padding. Or a dict of
                ``"output"`` and of names of layers to such arrays.
            path: The folder.
            inputs: The inputs of all items, of which :meth:`attach` compares some. None compares their number alone.
            teacher: The teacher that the arrays come from, which :meth:`open` compares; None notes a digest of the
                arrays.
            top_k: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            dtype: As in :meth:`build`.
            sampled: As in :meth:`build`; the outputs must then be logits or log-probabilities.
            feature_dtype: As in :meth:`build`.
            key: Where samples in PyTorch have their key, a column or an index, if ``keys`` are passed.
            keys: The key of each row: a string, bytes or a whole number.
            mask: Where batches in PyTorch keep the mask of their tokens, for sequences.
            resume: Whether a build that was begun, or is complete, is continued.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the arrays and keys do not fit each other, or the folder holds something else.
            ValueError: If the numbers do not fit the storage.
            OSError: If the disk is full; resuming completes the folder.

        Example:
            >>> import tempfile
            >>> tokens = [np.zeros((5, 30)), np.zeros((2, 30))]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache = TeacherCache.from_arrays(tokens, folder)
            ...     cache.attach(np.ones((2, 6), "int32"))[0][1].teacher.shape
            (2, 6, 30)
        """
        named, layers = named_arrays(keras.tree.map_structure(as_array, arrays))
        if (key is None) != (keys is None):
            raise CacheError(f"Expected `key` and `keys` to be given together, but got key={key!r}. Pass both or none.")
        known = teacher and described_teacher(teacher)
        manifest = manifest_of_outputs(
            len(next(iter(named.values()))),
            layers,
            kind="keras",
            data=None if inputs is None or keys is not None else data_fingerprint(inputs),
            teacher=known or teacher_of_arrays(named),
            key=None if key is None else {"kind": "column", "column": key},
        )
        if inputs is not None:
            check_length(len(keras.tree.flatten(inputs)[0]), manifest.length)
        with building(path) as folder:
            write_arrays(
                folder,
                named,
                manifest,
                Storage(dtype, top_k, sampled, feature_dtype),
                keys=None if keys is None else digests(checked_keys(keys, manifest.length)),
                mask=mask,
                shard_bytes=shard_bytes,
                resume=resume,
            )
        return cls.open(path)

    def attach(
        self,
        data: Any,
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        view: int | None = None,
        transform: Transform | None = None,
        keys: Sequence[Any] | None = None,
        mask: Any = None,
    ) -> CachedData | Any:
        """Data whose targets hold the teacher's outputs.

        Args:
            data: Arrays ``x``, ``(x, y)`` or ``(x, y, sample_weight)``; or a ``tf.data.Dataset`` of single items in the
                order in which the cache was built.
            batch_size: Number of examples in a batch; it applies to arrays.
            shuffle: Whether the order of the examples changes in each epoch; it applies to arrays. Without it Keras'
                ``fit`` still reads the batches in a random order, as of every ``PyDataset``: pass it ``shuffle=False``.
            seed: Seed of the order.
            view: Number of the augmented view to use; None uses view ``epoch % views`` in ``DistillModel.fit``.
            transform: The transform that the cache was built with, so that the student gets the teacher's inputs.
            keys: The key of each item, where the cache was built with keys; the data may then be any part of it.
            mask: For a cache of sequences, where the tokens of each padded item are: an array ``(N, T)`` that is not 0
                there, or its key in a dict of inputs. None looks for ``attention_mask`` and ``padding_mask`` in the
                inputs; without them items are taken to be padded on the right.

        Returns:
            For arrays a ``keras.utils.PyDataset``; for a ``tf.data.Dataset`` another one, to shuffle and batch.

        Raises:
            CacheError: If an item's key or number of tokens is not in the cache. If the data have another length, or
                are not the data that Keras built the cache from, of which a ``tf.data.Dataset`` shows the last item at
                the end of its first pass; if
                ``transform`` or ``view`` does not fit the cache; or if the cache holds augmented views and the data are
                a ``tf.data.Dataset``.
        """
        arrays, manifest = not hasattr(data, "element_spec"), self.manifest
        views = chosen_views(manifest, view, augmented=transform is not None, cycles=arrays)
        rows = self._rows_of(keys)
        unpacked = keras.utils.unpack_x_y_sample_weight(data if arrays else data.element_spec)
        places = TokenPlaces(unpacked[0], mask, batched=arrays) if self._is_ragged else None
        number = manifest.length if rows is None else len(rows)

        def answers(items: Any, view: int) -> Any:
            items = np.asarray(items, "int64")
            return self.answers(view * number + items if rows is None else rows[items], items, places)

        is_known = manifest.data["kind"] == "keras" and not manifest.data["stale"] and rows is None
        known = manifest.data["fingerprint"] if is_known else None
        if not arrays:
            length = int(data.cardinality())
            check_length(number if length == _UNKNOWN else length, number)
            passing = PassingItems(number, known) if known else None
            return zipped(data, answers, views[0], number, passing)
        x, y, weight = unpacked
        check_length(len(keras.tree.flatten(x)[0]), number)
        augmentation = None if transform is None else Augmentation(transform, manifest.data["transform_seed"])
        if known and data_fingerprint(x, augmentation) != known:
            raise CacheError("Expected the data that the cache was built from, but some items differ.")
        return CachedData(
            answers,
            (x, y, weight),
            augmentation=augmentation,
            views=views,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
        )

    def _rows_of(self, keys: Sequence[Any] | None) -> Any:
        """The row of each item, by its key; None if the cache has no keys."""
        if (keys is None) != (self.manifest.key is None):
            expected = (
                "None, since the cache was built without keys" if self.manifest.key is None else "the items' keys"
            )
            received = "keys" if keys is not None else "None"
            raise CacheError(f"Expected `keys` to be {expected}, but got {received}. Keys find the rows of the items.")
        if keys is None:
            return None
        rows = self.reader.find(digests(keys))
        if (rows < 0).any():
            missing = short(keys[int(np.argmax(rows < 0))])
            raise CacheError(
                f"Expected the cache to hold the item with the key {missing}, but it does not ({self.manifest.length}"
                " items). Leave the item out, or build a cache that holds it."
            )
        return rows

    @property
    def _is_ragged(self) -> bool:
        return any(map(self.manifest.is_ragged, self.manifest.arrays))

    def answers(self, rows: Any, items: Any = None, places: TokenPlaces | None = None) -> Any:
        """The teacher's part of :class:`DistillTargets` for some rows.

        Args:
            rows: Row numbers.
            items: Numbers of the student's items, where sequences are padded; None takes those of the rows.
            places: Where the tokens of padded items are, for a cache of sequences.

        Returns:
            The output, which is a :class:`keras_distill.functional.top_k.TopK` if the cache holds only the likeliest
            classes; or ``{"output": ..., "features": {layer: ...}}`` if it holds features too, with the rows of the
            data beside them. Sequences are padded with NaN.

        Raises:
            CacheError: If a file is missing or altered, or the numbers of tokens differ.
        """
        arrays = self.reader.read(rows)
        for name, values in arrays.items():
            if isinstance(values, Ragged):
                if places is None:
                    raise CacheError(
                        "Expected `places` to be given for a cache of sequences, but got None. Use `attach`."
                    )
                items = np.asarray(rows if items is None else items)
                mask = places.of(items, values.lengths)
                if self._compares_tokens and len(items):  # the first item of each batch
                    places.check_tokens(int(items[0]), mask[0], int(self.reader.input_digests(rows[:1])[0]))
                arrays[name] = padded(values, mask)
        output: Any = arrays.get("output", np.zeros((len(rows), 1)))
        if isinstance(output, tuple):
            indices, logs, tail = output
            classes = np.zeros((len(rows), 0, self.manifest.arrays["output"]["shape"][-1]), "float32")
            kind = Sampled if "sampled" in self.manifest.arrays["output"] else TopK
            output = kind(indices.astype("int32"), logs, tail, classes)
        else:
            output = self._channels_last("output", np.asarray(output, "float32"))
        features = {}
        for name, place in self.manifest.layers.items():
            layer, where = place.split("|", 1)
            value = self._channels_last(name, np.asarray(arrays[name], "float32"))
            features[layer + (":input" if where == "input" else "")] = value
        if features:  # each view of an item has a row of its own in the cache
            features[ROWS] = np.asarray(rows, "int64") % self.manifest.length
        return {"output": output, "features": features} if features else output

    def _channels_last(self, name: str, value: Any) -> Any:
        """Move the channels of maps and of logits of pixels from PyTorch to the end; attention maps are unchanged."""
        if self.manifest.data["kind"] == "keras" or value.ndim < 4:
            return value
        if name not in self._maps:
            square = value.ndim == 4 and value.shape[-1] == value.shape[-2]
            attention = name != "output" and square and looks_like(value) == "softmax"
            self._maps[name] = not attention
        return np.moveaxis(value, 1, -1) if self._maps[name] else value
