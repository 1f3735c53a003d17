"""The data of a run, in the same order for every method."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from distill_core.guidance.records import digest
from keras_distill import checks
from keras_distill.cache import TeacherCache
from keras_distill.cache.data import order_of
from keras_distill.targets import EpochData


class ShuffledArrays(EpochData):
    """Batches of arrays, in an order that the seed and the epoch decide, on every backend.

    The order is that of :meth:`TeacherCache.attach` with the same seed.

    Args:
        arrays: ``(x, y)`` or ``(x, y, sample_weight)``, each of any structure.
        batch_size: Number of examples in a batch.
        seed: Seed of the order; None keeps the order of the arrays.
    """

    def __init__(self, arrays: tuple[Any, ...], batch_size: int, seed: int | None) -> None:
        super().__init__()
        self._arrays, self._batch_size, self._seed = arrays, batch_size, seed
        self._length = len(keras.tree.flatten(arrays[0])[0])
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch, self._order = value, order_of(self._length, self._seed, value)

    def on_epoch_end(self) -> None:
        """Take the next order, in loops that do not set the epoch."""
        if not self.in_fit:
            self.epoch += 1

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._length // self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """A batch."""
        return self._rows(self._order[index * self._batch_size :][: self._batch_size])

    def first_batch(self, epoch: int) -> tuple[Any, ...]:
        """The first batch of an epoch."""
        return self._rows(order_of(self._length, self._seed, epoch)[: self._batch_size])

    def _rows(self, rows: Any) -> tuple[Any, ...]:
        return tuple(keras.tree.map_structure(lambda array: np.asarray(array)[rows], part) for part in self._arrays)


@dataclass(frozen=True)
class RunData:
    """The data of a run: arrays, or data sets of batches."""

    train: Any
    val: Any
    test: Any = None

    def training(self, cache: TeacherCache | None, batch_size: int, shuffle: bool, seed: int) -> tuple[Any, Any]:
        """The data to train on.

        Args:
            cache: Holds the outputs of the method's teacher; None for a teacher that runs beside the student.
            batch_size: Number of examples in a batch of arrays.
            shuffle: Whether arrays are shuffled.
            seed: The seed of their order.

        Returns:
            The argument of ``fit``, and the shuffled arrays, or None if the data are batches already.

        Raises:
            TypeError: If a cache is to be attached to batches.
        """
        if not is_arrays(self.train):
            if cache is not None:
                expected = "`data` to be arrays, (x, y), if the teacher is a TeacherCache"
                raise TypeError(checks.message(expected, f"a {type(self.train).__name__}"))
            return self.train, None
        arrays = ShuffledArrays(tuple(self.train), batch_size, seed if shuffle else None)
        if cache is None:
            return arrays, arrays
        return cache.attach(tuple(self.train), batch_size=batch_size, shuffle=shuffle, seed=seed), arrays


def data_of(data: Any, seed: int) -> RunData:
    """The data of a run.

    Args:
        data: ``(train, val)`` or ``(train, val, test)``, each arrays ``(x, y)`` or a data set of batches; or a function
            that makes them, called with the seed if it has a parameter ``seed``.
        seed: The seed of the run.

    Raises:
        TypeError: If it is none of these.
    """
    if callable(data):
        data = data(seed=seed) if "seed" in _parameters(data) else data()
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        expected = "`data` to be (train, val) or (train, val, test), or a function that makes them"
        raise TypeError(checks.message(expected, f"a {type(data).__name__}"))
    for name, part in zip(("train", "val", "test"), data, strict=False):
        if isinstance(part, (tuple, list)) and len(part) not in (2, 3):
            expected = f"`{name}` of the data to be (x, y) or (x, y, sample_weight), or a data set of batches"
            raise TypeError(checks.message(expected, f"{len(part)} parts"))
    return RunData(*data)


def is_arrays(data: Any) -> bool:
    """Whether data are ``(x, y)`` or ``(x, y, sample_weight)`` rather than batches."""
    return isinstance(data, (tuple, list))


def batches_of(data: Any, batch_size: int) -> Iterator[tuple[Any, ...]]:
    """The batches of data: inputs, labels and sample weights.

    Args:
        data: Arrays, or a data set of batches.
        batch_size: Number of examples in a batch of arrays.
    """
    if is_arrays(data):
        data = ShuffledArrays(tuple(data), batch_size, None)
    if isinstance(data, keras.utils.PyDataset):
        batches: Any = (data[index] for index in range(len(data)))
    else:
        batches = iter(data)
    for batch in batches:
        yield keras.utils.unpack_x_y_sample_weight(batch)


def digest_of_batch(batch: Any) -> str:
    """A digest of the arrays of a batch."""
    leaves = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
    return digest(keras.ops.convert_to_numpy(leaf) for leaf in leaves)


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return []
