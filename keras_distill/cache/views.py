"""Augmented views of arrays: the same transform with the same seed for teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
import numpy as np

from distill_core.codecs import Array
from distill_core.store import CacheError, fingerprint

_PROBES = 8
# From one item and a seed to the augmented item.
Transform: TypeAlias = Callable[[Any, Array], Any]


class Augmentation:
    """Inputs as a transform augments them, each item of each view with a seed of its own.

    Args:
        transform: Called with one item, NumPy arrays in the structure of the inputs, and two int32 numbers, gives the
            augmented item; everything random in it must come from those numbers.
        seed: What they are drawn from.

    Example:
        >>> flip = Augmentation(lambda x, seed: x[::-1] if np.random.default_rng(seed).random() < 0.5 else x, seed=1)
        >>> x = np.arange(12).reshape(6, 2)
        >>> [int(row[0] > row[1]) for view in (0, 1) for row in flip.batch(x, range(6), view)]
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1]
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform, self.seed = transform, seed

    def batch(self, inputs: Any, indices: Iterable[int], view: int) -> Any:
        """Some items of a view.

        Args:
            inputs: Arrays of all items.
            indices: Which items.
            view: Which view.

        Returns:
            The augmented items, one array for each that an item has.
        """
        items = [self._item(inputs, int(index), view) for index in indices]
        return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *items)

    def check(self, inputs: Any) -> None:
        """Raise if the transform draws from elsewhere than its seed.

        Args:
            inputs: Arrays of all items.

        Raises:
            CacheError: If so: the student would not be shown what the teacher was.
        """
        first, second = (data_fingerprint(inputs, self) for _ in range(2))
        if first != second:
            raise CacheError(
                "Expected `transform` to give the same for the same item and seed, but some items differ: the student"
                " would not be shown what the teacher was. Draw everything random from the seed, as in"
                " np.random.default_rng(seed)."
            )

    def _item(self, inputs: Any, index: int, view: int) -> Any:
        # copies: a transform may work in place
        item = keras.tree.map_structure(lambda array: np.array(keras.ops.convert_to_numpy(array[index])), inputs)
        drawn = np.random.SeedSequence([self.seed, view, index]).generate_state(2)
        augmented = self.transform(item, (drawn >> 1).astype("int32"))  # not negative: NumPy takes nothing else
        return keras.tree.map_structure(lambda leaf: np.asarray(keras.ops.convert_to_numpy(leaf)), augmented)


def requested(transform: Transform | None, transform_seed: int | None, views: int) -> Augmentation | None:
    """The augmentation that the settings of a build ask for.

    Args:
        transform: The transform, or None.
        transform_seed: What it is seeded with, or None.
        views: How many views there are.

    Returns:
        The augmentation, or None where items are kept as they are.

    Raises:
        CacheError: If the settings contradict each other.
        TypeError: If the transform cannot be called.
    """
    if type(views) is not int or views < 1:
        raise CacheError(f"Expected `views` to be 1 or greater, but got views={views!r}.")
    if transform is None:
        given = f"transform_seed={transform_seed!r}" if transform_seed is not None else f"views={views}"
        if views > 1 or transform_seed is not None:
            raise CacheError(f"Expected `transform` to be given with {given}, but got None. Pass a function.")
        return None
    if not callable(transform):
        raise TypeError(f"Expected `transform` to be a function of an item and a seed, but got {transform!r}.")
    if transform_seed is None:
        raise CacheError("Expected `transform_seed` to be given with a transform, but got None. Pass a number.")
    return Augmentation(transform, transform_seed)


def data_fingerprint(inputs: Any, augmentation: Augmentation | None = None) -> str:
    """A digest of some items.

    Args:
        inputs: Arrays of all items.
        augmentation: Augments them; None takes them as they are.

    Returns:
        32 hexadecimal digits.
    """
    length = len(keras.tree.flatten(inputs)[0])
    probes = sorted({round(one * (length - 1) / (_PROBES - 1)) for one in range(_PROBES)})
    if augmentation is not None:
        arrays = keras.tree.flatten(augmentation.batch(inputs, probes, 0))
        return fingerprint([str(length), *arrays])
    arrays = keras.tree.flatten(inputs)
    return fingerprint([str(length), *(np.asarray(array[index]) for array in arrays for index in probes)])
