"""Data whose targets hold a teacher's outputs from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from distill_core.store import CacheError, Manifest
from keras_distill.cache.views import Augmentation, PassingItems
from keras_distill.targets import DistillTargets, EpochData

_ROWS = 1024  # rows in one call of Python, at most
_BYTES = 2**24  # of the rows in one call, at most
# Called with the numbers of items and a view, returns the teacher's part of DistillTargets for them.
Answers: TypeAlias = Callable[[Any, int], Any]


class CachedData(EpochData):
    """Batches of arrays whose targets hold the teacher's outputs; :meth:`TeacherCache.attach` makes it.

    Args:
        answers: Returns the teacher's part of the targets for some items.
        data: The inputs, labels and sample weights; the last two may be None.
        augmentation: Augments the inputs; None leaves them unchanged.
        views: Numbers of the views that the epochs cycle through.
        batch_size: Number of examples in a batch.
        shuffle: Whether the order changes in each epoch.
        seed: Seed of the order.
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
        """The epoch, counted from 0, which sets the view and the order; ``DistillModel.fit`` assigns it."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = value
        self._shuffle(value)

    def on_epoch_end(self) -> None:
        """Change the order for the next pass, also in loops that do not set the epoch; the view does not change."""
        if not self.in_fit:  # `fit` sets the epoch before the next pass
            self._shuffle(self._passes + 1)

    def _shuffle(self, passes: int) -> None:
        self._passes, self._order = passes, order_of(self._length, self._seed, passes)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._length // self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Inputs, targets and, if the data has them, sample weights."""
        items = self._order[index * self._batch_size :][: self._batch_size]
        view = self._views[self.epoch % len(self._views)]
        x, y, weight = self._data
        x = _rows(x, items) if self._augmentation is None else self._augmentation.batch(x, items, view)
        y, weight = _rows(y, items), _rows(weight, items)
        labels = np.zeros((len(items), 0), "float32") if y is None else y  # TensorFlow does not accept None in targets
        targets = DistillTargets(labels, self._answers(items, view))
        return (x, targets) if weight is None else (x, targets, weight)


def _rows(arrays: Any, rows: Any) -> Any:
    """Some rows of arrays in any structure; None if it is None."""
    return None if arrays is None else keras.tree.map_structure(lambda array: np.asarray(array)[rows], arrays)


def zipped(data: Any, answers: Answers, view: int, length: int, known: PassingItems | None = None) -> Any:
    """A ``tf.data.Dataset`` of single items whose targets hold the teacher's outputs.

    Args:
        data: Items in the order in which the cache was built.
        answers: Returns the teacher's part of the targets for some items.
        view: Number of the view.
        length: Number of items.
        known: Compares the items with those that the cache was built from; None compares nothing.

    Returns:
        The data set, to shuffle and batch.
    """
    import tensorflow as tf

    first = answers(np.arange(1), view)
    flat = keras.tree.flatten(first)
    # TensorFlow crashes if `unbatch` splits an empty array, such as the one of TopK whose shape holds the classes
    full = [index for index, array in enumerate(flat) if array.size]
    not_full = [index for index, array in enumerate(flat) if not array.size]

    def stored(numbers: Any) -> list[Any]:
        arrays = keras.tree.flatten(answers(numbers, view))
        return [arrays[index] for index in full]

    def read(numbers: Any) -> Any:
        tensors = tf.numpy_function(stored, [numbers], [tf.as_dtype(flat[index].dtype) for index in full])
        for tensor, index in zip(tensors, full, strict=True):
            tensor.set_shape((None, *flat[index].shape[1:]))
        return tuple(tensors)

    def joined(item: Any, tensors: Any, *empty: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(item)
        by_place = dict(zip([*full, *not_full], [*tensors, *empty], strict=True))
        arrays = [by_place[index] for index in range(len(flat))]
        targets = DistillTargets(y, keras.tree.pack_sequence_as(first, arrays))
        return (x, targets) if weight is None else (x, targets, weight)

    # many rows in one call: a call of Python for each row would take longer than the training
    rows = _rows_in_a_call(sum(array.nbytes for array in flat))
    answered = tf.data.Dataset.range(length).batch(rows).map(read).unbatch()
    answered = answered.apply(tf.data.experimental.assert_cardinality(length))  # `unbatch` loses it
    zeros = [tf.zeros(flat[index].shape[1:], flat[index].dtype) for index in not_full]
    empty = [tf.data.Dataset.from_tensors(array).repeat() for array in zeros]
    # TensorFlow runs no function for each item where one only rearranges its arguments
    return tf.data.Dataset.zip((data if known is None else _watched(data, known), answered, *empty)).map(joined)


def _watched(data: Any, known: PassingItems) -> Any:
    """The items of a data set, compared with those that are known while they are read."""
    import tensorflow as tf

    size = _item_bytes(keras.tree.flatten(data.element_spec))
    rows = None if size is None else _rows_in_a_call(size)

    def see_item(number: Any, *leaves: Any) -> bool:
        known.see(number, *leaves)
        return True

    def see_batch(place: Any, *leaves: Any) -> bool:
        start, count = int(place) * (rows or 1), len(leaves[0])
        for number in known.probes:
            if start <= number < start + count:
                known.see(number, *(leaf[number - start] for leaf in leaves))
        return True

    def looked_at(place: Any, items: Any) -> Any:
        leaves = keras.tree.flatten(keras.utils.unpack_x_y_sample_weight(items)[0])
        if rows is not None:
            looked = tf.numpy_function(see_batch, [place, *leaves], tf.bool)
        else:  # a call of Python for each item would take longer than the training
            probed = tf.reduce_any(tf.equal(place, known.probes))
            looked = tf.cond(probed, lambda: tf.numpy_function(see_item, [place, *leaves], tf.bool), lambda: True)
        looked.set_shape(())
        return looked

    # a filter hands the items on as they are, which a map would copy
    seen = (data if rows is None else data.batch(rows)).enumerate().filter(looked_at).map(lambda place, items: items)
    seen = seen if rows is None else seen.unbatch()
    length = data.cardinality()
    return seen.apply(tf.data.experimental.assert_cardinality(length)) if length >= 0 else seen


def _item_bytes(specs: Sequence[Any]) -> int | None:
    """The size of an item; None if sizes differ or are not known, so that items cannot be read together."""
    shapes = [getattr(spec, "shape", None) for spec in specs]
    if not all(hasattr(spec, "dtype") and shape is not None for spec, shape in zip(specs, shapes, strict=True)):
        return None
    if not all(shape.is_fully_defined() and shape.num_elements() for shape in shapes):  # type: ignore[union-attr]
        return None
    return sum(spec.dtype.size * shape.num_elements() for spec, shape in zip(specs, shapes, strict=True))  # type: ignore[union-attr]


def _rows_in_a_call(row_bytes: int) -> int:
    return min(_ROWS, max(1, _BYTES // max(1, row_bytes)))


def as_array(array: Any) -> Any:
    """A tensor as an array; arrays, which may be memory-mapped, are not copied."""
    return array if isinstance(array, np.ndarray) else keras.ops.convert_to_numpy(array)


def check_length(length: int, expected: int) -> None:
    """Check that the data have the length of the data that a cache was built from.

    Args:
        length: Number of items.
        expected: Number of items that the cache was built from, or of keys.

    Raises:
        CacheError: If the lengths differ.
    """
    if length != expected:
        raise CacheError(
            f"Expected the data to have the {expected} items that the cache was built from, but got {length}."
        )


def chosen_views(manifest: Manifest, view: int | None, augmented: bool, cycles: bool) -> list[int]:
    """The numbers of the views that are used with some data.

    Args:
        manifest: The manifest of the cache.
        view: The requested view, or None for all.
        augmented: Whether a transform was passed.
        cycles: Whether the data can change the view in each epoch.

    Returns:
        The numbers; epochs cycle through them.

    Raises:
        CacheError: If the view does not exist, or the student would not get the inputs that the teacher got.
    """
    if view is not None and not 0 <= view < manifest.views:
        raise CacheError(f"Expected `view` to be below {manifest.views}, but got view={view}.")
    seeded, from_keras = manifest.data["transform_seed"] is not None, manifest.data["kind"] == "keras"
    if augmented and not (from_keras and seeded):
        raise CacheError(
            "Expected a cache that was built with a transform in Keras, but this cache was not. Pass the inputs that"
            " the teacher got, or build the cache with transform=... and transform_seed=..."
        )
    if from_keras and seeded and not cycles:
        raise CacheError("Expected arrays where the cache holds augmented views, but got a tf.data.Dataset.")
    if from_keras and seeded and not augmented:
        raise CacheError(
            "Expected `transform` to be a function, since the teacher got augmented items, but got None. Pass the"
            " function that the cache was built with."
        )
    if seeded and not from_keras and view is None:
        raise CacheError(
            "Expected `view` to be a number, since the teacher got items that PyTorch had augmented, but got None. Pass"
            " the arrays of one view and its number."
        )
    return list(range(manifest.views)) if view is None else [view]


def order_of(length: int, seed: int | None, passes: int) -> Any:
    """The numbers of the examples in the order of a pass over the data.

    Args:
        length: Number of examples.
        seed: Seed of all orders; None keeps the order of the data.
        passes: Number of the pass, from 0.
    """
    return np.arange(length) if seed is None else np.random.default_rng([seed, passes]).permutation(length)
