"""Codecs: a teacher's outputs as stored arrays, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from distill_core.columns import Array, Codec, Column
from distill_core.packed import IndexPacking
from distill_core.sampled import SampledCodec, log_softmax

DTYPES: Final = ("float16", "bfloat16", "float32")
_LEVELS: Final = 255
_SMALLEST_TAIL: Final = 1e-7


class Likeliest(NamedTuple):
    """The likeliest classes of some rows, in the place of all logits.

    Attributes:
        classes: Class indices, int64, shape ``(N, k)``, the likeliest first.
        logs: Their log-probabilities, float32, same shape.
        num_classes: Number of all classes.
    """

    classes: Array
    logs: Array
    num_classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return (len(self.classes), self.num_classes)


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

    def encode(self, values: Array, seed: Sequence[int] = ()) -> dict[str, Array]:
        """The numbers in the stored precision.

        Args:
            values: Rows, shape ``(N, ...)``, float32.
            seed: Not used.

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
        self._indices = IndexPacking(tuple(outer), classes, k)
        self.columns = {"values": Column((*outer, k), dtype), "tail": Column((*outer, 1), "float16")}
        self.columns |= self._indices.columns
        if dtype == "uint8":
            self.columns["range"] = Column((*outer, 2), "float16")

    def encode(self, values: Array | Likeliest, seed: Sequence[int] = ()) -> dict[str, Array]:
        """The largest log-probabilities of logits and their classes, the largest first.

        Args:
            values: Logits, shape ``(N, ..., C)``, or their likeliest classes.
            seed: Not used.

        Returns:
            The stored arrays.

        Raises:
            ValueError: If a logit is not finite.
        """
        if isinstance(values, Likeliest):
            return self._stored(values.classes, values.logs)
        shifted, total = log_softmax(values)
        kept = np.argpartition(shifted, -self.k, axis=-1)[..., -self.k :]
        kept = np.take_along_axis(kept, np.lexsort((kept, -np.take_along_axis(shifted, kept, -1)), axis=-1), -1)
        return self._stored(kept, (np.take_along_axis(shifted, kept, -1) - total).astype("float32"))

    def _stored(self, kept: Array, logs: Array) -> dict[str, Array]:
        stored = self._indices.pack(kept)
        left = 1.0 - np.exp(logs, dtype="float64").sum(-1, keepdims=True)
        stored["tail"] = np.log(np.maximum(left, _SMALLEST_TAIL)).astype("float16")
        if self.dtype == "float16":
            stored["values"] = np.maximum(logs, np.finfo("float16").min).astype("float16")
            return stored
        ends = np.maximum(logs[..., [0, -1]], np.finfo("float16").min).astype("float16")
        top, bottom = (ends[..., [end]].astype("float32") for end in (0, 1))
        share = np.nan_to_num((top - logs) / np.maximum(top - bottom, 1e-6))  # NaN stays in the range
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
        indices = self._indices.unpack(stored)
        tail = np.asarray(stored["tail"]).astype("float32")
        values = np.asarray(stored["values"])
        if self.dtype == "float16":
            return indices, values.astype("float32"), tail
        ends = np.asarray(stored["range"]).astype("float32")
        with np.errstate(over="ignore", invalid="ignore"):  # of an altered file
            logs = values * ((ends[..., 1:] - ends[..., :1]) / _LEVELS)
            logs += ends[..., :1]
        return indices, logs, tail


class ScaledCodec(Codec):
    """Features in 8 bits, linear between the smallest and the largest number of each channel in a shard.

    Args:
        shape: Shape of one item.
        channels: Dimension of the channels in it.

    Raises:
        ValueError: If an item has no such dimension.

    Example:
        >>> codec = ScaledCodec((2,), 0)
        >>> values = np.float32([[0.0, -100.0], [1.0, 100.0], [0.2, 0.0]])
        >>> stored = codec.encode(values)
        >>> stored["values"].dtype, codec.decode({**stored, "scale": stored["scale"].repeat(3, 0)}).round(1)
        (dtype('uint8'), array([[   0. , -100. ],
               [   1. ,  100. ],
               [   0.2,    0.4]], dtype=float32))
    """

    whole_shard = True

    def __init__(self, shape: tuple[int, ...], channels: int) -> None:
        if type(channels) is not int or not 0 <= channels < len(shape):
            raise ValueError(
                f"Expected `channels` to be a dimension of {shape}, but got channels={channels!r}. Pass another dtype."
            )
        self.channels = channels
        self.columns = {"values": Column(shape, "uint8"), "scale": Column((shape[channels], 2), "float32", "shard")}

    def encode(self, values: Array, seed: Sequence[int] = ()) -> dict[str, Array]:
        """The numbers in 8 bits, and the smallest number and the step of each channel.

        Args:
            values: All items of a shard, shape ``(N, ...)``, float32.
            seed: Not used.

        Returns:
            The stored arrays.

        Raises:
            ValueError: If a number is not finite.
        """
        last = np.moveaxis(np.asarray(values, "float32"), self.channels + 1, -1)
        if not np.isfinite(last).all():
            raise ValueError(
                "Expected the teacher's features to be finite, but some are not. Check the teacher for NaN and"
                " infinity."
            )
        rows = last.reshape(-1, last.shape[-1])
        if not len(rows):
            rows = np.zeros((1, last.shape[-1]), "float32")
        smallest = rows.min(0)
        step = (rows.max(0).astype("float64") - smallest) / _LEVELS
        levels = np.rint((last - smallest) / np.where(step > 0, step, 1.0))
        stored = np.moveaxis(levels.clip(0, _LEVELS).astype("uint8"), -1, self.channels + 1)
        return {"values": stored, "scale": np.stack([smallest, step], -1).astype("float32")[None]}

    def decode(self, stored: dict[str, Array]) -> Array:
        """The numbers, float32.

        Args:
            stored: The stored arrays, ``"scale"`` with an entry for each item.
        """
        values = np.moveaxis(np.asarray(stored["values"]), self.channels + 1, -1)
        scale = np.asarray(stored["scale"])
        scale = scale.reshape(len(scale), *[1] * (values.ndim - 2), *scale.shape[1:])
        numbers = values.astype("float32")
        with np.errstate(over="ignore", invalid="ignore"):  # of an altered file
            numbers *= scale[..., 1]
            numbers += scale[..., 0]
        return np.moveaxis(numbers, -1, self.channels + 1)


def make(description: dict[str, Any]) -> Codec:
    """The codec that a manifest describes."""
    shape, dtype = tuple(description["shape"]), description["dtype"]
    if description.get("top_k") is not None:
        return TopKCodec(shape, description["top_k"], dtype)
    if description.get("sampled") is not None:
        return SampledCodec(shape, description["sampled"])
    if "channels" in description:
        return ScaledCodec(shape, description["channels"])
    return FullCodec(shape, dtype)
