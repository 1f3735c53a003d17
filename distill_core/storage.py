"""Settings that say how the numbers of a cache are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_core.codecs import DTYPES
from distill_core.columns import Ragged
from distill_core.manifest import CacheError
from distill_core.sampled import check_logits


@dataclass(frozen=True)
class Storage:
    """How the outputs and the features of a teacher are stored.

    Args:
        dtype: Precision of the outputs, and of the features without a precision of their own: ``"float16"``,
            ``"bfloat16"`` or ``"float32"``; with ``top_k`` ``"float16"`` or ``"uint8"``.
        top_k: How many of the likeliest classes are kept of each output; None keeps all.
        sampled: How many classes are drawn at random from each output; None keeps all.
        feature_dtype: Precision of the features; also ``"uint8"``, 8 bits with a scale for each channel.

    Raises:
        CacheError: If the settings contradict each other.
    """

    dtype: str = "float16"
    top_k: int | None = None
    sampled: int | None = None
    feature_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.sampled is not None:
            raise CacheError(
                f"Expected `top_k` or `sampled` to be None, but got top_k={self.top_k!r} and sampled={self.sampled!r}."
                " Keep the likeliest classes, or draw some at random."
            )
        if self.dtype == "uint8" and self.top_k is None:
            raise CacheError(
                "Expected `dtype` to be float16, bfloat16 or float32 without top_k, but got 'uint8'. Features take"
                " feature_dtype='uint8'."
            )
        if self.feature_dtype not in (None, "uint8", *DTYPES):
            raise CacheError(
                f"Expected `feature_dtype` to be one of uint8, {', '.join(DTYPES)}, but got"
                f" feature_dtype={self.feature_dtype!r}."
            )

    def describe(self, name: str, shape: Sequence[int], channels_first: bool) -> dict[str, Any]:
        """The description of an array in a manifest.

        Args:
            name: ``"output"``, or ``"feature0"``...
            shape: Shape of an item.
            channels_first: Whether the channels of a map are its first dimension, as in PyTorch, or its last.
        """
        described: dict[str, Any] = {"shape": list(shape), "dtype": self.dtype}
        if name == "output":
            if self.top_k is not None:
                return {**described, "top_k": self.top_k}
            return described if self.sampled is None else {**described, "dtype": "uint8", "sampled": self.sampled}
        dtype = self.feature_dtype or ("float16" if self.dtype == "uint8" else self.dtype)
        if dtype != "uint8":
            return {**described, "dtype": dtype}
        first = channels_first and len(shape) == 3
        return {**described, "dtype": dtype, "channels": 0 if first else max(len(shape) - 1, 0)}

    def check_scores(self, named: Mapping[str, Any]) -> None:
        """Check that outputs whose classes are left out are logits.

        Args:
            named: The rows of some samples, by the name of the array.

        Raises:
            ValueError: If they are probabilities.
        """
        if "output" in named and (self.top_k is not None or self.sampled is not None):
            rows = named["output"]
            check_logits(rows.values if isinstance(rows, Ragged) else rows)
