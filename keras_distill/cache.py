"""Teacher outputs on disk: the teacher runs once, in either framework, and every later training goes without it."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distill_core.codecs import Array
from distill_core.store import CacheError, Manifest, Reader, Writer, fingerprint
from keras_distill import backends
from keras_distill.taps import Recorder, Tap
from keras_distill.targets import DistillTargets

_PROBES = 8


class TeacherCache:
    """What a teacher gave for every item of some data, in a folder, as targets for ``DistillModel.fit``.

    The folder is that of ``lightning_distill.TeacherCache``, described in :mod:`distill_core.store`: either half reads
    what the other has built. Feature maps of a PyTorch teacher are given channels last.

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
        if any(described.get("top_k") for described in self.manifest.arrays.values()):
            raise CacheError(
                "Expected a cache of full outputs, but it holds the likeliest classes. Build it without top_k."
            )

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
            CacheError: If it is not whole, comes from another teacher, or holds the likeliest classes alone.
        """
        cache = cls(Reader(Path(path)))
        if teacher is not None and _teacher_fingerprint(teacher) != cache.manifest.teacher["fingerprint"]:
            raise CacheError(f"Expected {path} to be of this teacher, but it was built with another. Build it anew.")
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
        dtype: str = "float16",
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
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
            batch_size: Items that the teacher is shown at a time.
            resume: Whether a folder that was begun, or is whole, is taken up; only whole shards count.
            shard_bytes: About how large a shard is.

        Returns:
            The cache, opened.

        Raises:
            CacheError: If the folder holds something else, or the teacher gives several outputs.
            OSError: If the disk is full; resuming completes the folder.
        """
        taps = [Tap.of(layer) for layer in layers]
        if not outputs and not taps:
            raise CacheError("Expected something to keep, but got outputs=False and no layers. Name layers.")
        recorder, length = Recorder(teacher, taps, "teacher"), len(keras.tree.flatten(inputs)[0])

        def rows(start: int, stop: int) -> dict[str, Array]:
            batch = keras.tree.map_structure(lambda array: keras.ops.convert_to_tensor(array[start:stop]), inputs)
            with backends.no_gradient():
                call = recorder.forward(batch, training=False)
            kept = {f"feature{index}": call.feature(tap) for index, tap in enumerate(taps)}
            if outputs and keras.tree.is_nested(call.output):
                raise CacheError("Expected the teacher to have one output, but it has several. Wrap the one to keep.")
            if outputs:
                kept["output"] = call.output
            return {name: np.asarray(keras.ops.convert_to_numpy(one), "float32") for name, one in kept.items()}

        arrays = {name: {"shape": list(one.shape[1:]), "dtype": dtype} for name, one in rows(0, batch_size).items()}
        row = sum(4 * math.prod(described["shape"]) for described in arrays.values())
        manifest = Manifest(
            length=length,
            views=1,
            shard_rows=batch_size * max(1, shard_bytes // (row * batch_size)),
            arrays=arrays,
            layers={f"feature{index}": f"{tap.name}|{tap.where}" for index, tap in enumerate(taps)},
            teacher={"class": type(teacher).__qualname__, "fingerprint": _teacher_fingerprint(teacher)},
            data={"fingerprint": _data_fingerprint(inputs), "transform_seed": None, "stale": False, "kind": "keras"},
            versions={name: importlib.metadata.version(name) for name in ("keras", "numpy")},
        )
        writer = Writer(Path(path), manifest, resume)
        for shard in writer.missing:
            wanted = manifest.shard_range(shard)
            starts = range(wanted.start, wanted.stop, batch_size)
            writer.write(shard, (rows(start, min(start + batch_size, wanted.stop)) for start in starts))
        writer.finish()
        return cls.open(path)

    def attach(
        self, data: Any, *, batch_size: int = 32, shuffle: bool = False, seed: int = 0, view: int = 0
    ) -> CachedData | Any:
        """Data whose targets carry what the teacher gave.

        Args:
            data: Arrays ``x``, ``(x, y)`` or ``(x, y, sample_weight)``; or a ``tf.data.Dataset`` of single items in the
                order that the cache was built in.
            batch_size: Examples in a batch of arrays.
            shuffle: Whether arrays come in another order in each epoch.
            seed: Of that order.
            view: Which augmented view's answers are given.

        Returns:
            For arrays a ``keras.utils.PyDataset``; for a ``tf.data.Dataset`` another, to shuffle and batch.

        Raises:
            CacheError: If the data have another length, or are others than the cache was built from in Keras.
        """
        if not 0 <= view < self.manifest.views:
            raise CacheError(f"Expected `view` to be below {self.manifest.views}, but got view={view}.")
        if hasattr(data, "element_spec"):
            return self._zipped(data, view)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        length = len(keras.tree.flatten(x)[0])
        if length != self.manifest.length:
            raise CacheError(
                f"Expected the data to have the {self.manifest.length} items that the cache was built from, but got"
                f" {length}."
            )
        if self.manifest.data["kind"] == "keras" and _data_fingerprint(x) != self.manifest.data["fingerprint"]:
            raise CacheError("Expected the data to be those that the cache was built from, but some items differ.")
        return CachedData(self, x, y, weight, batch_size, shuffle, seed, view)

    def answers(self, rows: Any) -> Any:
        """What a DistillTargets carries for some rows.

        Args:
            rows: Row numbers.

        Returns:
            The output; or ``{"output": ..., "features": {layer: ...}}`` where features are held.

        Raises:
            CacheError: If a file is missing or altered.
        """
        found = self.reader.read(rows)
        output = np.asarray(found["output"], "float32") if "output" in found else np.zeros((len(rows), 1), "float32")
        features = {}
        for name, place in self.manifest.layers.items():
            layer, where = place.split("|", 1)
            value = np.asarray(found[name], "float32")
            if self.manifest.data["kind"] != "keras" and value.ndim == 4:
                value = np.moveaxis(value, 1, -1)
            features[layer + (":input" if where == "input" else "")] = value
        return {"output": output, "features": features} if features else output

    def _zipped(self, data: Any, view: int) -> Any:
        import tensorflow as tf

        length = int(data.cardinality())
        if length not in (self.manifest.length, tf.data.UNKNOWN_CARDINALITY):
            raise CacheError(
                f"Expected the data to have the {self.manifest.length} items that the cache was built from, but got"
                f" {length}."
            )
        first = self.answers([view * self.manifest.length])
        flat = keras.tree.flatten(first)

        def read(row: Any) -> Any:
            kinds = [tf.float32] * len(flat)
            found = tf.numpy_function(lambda one: [a[0] for a in keras.tree.flatten(self.answers([one]))], [row], kinds)
            for tensor, like in zip(found, flat, strict=True):
                tensor.set_shape(like.shape[1:])
            return keras.tree.pack_sequence_as(first, found)

        start = view * self.manifest.length
        answers = tf.data.Dataset.range(start, start + self.manifest.length).map(read)

        def joined(item: Any, answer: Any) -> Any:
            x, y, weight = keras.utils.unpack_x_y_sample_weight(item)
            return (x, DistillTargets(y, answer)) if weight is None else (x, DistillTargets(y, answer), weight)

        return tf.data.Dataset.zip((data, answers)).map(joined)


class CachedData(keras.utils.PyDataset):
    """Batches of arrays whose targets carry the teacher's answers; :meth:`TeacherCache.attach` makes it."""

    def __init__(
        self, cache: TeacherCache, x: Any, y: Any, weight: Any, batch_size: int, shuffle: bool, seed: int, view: int
    ) -> None:
        super().__init__()
        self._cache, self._data, self._batch_size, self._view = cache, (x, y, weight), batch_size, view
        self._random = np.random.default_rng(seed) if shuffle else None
        self._order = np.arange(cache.manifest.length)
        self.on_epoch_end()

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Inputs, targets and, where there are any, sample weights."""
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        x, y, weight = (
            None if part is None else keras.tree.map_structure(lambda array: np.asarray(array)[rows], part)
            for part in self._data
        )
        targets = DistillTargets(y, self._cache.answers(self._view * self._cache.manifest.length + rows))
        return (x, targets) if weight is None else (x, targets, weight)

    def on_epoch_end(self) -> None:
        """Another order, where it is shuffled."""
        if self._random is not None:
            self._order = self._random.permutation(len(self._order))


def _teacher_fingerprint(teacher: keras.Model) -> str:
    weights = [keras.ops.convert_to_numpy(weight) for weight in teacher.weights]
    return fingerprint([type(teacher).__qualname__, *weights])


def _data_fingerprint(inputs: Any) -> str:
    arrays = keras.tree.flatten(inputs)
    length = len(arrays[0])
    probes = sorted({round(one * (length - 1) / (_PROBES - 1)) for one in range(_PROBES)})
    return fingerprint([str(length), *(np.asarray(array[index]) for array in arrays for index in probes)])
