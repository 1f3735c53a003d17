"""Augmented views of arrays: the same transform with the same seed for teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
import numpy as np

from distill_core.columns import Array
from distill_core.store import CacheError, fingerprint

_PROBES = 8  # number of items in a fingerprint
# Called with an item and a seed, returns the augmented item.
Transform: TypeAlias = Callable[[Any, Array], Any]


class Augmentation:
    """Applies a transform to inputs; each item of each view has its own seed.

    Args:
        transform: Called with one item, NumPy arrays in the structure of the inputs, and two int32 numbers, which must
            be its only source of randomness; returns the augmented item.
        seed: Seed from which these numbers are drawn.

    Example:
        >>> flip = Augmentation(lambda x, seed: x[::-1] if np.random.default_rng(seed).random() < 0.5 else x, seed=1)
        >>> x = np.arange(12).reshape(6, 2)
        >>> [int(row[0] > row[1]) for view in (0, 1) for row in flip.batch(x, range(6), view)]
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1]
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform, self.seed = transform, seed

    def batch(self, inputs: Any, indices: Iterable[int], view: int) -> Any:
        """Augment some items for a view.

        Args:
            inputs: Arrays of all items.
            indices: Numbers of the items.
            view: Number of the view.

        Returns:
            Arrays of the augmented items, in the structure of an item.
        """
        items = [self._item(inputs, int(index), view) for index in indices]
        return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *items)

    def check(self, inputs: Any) -> None:
        """Check that the transform has no other source of randomness than its seed.

        Args:
            inputs: Arrays of all items.

        Raises:
            CacheError: If it has one: the student would not get the inputs that the teacher got.
        """
        first, second = (data_fingerprint(inputs, self) for _ in range(2))
        if first != second:
            raise CacheError(
                "Expected `transform` to return the same for the same item and seed, but some items differ: the student"
                " would not get the inputs that the teacher got. Take all randomness from the seed, as in"
                " np.random.default_rng(seed)."
            )

    def _item(self, inputs: Any, index: int, view: int) -> Any:
        # copies, because a transform may work in place
        item = keras.tree.map_structure(lambda array: np.array(keras.ops.convert_to_numpy(array[index])), inputs)
        drawn = np.random.SeedSequence([self.seed, view, index]).generate_state(2)
        augmented = self.transform(item, (drawn >> 1).astype("int32"))  # NumPy does not accept negative seeds
        return keras.tree.map_structure(lambda leaf: np.asarray(keras.ops.convert_to_numpy(leaf)), augmented)


def requested(transform: Transform | None, transform_seed: int | None, views: int) -> Augmentation | None:
    """Make the augmentation from the settings of a build.

    Args:
        transform: The transform, or None.
        transform_seed: Its seed, or None.
        views: Number of views.

    Returns:
        The augmentation, or None if items are not augmented.

    Raises:
        CacheError: If the settings contradict each other.
        TypeError: If the transform cannot be called.
    """
    if type(views) is not int or views < 1:
        raise CacheError(f"Expected `views` to be 1 or greater, but got views={views!r}.")
    if transform is None:
        if views > 1 or transform_seed is not None:
            needs = f"transform_seed={transform_seed!r}" if transform_seed is not None else f"views={views}"
            raise CacheError(f"Expected `transform` to be a function with {needs}, but got None. Pass a function.")
        return None
    if not callable(transform):
        raise TypeError(f"Expected `transform` to be a function of an item and a seed, but got {transform!r}.")
    if transform_seed is None:
        raise CacheError("Expected `transform_seed` to be a number with a transform, but got None. Pass a number.")
    return Augmentation(transform, transform_seed)


def probed_items(length: int) -> list[int]:
    """The numbers of the items that are in a fingerprint, of data of some length; the last item is one of them."""
    return sorted({round(probe * (length - 1) / (_PROBES - 1)) for probe in range(_PROBES)})


class PassingItems:
    """Compares the items of a ``tf.data.Dataset``, while they are read, with the fingerprint of the data.

    Args:
        length: Number of items.
        expected: The fingerprint, from :func:`data_fingerprint`.
    """

    def __init__(self, length: int, expected: str) -> None:
        self.probes = probed_items(length)
        self._length, self._expected, self._items = length, expected, dict[int, list[Array]]()

    def see(self, number: int, *leaves: Array) -> None:
        """Look at an item.

        Args:
            number: Its number, one of the ``probes``.
            *leaves: The arrays of its inputs.

        Raises:
            CacheError: At the last item, if the items differ from those that the cache was built from.
        """
        self._items[int(number)] = [np.array(leaf) for leaf in leaves]
        if int(number) != self.probes[-1] or len(self._items) != len(self.probes):
            return
        arrays = [self._items[probe][leaf] for leaf in range(len(leaves)) for probe in self.probes]
        self._items = {}
        if fingerprint([str(self._length), *arrays]) != self._expected:
            raise CacheError(
                "Expected the items of the data set in the order in which the cache was built, but some inputs differ."
                " Shuffle, augment and convert the items after `attach`, as in cache.attach(data).shuffle(1000)."
            )


def data_fingerprint(inputs: Any, augmentation: Augmentation | None = None) -> str:
    """A digest of the number of items and of a few of them.

    Args:
        inputs: Arrays of all items.
        augmentation: Augments the items; None leaves them unchanged.

    Returns:
        32 hexadecimal digits.
    """
    length = len(keras.tree.flatten(inputs)[0])
    probes = probed_items(length)
    if augmentation is not None:
        arrays = keras.tree.flatten(augmentation.batch(inputs, probes, 0))
        return fingerprint([str(length), *arrays])
    arrays = keras.tree.flatten(inputs)
    return fingerprint([str(length), *(np.asarray(array[index]) for array in arrays for index in probes)])
