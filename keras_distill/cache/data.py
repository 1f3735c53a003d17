"""Data whose targets carry what a teacher gave for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from distill_core.store import CacheError, Manifest
from keras_distill.cache.views import Augmentation
from keras_distill.targets import DistillTargets, EpochData

_ROWS = 256
# From row numbers to what DistillTargets carry for them.
Answers: TypeAlias = Callable[[Any], Any]


class CachedData(EpochData):
    """Batches of arrays whose targets carry the teacher's answers; :meth:`TeacherCache.attach` makes it.

    Args:
        answers: Gives what the targets carry for some rows.
        data: The inputs, labels and sample weights; the last two may be None.
        augmentation: Augments the inputs; None leaves them as they are.
        views: Numbers of the views that the epochs cycle through.
        batch_size: Examples in a batch.
        shuffle: Whether each epoch has another order.
        seed: Of that order.
    """

    def __init__(
        self,
        answers: Answers,
        data: tuple[Any, Any, Any],
        *,
        augmentation: Augmentation | None,
        views: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._answers, self._data, self._augmentation, self._views = answers, data, augmentation, views
        self._batch_size, self._seed = batch_size, seed if shuffle else None
        self._length = len(keras.tree.flatten(data[0])[0])
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch, from 0, by which view and order are chosen; ``DistillModel.fit`` sets it."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch, self._order = value, np.arange(self._length)
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, value]).permutation(self._length)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._length // self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Inputs, targets and, where there are any, sample weights."""
        items, view = (
            self._order[index * self._batch_size :][: self._batch_size],
            self._views[self.epoch % len(self._views)],
        )
        x, y, weight = (
            None if part is None else keras.tree.map_structure(lambda array: np.asarray(array)[items], part)
            for part in ((None, *self._data[1:]) if self._augmentation is not None else self._data)
        )
        if self._augmentation is not None:
            x = self._augmentation.batch(self._data[0], items, view)
        labels = np.zeros((len(items), 0), "float32") if y is None else y  # TensorFlow takes no None in the targets
        targets = DistillTargets(labels, self._answers(view * self._length + items))
        return (x, targets) if weight is None else (x, targets, weight)


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
    # TensorFlow crashes where `unbatch` splits an array without numbers, such as that which tells how many classes
    full = [index for index, array in enumerate(flat) if array.size]

    def read(rows: Any) -> Any:
        def stored(numbers: Any) -> list[Any]:
            arrays = keras.tree.flatten(answers(numbers))
            return [arrays[index] for index in full]

        tensors = tf.numpy_function(stored, [rows], [tf.as_dtype(flat[index].dtype) for index in full])
        for tensor, index in zip(tensors, full, strict=True):
            tensor.set_shape((None, *flat[index].shape[1:]))
        return tuple(tensors)

    def joined(item: Any, tensors: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(item)
        everything = [tf.zeros(array.shape[1:], array.dtype) for array in flat]
        for tensor, index in zip(tensors, full, strict=True):
            everything[index] = tensor
        targets = DistillTargets(y, keras.tree.pack_sequence_as(first, everything))
        return (x, targets) if weight is None else (x, targets, weight)

    # many rows at a time: a call of Python for each would cost more than the training
    rows = tf.data.Dataset.range(start, start + length).batch(_ROWS).map(read).unbatch()
    rows = rows.apply(tf.data.experimental.assert_cardinality(length))  # which `unbatch` forgets
    return tf.data.Dataset.zip((data, rows)).map(joined)


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


def chosen_views(manifest: Manifest, view: int | None, augmented: bool, cycles: bool) -> list[int]:
    """The views whose answers go with some data.

    Args:
        manifest: What the cache holds.
        view: The one that is asked for, or None.
        augmented: Whether a transform is given.
        cycles: Whether the data can be another view in each epoch.

    Returns:
        Their numbers; epochs cycle through them.

    Raises:
        CacheError: If the student would not be shown what the teacher was.
    """
    if view is not None and not 0 <= view < manifest.views:
        raise CacheError(f"Expected `view` to be below {manifest.views}, but got view={view}.")
    seeded, here = manifest.data["transform_seed"] is not None, manifest.data["kind"] == "keras"
    if augmented and not (here and seeded):
        raise CacheError(
            "Expected a cache that was built with a transform in Keras, but this one was not. Pass the data as the"
            " teacher was shown them, or build it with transform=... and transform_seed=..."
        )
    if here and seeded and not cycles:
        raise CacheError("Expected arrays where the cache holds augmented views, but got a tf.data.Dataset.")
    if here and seeded and not augmented:
        raise CacheError(
            "Expected `transform` to be given, since the teacher was shown augmented items, but got None. Pass the"
            " function that the cache was built with."
        )
    if seeded and not here and view is None:
        raise CacheError(
            "Expected `view` to be given, since the teacher was shown what PyTorch had augmented, but got None. Pass"
            " the arrays of one view and its number."
        )
    return list(range(manifest.views)) if view is None else [view]
