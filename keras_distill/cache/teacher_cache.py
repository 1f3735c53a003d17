"""The cache of a teacher's outputs: build it, open it and attach it to data."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distill_core.storage import Storage
from distill_core.store import CacheError, Manifest, Reader
from keras_distill.cache.builder import Builder, teacher_fingerprint
from keras_distill.cache.data import CachedData, check_length, chosen_views, zipped
from keras_distill.cache.views import Augmentation, Transform, data_fingerprint, requested
from keras_distill.functional.top_k import Sampled, TopK
from keras_distill.recording import Tap, looks_like

_UNKNOWN = -2  # the cardinality of a tf.data.Dataset of unknown length


class TeacherCache:
    """The teacher's outputs for every item of a data set, in a folder, as targets for ``DistillModel.fit``.

    The folder has the format of ``lightning_distill.TeacherCache``, described in :mod:`distill_core.store`: each half
    reads caches of the other. Feature maps of a PyTorch teacher are returned with channels last. If a cache holds the
    likeliest classes only, the loss treats all other classes as one, which divergences such as SoftTargetLoss allow.

    Args:
        reader: Reads the folder.

    Attributes:
        manifest: The manifest of the folder.

    Example:
        >>> import tempfile
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> x = np.random.rand(6, 4).astype("float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(teacher, x, folder, dtype="float32")
        ...     inputs, targets = cache.attach((x, np.arange(6) % 3), batch_size=2)[1]
        >>> bool(np.allclose(targets.teacher, teacher.predict(x[2:4], verbose=0), atol=1e-6))
        True
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._maps: dict[str, bool] = {}  # arrays written by PyTorch: whether they are maps, with channels first

    @property
    def manifest(self) -> Manifest:
        """The manifest of the folder: arrays, layers, data and versions."""
        return self.reader.manifest

    @classmethod
    def open(cls, path: str | PathLike[str], *, teacher: keras.Model | None = None) -> TeacherCache:
        """Open a cache that was built before.

        Args:
            path: The folder.
            teacher: The Keras model that the cache must come from; None skips this check.

        Returns:
            The cache.

        Raises:
            CacheError: If the cache is incomplete, or comes from another teacher.
        """
        cache = cls(Reader(Path(path)))
        if teacher is not None and teacher_fingerprint(teacher) != cache.manifest.teacher["fingerprint"]:
            raise CacheError(f"Expected {path} to be of this teacher, but it was built with another. Build it again.")
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
        resume: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Run the teacher over arrays once and store its outputs.

        Args:
            teacher: The teacher, which must have one output; it runs in inference mode.
            inputs: The teacher's inputs: an array of all items, or several arrays in a list or dict.
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
            transform: Augments an item: ``transform(x, seed)``, where ``x`` is one item, NumPy arrays in the structure
                of the inputs, and ``seed`` holds two int32 numbers, the only allowed source of randomness: use
                ``np.random.default_rng(seed)``, or pass it as the seed of ``tf.image.stateless_random_crop``.
            transform_seed: Seed from which these numbers are drawn, for each item and view.
            batch_size: Number of items in a batch of the teacher.
            resume: Whether a build that was begun, or is complete, is continued; only complete shards are kept.
            shard_bytes: Approximate size of a shard.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the folder holds something else. If the teacher has several outputs, or returns probabilities
                although ``top_k`` is set. If ``views``, ``transform`` and ``transform_seed`` contradict each other, or
                the transform returns different items for the same seed.
            TypeError: If ``transform`` cannot be called.
            ValueError: If ``top_k`` or ``dtype`` is out of range.
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
        )
        builder.write(Path(path), resume)
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
    ) -> CachedData | Any:
        """Data whose targets hold the teacher's outputs.

        Args:
            data: Arrays ``x``, ``(x, y)`` or ``(x, y, sample_weight)``; or a ``tf.data.Dataset`` of single items in the
                order in which the cache was built.
            batch_size: Number of examples in a batch; it applies to arrays.
            shuffle: Whether the order changes in each epoch; it applies to arrays.
            seed: Seed of the order.
            view: Number of the augmented view to use; None uses view ``epoch % views`` in ``DistillModel.fit``.
            transform: The transform that the cache was built with, so that the student gets the teacher's inputs.

        Returns:
            For arrays a ``keras.utils.PyDataset``; for a ``tf.data.Dataset`` another one, to shuffle and batch.

        Raises:
            CacheError: If the data have another length, or are not the data that Keras built the cache from; if
                ``transform`` or ``view`` does not fit the cache; or if the cache holds augmented views and the data are
                a ``tf.data.Dataset``.
        """
        arrays, manifest = not hasattr(data, "element_spec"), self.manifest
        views = chosen_views(manifest, view, augmented=transform is not None, cycles=arrays)
        if not arrays:
            length = int(data.cardinality())
            check_length(manifest.length if length == _UNKNOWN else length, manifest)
            return zipped(data, self.answers, views[0] * manifest.length, manifest.length)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        check_length(len(keras.tree.flatten(x)[0]), manifest)
        augmentation = None if transform is None else Augmentation(transform, manifest.data["transform_seed"])
        if manifest.data["kind"] == "keras" and data_fingerprint(x, augmentation) != manifest.data["fingerprint"]:
            raise CacheError("Expected the data that the cache was built from, but some items differ.")
        return CachedData(
            self.answers,
            (x, y, weight),
            augmentation=augmentation,
            views=views,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
        )

    def answers(self, rows: Any) -> Any:
        """The teacher's part of :class:`DistillTargets` for some rows.

        Args:
            rows: Row numbers.

        Returns:
            The output, which is a :class:`keras_distill.functional.top_k.TopK` if the cache holds only the likeliest
            classes; or ``{"output": ..., "features": {layer: ...}}`` if it holds features too.

        Raises:
            CacheError: If a file is missing or altered.
        """
        arrays = self.reader.read(rows)
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
