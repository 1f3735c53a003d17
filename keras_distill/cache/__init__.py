"""Teacher outputs on disk: the teacher runs once, in either framework, and every later training goes without it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distill_core.store import CacheError, Manifest, Reader
from keras_distill.cache.builder import Builder, teacher_fingerprint
from keras_distill.cache.data import CachedData, check_length, chosen_views, zipped
from keras_distill.cache.views import Augmentation, Transform, data_fingerprint, requested
from keras_distill.functional.top_k import TopK
from keras_distill.recording import Tap, looks_like

__all__ = ["CacheError", "CachedData", "TeacherCache"]

_UNKNOWN = -2  # what a tf.data.Dataset says where nobody knows its length


class TeacherCache:
    """What a teacher gave for every item of some data, in a folder, as targets for ``DistillModel.fit``.

    The folder is that of ``lightning_distill.TeacherCache``, described in :mod:`distill_core.store`: either half reads
    what the other has built. Feature maps of a PyTorch teacher are given channels last. Of a cache of the likeliest
    classes the loss is taken over those and all others together, which divergences such as SoftTargetLoss allow.

    Args:
        reader: Reads the folder.

    Attributes:
        manifest: What it holds.

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
        self._maps: dict[str, bool] = {}  # of arrays that PyTorch has written: whether they have channels first

    @property
    def manifest(self) -> Manifest:
        """What the cache holds."""
        return self.reader.manifest

    @classmethod
    def open(cls, path: str | PathLike[str], *, teacher: keras.Model | None = None) -> TeacherCache:
        """A cache that was built before.

        Args:
            path: The folder.
            teacher: The Keras model that it must come from; None does not ask.

        Returns:
            The cache.

        Raises:
            CacheError: If it is not whole, or comes from another teacher.
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
        views: int = 1,
        transform: Transform | None = None,
        transform_seed: int | None = None,
        batch_size: int = 64,
        resume: bool = True,
        shard_bytes: int = 64 * 2**20,
    ) -> TeacherCache:
        """Run the teacher over arrays once and keep what it gives.

        Args:
            teacher: The teacher, of one output; it runs in inference mode.
            inputs: What it takes: an array of all items, or several in a list or dict.
            path: The folder.
            layers: Layers whose features are kept.
            outputs: Whether the outputs are kept.
            top_k: How many of the likeliest classes are kept of each output; None keeps all numbers.
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; with ``top_k`` ``"float16"`` or ``"uint8"``, 8 bits
                linear in the log-probability.
            views: How many augmented views of each item the teacher is shown; epochs cycle through them.
            transform: Augments an item: ``transform(x, seed)``, where ``x`` is one item, NumPy arrays in the structure
                of the inputs, and ``seed`` two int32 numbers from which everything random must come, by
                ``np.random.default_rng(seed)`` or as the seed of ``tf.image.stateless_random_crop``.
            transform_seed: What those numbers are drawn from, for each item and view.
            batch_size: Items that the teacher is shown at a time.
            resume: Whether a folder that was begun, or is whole, is taken up; only whole shards count.
            shard_bytes: About how large a shard is.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the folder holds something else; if the teacher gives several outputs, or probabilities where
                ``top_k`` is given; if ``views``, ``transform`` and ``transform_seed`` do not go together, or the
                transform gives other items for the same seed.
            TypeError: If ``transform`` cannot be called.
            ValueError: If ``top_k`` or ``dtype`` is out of range.
            OSError: If the disk is full; resuming completes the folder.
        """
        builder = Builder(
            teacher,
            inputs,
            layers=layers,
            outputs=outputs,
            top_k=top_k,
            dtype=dtype,
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
        """Data whose targets carry what the teacher gave.

        Args:
            data: Arrays ``x``, ``(x, y)`` or ``(x, y, sample_weight)``; or a ``tf.data.Dataset`` of single items in the
                order that the cache was built in.
            batch_size: Examples in a batch of arrays.
            shuffle: Whether arrays come in another order in each epoch.
            seed: Of that order.
            view: Which augmented view's answers are given; None takes view ``epoch % views`` in ``DistillModel.fit``.
            transform: The transform that the cache was built with; the student is shown what the teacher was.

        Returns:
            For arrays a ``keras.utils.PyDataset``; for a ``tf.data.Dataset`` another, to shuffle and batch.

        Raises:
            CacheError: If the data have another length, are others than the cache was built from in Keras or augmented
                otherwise, or it cannot be told which view they are.
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
            raise CacheError("Expected the data to be those that the cache was built from, but some items differ.")
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
        """What a DistillTargets carries for some rows.

        Args:
            rows: Row numbers.

        Returns:
            The output, a :class:`keras_distill.functional.top_k.TopK` where only the likeliest classes are held; or
            ``{"output": ..., "features": {layer: ...}}`` where features are held too.

        Raises:
            CacheError: If a file is missing or altered.
        """
        found = self.reader.read(rows)
        output: Any = found.get("output", np.zeros((len(rows), 1)))
        if isinstance(output, tuple):
            indices, logs, tail = output
            nothing = np.zeros((len(rows), 0, self.manifest.arrays["output"]["shape"][-1]), "float32")
            output = TopK(indices.astype("int32"), logs, tail, nothing)
        else:
            output = self._channels_last("output", np.asarray(output, "float32"))
        features = {}
        for name, place in self.manifest.layers.items():
            layer, where = place.split("|", 1)
            value = self._channels_last(name, np.asarray(found[name], "float32"))
            features[layer + (":input" if where == "input" else "")] = value
        return {"output": output, "features": features} if features else output

    def _channels_last(self, name: str, value: Any) -> Any:
        """Maps of PyTorch, and logits of each pixel, with their channels last; attention maps as they are."""
        if self.manifest.data["kind"] == "keras" or value.ndim < 4:
            return value
        if name not in self._maps:
            square = value.ndim == 4 and value.shape[-1] == value.shape[-2]
            attention = name != "output" and square and looks_like(value) == "softmax"
            self._maps[name] = not attention
        return np.moveaxis(value, 1, -1) if self._maps[name] else value
