"""Stored arrays, and the base of the codecs that make them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Column(NamedTuple):
    """A stored array.

    Attributes:
        shape: Shape of one entry.
        dtype: Its dtype.
        per: ``"item"`` for an entry for each item of a shard, a row or a position of a ragged row; ``"row"`` for each
            row; ``"shard"`` for one entry.
    """

    shape: tuple[int, ...]
    dtype: str
    per: Literal["item", "row", "shard"] = "item"

    @property
    def bytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Ragged(NamedTuple):
    """Rows of differing length, without padding.

    Attributes:
        values: The positions of all rows, one row after the other, shape ``(P, ...)``; or a tuple of such arrays.
        lengths: The number of positions of each row, int64, shape ``(N,)``; their sum is P.
    """

    values: Any
    lengths: Array


class Codec(ABC):
    """Base of the codecs, which turn the items of an array into stored arrays and back.

    An item is a row, or a position of a ragged row.

    Attributes:
        columns: The stored arrays, by name; ``"values"`` has an entry for each item.
        whole_shard: Whether all items of a shard are encoded together.
    """

    columns: dict[str, Column]
    whole_shard = False

    @abstractmethod
    def encode(self, values: Array, seed: Sequence[int] = ()) -> dict[str, Array]:
        """The stored arrays of items ``(N, ...)``.

        Args:
            values: The items, float32.
            seed: Makes a codec that draws at random repeatable.
        """

    @abstractmethod
    def decode(self, stored: dict[str, Array]) -> Any:
        """The values of the items, from their stored arrays."""

    @property
    def bytes_per_item(self) -> int:
        """Bytes that one item takes."""
        return sum(column.bytes for column in self.columns.values() if column.per == "item")
