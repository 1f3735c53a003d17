"""Data whose targets carry what a teacher gave for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np

from distill_core.store import CacheError, Manifest, fingerprint
from keras_distill.targets import DistillTargets

_PROBES = 8
# From row numbers to what DistillTargets carry for them.
Answers: TypeAlias = Callable[[Any], Any]


class CachedData(keras.utils.PyDataset):
    """Batches of arrays whose targets carry the teacher's answers; :meth:`TeacherCache.attach` makes it.

    Args:
        answers: Gives what the targets carry for some rows.
        data: The inputs, labels and sample weights; the last two may be None.
        start: Row of the first item.
        batch_size: Examples in a batch.
        shuffle: Whether each epoch has another order.
        seed: Of that order.
    """

    def __init__(
        self, answers: Answers, data: tuple[Any, Any, Any], *, start: int, batch_size: int, shuffle: bool, seed: int
    ) -> None:
        super().__init__()
        self._answers, self._data, self._start, self._batch_size = answers, data, start, batch_size
        self._random = np.random.default_rng(seed) if shuffle else None
        self._order = np.arange(len(keras.tree.flatten(data[0])[0]))
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
        targets = DistillTargets(y, self._answers(self._start + rows))
        return (x, targets) if weight is None else (x, targets, weight)

    def on_epoch_end(self) -> None:
        """Another order, where it is shuffled."""
        if self._random is not None:
            self._order = self._random.permutation(len(self._order))


def zipped(data: Any, answers: Answers, start: int, length: int) -> Any:
    """A ``tf.data.Dataset`` of single items whose targets carry the teacher's answers.

    Args:
        data: Items in the order that the cache was built in.
        answers: Gives what the targets carry for some rows.
        start: Row of the first item.
        length: Number of items.

    Returns:
        The data set, to shuffle and batch.
    """
    import tensorflow as tf

    first = answers([start])
    flat = keras.tree.flatten(first)

    def read(row: Any) -> Any:
        kinds = [tf.as_dtype(one.dtype) for one in flat]
        found = tf.numpy_function(lambda one: [part[0] for part in keras.tree.flatten(answers([one]))], [row], kinds)
        for tensor, like in zip(found, flat, strict=True):
            tensor.set_shape(like.shape[1:])
        return keras.tree.pack_sequence_as(first, found)

    def joined(item: Any, answer: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(item)
        return (x, DistillTargets(y, answer)) if weight is None else (x, DistillTargets(y, answer), weight)

    return tf.data.Dataset.zip((data, tf.data.Dataset.range(start, start + length).map(read))).map(joined)


def check_length(length: int, manifest: Manifest) -> None:
    """Raise if the data have another length than those that a cache was built from.

    Args:
        length: Number of items.
        manifest: What the cache holds.

    Raises:
        CacheError: If so.
    """
    if length != manifest.length:
        raise CacheError(
            f"Expected the data to have the {manifest.length} items that the cache was built from, but got {length}."
        )


def data_fingerprint(inputs: Any) -> str:
    """A digest of some items.

    Args:
        inputs: Arrays of all items.

    Returns:
        32 hexadecimal digits.
    """
    arrays = keras.tree.flatten(inputs)
    length = len(arrays[0])
    probes = sorted({round(one * (length - 1) / (_PROBES - 1)) for one in range(_PROBES)})
    return fingerprint([str(length), *(np.asarray(array[index]) for array in arrays for index in probes)])
