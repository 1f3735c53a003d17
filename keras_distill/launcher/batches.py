"""Data in the forms that the launcher accepts."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_distill import checks

LABEL_NAMES = ("labels", "label", "target", "y")


def split_batch(batch: Any) -> tuple[Any, ...]:
    """Inputs, labels and perhaps weights, as Keras takes them.

    Args:
        batch: ``(inputs, labels)``, ``(inputs, labels, weights)``, or a dict with the labels under one of their usual
            names.

    Returns:
        Two or three entries.

    Raises:
        ValueError: If the batch has no labels, or another form.

    Example:
        >>> split_batch({"image": 3.0, "labels": 1})
        ({'image': 3.0}, 1)
    """
    if isinstance(batch, Mapping):
        name = next((name for name in LABEL_NAMES if name in batch), None)
        if name is not None:
            return {key: value for key, value in batch.items() if key != name}, batch[name]
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return tuple(batch)
    remedy = f"A dict keeps its labels under one of {', '.join(LABEL_NAMES)}."
    received = f"keys {[*batch]}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(checks.message("a batch to be (inputs, labels) or a dict", received, remedy))


class ArrayBatches:
    """Batches of arrays that hold all examples, in a new order each time where they are shuffled.

    Args:
        arrays: Inputs, labels and perhaps weights, each an array or several.
        batch_size: Size of a batch; the last may be smaller.
        shuffle: Whether the examples are shuffled.

    Example:
        >>> [labels.tolist() for _, labels in ArrayBatches((np.ones((3, 2)), np.arange(3)), batch_size=2)]
        [[0, 1], [2]]
    """

    def __init__(self, arrays: tuple[Any, ...], batch_size: int, shuffle: bool = False) -> None:
        self.arrays = keras.tree.map_structure(keras.ops.convert_to_numpy, arrays)
        self.examples = len(keras.tree.flatten(self.arrays)[0])
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch."""
        order = np.random.permutation(self.examples) if self.shuffle else np.arange(self.examples)
        for start in range(0, self.examples, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield keras.tree.map_structure(lambda array: array[chosen], self.arrays)  # noqa: B023 - called at once


def batches_of(data: Any, batch_size: int, shuffle: bool = False) -> Any:
    """Data as batches that can be iterated once an epoch.

    Args:
        data: Arrays ``(inputs, labels)`` or a dict of them; a ``keras.utils.PyDataset``; or any other iterable
            of batches: a list, a ``tf.data.Dataset``, a data loader.
        batch_size: Size of the batches that arrays are cut into.
        shuffle: Whether examples of arrays, or the batches of a ``PyDataset``, are shuffled.

    Returns:
        An iterable of tuples.

    Raises:
        TypeError: If the data cannot be iterated, or only once.
    """
    if isinstance(data, (tuple, Mapping)):
        return ArrayBatches(split_batch(data), batch_size, shuffle)
    if isinstance(data, keras.utils.PyDataset):
        return _IndexedBatches(data, shuffle)
    if not isinstance(data, Iterable) or iter(data) is data:
        expected = "data that can be gone through once an epoch: arrays, a list of batches, a data set or a loader"
        raise TypeError(checks.message(expected, f"a {type(data).__name__}"))
    return _Split(data)


def fit_arguments(data: Any, *, batch_size: int, shuffle: bool, limit: int | None) -> dict[str, Any]:
    """Arguments of ``Model.fit`` for some data.

    Args:
        data: As :func:`batches_of` takes it.
        batch_size: Size of the batches that arrays are cut into.
        shuffle: Whether examples of arrays, or the batches of a ``PyDataset``, are shuffled.
        limit: Maximum number of batches in an epoch, or None.

    Returns:
        Keyword arguments.
    """
    if limit is None and isinstance(data, (tuple, Mapping)):
        parts = dict(zip(("x", "y", "sample_weight"), split_batch(data), strict=False))
        return {**parts, "batch_size": batch_size, "shuffle": shuffle}
    if hasattr(data, "element_spec") and hasattr(data, "take"):  # tf.data: Keras reads it itself, which is faster
        data = data.map(split_batch) if isinstance(data.element_spec, Mapping) else data
        return {"x": data if limit is None else data.take(limit), "shuffle": False}
    if limit is None and isinstance(data, keras.utils.PyDataset):
        return {"x": _SplitDataset(data) if isinstance(data[0], Mapping) else data, "shuffle": shuffle}
    batches = batches_of(data, batch_size, shuffle)
    steps = len(batches) if limit is None else min(limit, len(batches))
    return {"x": _epochs(batches, steps), "steps_per_epoch": steps, "shuffle": False}


class _Split:
    """Data of batches in any form, as batches from :func:`split_batch`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) if hasattr(self.data, "__len__") else sum(1 for _ in self.data)

    def __iter__(self) -> Iterator[Any]:
        return map(split_batch, self.data)


class _IndexedBatches:
    """The batches of a ``PyDataset``, whose own iterator has no end; shuffled and told of epochs as in ``fit``."""

    def __init__(self, data: keras.utils.PyDataset, shuffle: bool) -> None:
        self.data, self.shuffle = data, shuffle

    def __len__(self) -> int:
        return int(self.data.num_batches)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        self.data.on_epoch_begin()
        try:
            for index in order:
                yield split_batch(self.data[int(index)])
        finally:  # also of an epoch that ends before the data
            self.data.on_epoch_end()


class _SplitDataset(keras.utils.PyDataset):
    """The batches of another data set, from :func:`split_batch`: Keras would take a dict for inputs without labels."""

    def __init__(self, data: keras.utils.PyDataset) -> None:
        settings = {"use_multiprocessing": data.use_multiprocessing, "max_queue_size": data.max_queue_size}
        super().__init__(workers=data.workers, **settings)
        self.data = data

    @property
    def num_batches(self) -> int | None:
        return self.data.num_batches  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return split_batch(self.data[index])

    def on_epoch_begin(self) -> None:
        self.data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.data.on_epoch_end()


def _epochs(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """The batches of endless epochs: Keras would stop the whole training at the end of a generator."""
    while True:
        epoch = iter(batches)
        yield from itertools.islice(epoch, steps)
        if isinstance(epoch, Generator):
            epoch.close()
