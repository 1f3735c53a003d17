"""Class indices in as few bits as the number of classes needs."""

from __future__ import annotations

import math

import numpy as np

from distill_core.columns import Array, Column


class IndexPacking:
    """Packs k class indices of an item into ``ceil(log2 C)`` bits each.

    Whole bytes are stored as they are, and each bit above them as a plane of single bits.

    Args:
        outer: Shape of an item without its classes.
        classes: Number of classes C.
        k: Number of indices.

    Attributes:
        columns: The stored arrays, by name.

    Example:
        >>> packing = IndexPacking((), 1000, 3)
        >>> (
        ...     packing.unpack(packing.pack(np.array([[999, 0, 512]]))),
        ...     {name: c.bytes for name, c in packing.columns.items()},
        ... )
        (array([[999,   0, 512]]), {'low': 3, 'high': 2})
    """

    def __init__(self, outer: tuple[int, ...], classes: int, k: int) -> None:
        self.classes, self.k = classes, k
        self._bytes, self._bits = divmod(max(1, math.ceil(math.log2(classes))), 8)
        self._plane = (k + 7) // 8
        self.columns: dict[str, Column] = {}
        if self._bytes:
            self.columns["low"] = Column((*outer, k * self._bytes), "uint8")
        if self._bits:
            self.columns["high"] = Column((*outer, self._bits * self._plane), "uint8")

    def pack(self, indices: Array) -> dict[str, Array]:
        """The stored arrays of indices, shape ``(N, ..., k)``."""
        outer = indices.shape[:-1]
        stored: dict[str, Array] = {}
        if self._bytes:
            low = indices[..., None] >> (8 * np.arange(self._bytes))
            stored["low"] = (low & 0xFF).astype("uint8").reshape(*outer, -1)
        if self._bits:
            planes = (indices[..., None, :] >> (8 * self._bytes + np.arange(self._bits))[:, None]) & 1
            stored["high"] = np.packbits(planes.astype("uint8"), axis=-1, bitorder="little").reshape(*outer, -1)
        return stored

    def unpack(self, stored: dict[str, Array]) -> Array:
        """The indices, int64.

        Raises:
            ValueError: If an index is too large: the bits can hold larger numbers than the number of classes.
        """
        outer = np.asarray(next(stored[name] for name in self.columns)).shape[:-1]
        indices = np.zeros((*outer, self.k), dtype="int32")
        if self._bytes:
            low = np.asarray(stored["low"]).reshape(*outer, self.k, self._bytes)
            if self._bytes == 2:
                indices[:] = np.ascontiguousarray(low).view("<u2")[..., 0]
            else:
                for byte in range(self._bytes):
                    indices |= low[..., byte].astype("int32") << (8 * byte)
        if self._bits:
            planes = np.asarray(stored["high"]).reshape(*outer, self._bits, self._plane)
            bits = np.unpackbits(planes, axis=-1, count=self.k, bitorder="little")
            for bit in range(self._bits):
                indices |= bits[..., bit, :].astype("int32") << (8 * self._bytes + bit)
        if indices.size and indices.max() >= self.classes:
            raise ValueError(f"Expected class indices below {self.classes}, but got {indices.max()}.")
        return indices.astype("int64")
