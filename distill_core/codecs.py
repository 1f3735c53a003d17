"""Codecs: a teacher's outputs as stored arrays, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DTYPES: Final = ("float16", "bfloat16", "float32")
_LEVELS: Final = 255
_SMALLEST_TAIL: Final = 1e-7


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
        columns: The stored arrays, by name.
    """

    columns: dict[str, Column]

    @abstractmethod
    def encode(self, values: Array) -> dict[str, Array]:
        """The stored arrays of items ``(N, ...)``."""

    @abstractmethod
    def decode(self, stored: dict[str, Array]) -> Any:
        """The values of the items, from their stored arrays."""

    @property
    def bytes_per_item(self) -> int:
        """Bytes that one item takes."""
        return sum(column.bytes for column in self.columns.values() if column.per == "item")


class FullCodec(Codec):
    """All numbers, in a narrower or the same precision.

    Args:
        shape: Shape of one row.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.

    Raises:
        ValueError: If the dtype is not one of these.

    Example:
        >>> codec = FullCodec((2,), "bfloat16")
        >>> codec.decode(codec.encode(np.float32([[1.0, -3.140625]])))
        array([[ 1.      , -3.140625]], dtype=float32)
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"Expected `dtype` to be one of {', '.join(DTYPES)}, but got dtype={dtype!r}.")
        self.dtype = dtype
        self.columns = {"values": Column(shape, "uint16" if dtype == "bfloat16" else dtype)}

    def encode(self, values: Array) -> dict[str, Array]:
        """The numbers in the stored precision.

        Args:
            values: Rows, shape ``(N, ...)``, float32.

        Returns:
            The stored array.

        Raises:
            ValueError: If a number is not finite, or too large for the precision.
        """
        if self.dtype == "bfloat16":
            bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype("u8")
            stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # rounded to the nearest, ties to even
        else:
            with np.errstate(over="ignore"):
                stored = np.asarray(values).astype(self.dtype)
        if not np.isfinite(self.decode({"values": stored})).all():
            raise ValueError(
                f"Expected the teacher's outputs to be finite in {self.dtype}, but some are not. Pass dtype='float32',"
                " or check the teacher for NaN and infinity."
            )
        return {"values": stored}

    def decode(self, stored: dict[str, Array]) -> Array:
        """The numbers as float32, or as float16 where they are stored so."""
        values = np.asarray(stored["values"])
        return (values.astype("<u4") << 16).view("<f4") if self.dtype == "bfloat16" else values


class TopKCodec(Codec):
    """The k largest log-probabilities of each row of logits, and the probability of all other classes together.

    Class indices take ``ceil(log2 C)`` bits: whole bytes, and a plane of single bits for each bit above them. Values
    are float16, or 8 bits that are linear in the log-probability between the row's largest and smallest. The tail, the
    probability of all other classes together, is stored as its logarithm in float16.

    Args:
        shape: Shape of one row, ``(..., C)``.
        k: How many classes are kept, 1 to C - 1.
        dtype: ``"float16"`` or ``"uint8"``.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> codec = TopKCodec((4,), 2, "float16")
        >>> indices, values, tail = codec.decode(codec.encode(np.log(np.float32([[0.1, 0.6, 0.05, 0.25]]))))
        >>> indices, np.exp(values).round(2), np.exp(tail).round(2)
        (array([[1, 3]]), array([[0.6 , 0.25]], dtype=float32), array([[0.15]], dtype=float32))
    """

    def __init__(self, shape: tuple[int, ...], k: int, dtype: str) -> None:
        *outer, classes = shape
        if type(k) is not int or not 1 <= k < classes:
            raise ValueError(f"Expected `top_k` to be 1 to {classes - 1}, fewer than the classes, but got top_k={k!r}.")
        if dtype not in ("float16", "uint8"):
            raise ValueError(f"Expected `dtype` to be 'float16' or 'uint8' with top_k, but got dtype={dtype!r}.")
        self.k, self.classes, self.dtype = k, classes, dtype
        self._bytes, self._bits = divmod(max(1, math.ceil(math.log2(classes))), 8)
        self._plane = (k + 7) // 8
        self.columns = {"values": Column((*outer, k), dtype), "tail": Column((*outer, 1), "float16")}
        if self._bytes:
            self.columns["low"] = Column((*outer, k * self._bytes), "uint8")
        if self._bits:
            self.columns["high"] = Column((*outer, self._bits * self._plane), "uint8")
        if dtype == "uint8":
            self.columns["range"] = Column((*outer, 2), "float16")

    def encode(self, values: Array) -> dict[str, Array]:
        """The largest log-probabilities of logits and their classes, the largest first.

        Args:
            values: Logits, shape ``(N, ..., C)``.

        Returns:
            The stored arrays.

        Raises:
            ValueError: If a logit is not finite.
        """
        logits = np.asarray(values, dtype="float32")
        if not np.isfinite(logits).all():
            raise ValueError(
                "Expected the teacher's outputs to be finite, but some are not. Check the teacher for NaN and infinity."
            )
        shifted = logits - logits.max(-1, keepdims=True)
        total = np.exp(shifted).sum(-1, keepdims=True, dtype="float64")
        kept = np.argpartition(shifted, -self.k, axis=-1)[..., -self.k :]
        kept = np.take_along_axis(kept, np.lexsort((kept, -np.take_along_axis(shifted, kept, -1)), axis=-1), -1)
        logs = (np.take_along_axis(shifted, kept, -1) - np.log(total)).astype("float32")
        stored = self._packed(kept)
        left = 1.0 - np.exp(logs, dtype="float64").sum(-1, keepdims=True)
        stored["tail"] = np.log(np.maximum(left, _SMALLEST_TAIL)).astype("float16")
        if self.dtype == "float16":
            stored["values"] = np.maximum(logs, np.finfo("float16").min).astype("float16")
            return stored
        ends = np.maximum(logs[..., [0, -1]], np.finfo("float16").min).astype("float16")
        top, bottom = (ends[..., [end]].astype("float32") for end in (0, 1))
        share = (top - logs) / np.maximum(top - bottom, 1e-6)
        stored["values"] = np.rint(np.clip(share, 0.0, 1.0) * _LEVELS).astype("uint8")
        stored["range"] = ends
        return stored

    def decode(self, stored: dict[str, Array]) -> tuple[Array, Array, Array]:
        """The stored classes, their log-probabilities, and the log-probability of all other classes together.

        Args:
            stored: The stored arrays of N rows.

        Returns:
            Class indices, int64, and log-probabilities, float32, both ``(N, ..., k)``, the most likely first; the
            logarithm of the tail, ``(N, ..., 1)``.

        Raises:
            ValueError: If an index is too large: the bits can hold larger numbers than the number of classes.
        """
        indices = self._unpacked(stored)
        if indices.size and indices.max() >= self.classes:
            raise ValueError(f"Expected class indices below {self.classes}, but got {indices.max()}.")
        tail = np.asarray(stored["tail"]).astype("float32")
        values = np.asarray(stored["values"])
        if self.dtype == "float16":
            return indices, values.astype("float32"), tail
        ends = np.asarray(stored["range"]).astype("float32")
        logs = values * ((ends[..., 1:] - ends[..., :1]) / _LEVELS)
        logs += ends[..., :1]
        return indices, logs, tail

    def _packed(self, indices: Array) -> dict[str, Array]:
        outer = indices.shape[:-1]
        stored: dict[str, Array] = {}
        if self._bytes:
            low = indices[..., None] >> (8 * np.arange(self._bytes))
            stored["low"] = (low & 0xFF).astype("uint8").reshape(*outer, -1)
        if self._bits:
            planes = (indices[..., None, :] >> (8 * self._bytes + np.arange(self._bits))[:, None]) & 1
            stored["high"] = np.packbits(planes.astype("uint8"), axis=-1, bitorder="little").reshape(*outer, -1)
        return stored

    def _unpacked(self, stored: dict[str, Array]) -> Array:
        outer = np.asarray(stored["values"]).shape[:-1]
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
        return indices.astype("int64")


def make(description: dict[str, Any]) -> Codec:
    """The codec that a manifest describes."""
    shape = tuple(description["shape"])
    if description.get("top_k") is not None:
        return TopKCodec(shape, description["top_k"], description["dtype"])
    return FullCodec(shape, description["dtype"])
