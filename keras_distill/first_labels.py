"""A look at the first labels and boxes of a training, on the host: a graph does not know their values."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_distill.recording.calls import image_size
from keras_distill.targets import split_targets
from keras_distill.teachers.inputs import chosen_inputs
from keras_distill.terms import DistillationTerm

_FIRST_ROWS = 8
_BATCHES = 8  # of a tf.data.Dataset whose first batches hold no boxes


class FirstLabels:
    """Shows terms the labels of language models and the boxes of detectors, until each has seen some.

    Args:
        student: The student.
        terms: The terms.
    """

    def __init__(self, student: keras.Model, terms: Sequence[DistillationTerm]) -> None:
        self.student, self.terms = student, terms

    @property
    def waiting(self) -> list[DistillationTerm]:
        """The terms that have not seen any labels or boxes yet."""
        return [term for term in self.terms if not term.labels_checked]

    def show(self, batch: Any) -> None:
        """Show a batch to the terms.

        Args:
            batch: Inputs, targets and perhaps weights; anything else is ignored.

        Raises:
            ValueError: If the labels can be seen to be others than a term expects.
        """
        if isinstance(batch, tuple) and len(batch) > 1:
            labels, _ = split_targets(batch[1])
            for term in self.waiting:
                term.check_labels(batch[0], labels, image_size(chosen_inputs(self.student, batch[0])))

    def watched(self, data: Any, targets: Any = None) -> Any:
        """Look at data before a training, and let those be looked at later that cannot be read twice.

        The first batches of arrays and of a ``tf.data.Dataset`` are read; those of a generator or a ``PyDataset`` are
        looked at when they are made, until one of them has boxes.

        Args:
            data: The ``x`` argument of ``fit`` or ``train_on_batch``.
            targets: The ``y`` argument.

        Returns:
            The data to train on.

        Raises:
            ValueError: As :meth:`show`.
        """
        if not self.waiting:
            return data
        if isinstance(data, types.GeneratorType):
            return self._generated(data)
        if isinstance(data, keras.utils.PyDataset):
            self.show(data[0])
            alone = not self.waiting or data.use_multiprocessing  # other processes would check copies of the terms
            return data if alone else _WatchedDataset(data, self)
        for batch in _first_batches(data, targets):
            self.show(batch)
            if not self.waiting:
                break
        return data

    def _generated(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self.waiting:
                self.show(batch)
            yield batch


class _WatchedDataset(keras.utils.PyDataset):
    """The same batches as another data set's, shown to the terms.

    Args:
        data: The other data set.
        first: Shows them.
    """

    def __init__(self, data: keras.utils.PyDataset, first: FirstLabels) -> None:
        super().__init__(workers=data.workers, max_queue_size=data.max_queue_size)
        self._data, self._first = data, first

    @property
    def num_batches(self) -> int | None:
        """Number of batches."""
        return self._data.num_batches  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        batch = self._data[index]
        if self._first.waiting:
            self._first.show(batch)
        return batch

    def on_epoch_begin(self) -> None:
        """Called by Keras before each epoch."""
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Called by Keras after each epoch."""
        self._data.on_epoch_end()


def _first_batches(data: Any, targets: Any) -> Iterator[Any]:
    """Batches of data that can be read again, more of them as long as they are asked for."""
    if hasattr(data, "element_spec") and hasattr(data, "take"):
        yield from data.take(_BATCHES)
    elif targets is not None:
        number = min(len(leaf) for leaf in keras.tree.flatten((data, targets)) if leaf is not None)
        begin, size = 0, _FIRST_ROWS
        while begin < number:
            yield keras.tree.map_structure(_rows(begin, size), (data, targets))
            begin, size = begin + size, 2 * size


def _rows(begin: int, size: int) -> Callable[[Any], Any]:
    return lambda leaf: None if leaf is None else leaf[begin : begin + size]


def first_rows(data: Any, targets: Any) -> tuple[Any, ...] | None:
    """The first rows of data that can be read again: inputs, targets and perhaps weights.

    Args:
        data: The ``x`` argument of ``fit``.
        targets: The ``y`` argument.

    Returns:
        A batch; None for other data, such as a generator.
    """
    batch = data[0] if isinstance(data, keras.utils.PyDataset) else next(iter(_first_batches(data, targets)), None)
    return batch if isinstance(batch, tuple) else None
