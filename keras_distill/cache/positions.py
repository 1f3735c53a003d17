"""The places of tokens in padded arrays: a cache stores sequences without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from distill_core.columns import Array, Ragged
from distill_core.keys import digest
from distill_core.store import CacheError

_MASKS = ("attention_mask", "padding_mask")


class TokenPlaces:
    """Where the tokens of each item are in the student's padded inputs.

    Args:
        inputs: The student's inputs: arrays of all items, or with ``batched=False`` the specifications of one item.
        mask: True at tokens, an array ``(N, T)``; or the key of it in a dict of inputs. None looks for
            ``attention_mask`` and ``padding_mask`` there; without them sequences are taken to be padded on the right.
        batched: Whether the inputs have a dimension of the items.

    Raises:
        CacheError: If the inputs have no mask at that key, or the length of padded items is not known.
    """

    def __init__(self, inputs: Any, mask: Any = None, *, batched: bool = True) -> None:
        named = inputs if isinstance(inputs, Mapping) else {}
        if isinstance(mask, str):
            if mask not in named or not batched:
                raise CacheError(
                    f"Expected `mask` to be an array or the key of an input array, but got mask={mask!r}. Pass the"
                    " array."
                )
            mask = named[mask]
        elif mask is None and batched:
            mask = next((named[name] for name in _MASKS if name in named), None)
        self.mask: Array | None = None if mask is None else np.asarray(mask) != 0
        leaves = keras.tree.flatten(inputs) if batched else []
        self._tokens = [leaf for leaf in leaves if len(leaf.shape) == 2 and keras.backend.is_int_dtype(leaf.dtype)]
        shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(inputs)]
        widths = [shape[1 if batched else 0] for shape in shapes if len(shape) > batched]
        width: int | None = next(iter(widths), None) if self.mask is None else self.mask.shape[1]
        if width is None:
            raise CacheError(
                "Expected items of a fixed number of tokens for a cache of sequences, but got items of unknown length."
                " Pad them to one length before `attach`, or pass arrays."
            )
        self.width = width

    def of(self, items: Array, lengths: Array) -> Array:
        """True at the tokens of some items, shape ``(N, T)``.

        Args:
            items: Numbers of the items.
            lengths: The number of tokens that the teacher got for each.

        Raises:
            CacheError: If an item has another number of tokens.
        """
        mask = np.arange(self.width) < lengths[:, None] if self.mask is None else self.mask[items]
        differs = np.flatnonzero(mask.sum(1) != lengths)
        if len(differs):
            first = differs[0]
            raise CacheError(
                f"Expected item {int(items[first])} to have the {int(lengths[first])} tokens that the teacher got, but"
                f" got {int(mask[first].sum())}. Pass the sequences as in the build, padded to any length that holds"
                " them, and mask=<array of shape (items, tokens)> if they are not padded on the right."
            )
        return mask

    def check_tokens(self, item: int, mask: Array, known: int) -> None:
        """Check that an item of a cache with keys has the tokens that the teacher got.

        Args:
            item: Number of the item.
            mask: True at its tokens, shape ``(T,)``.
            known: The digest of the teacher's tokens; 0 if it is not known.

        Raises:
            CacheError: If none of the arrays of whole numbers in the inputs holds these tokens.
        """
        rows = [np.asarray(tokens[item]) for tokens in self._tokens]
        seen = {max(digest(row[mask].astype("int64").tobytes()), 1) for row in rows if row.shape == mask.shape}
        if known and seen and known not in seen:
            raise CacheError(
                f"Expected item {item} to have the tokens that the teacher got for its key, but they differ. Pass the"
                " data of the build, with its tokenizer; or TeacherCache.open(path, allow_changed_inputs=True) if the"
                " teacher's outputs fit these tokens too."
            )


def padded(values: Ragged, mask: Array) -> Any:
    """Stored positions at the places of the tokens, NaN at padding; whole numbers are 0 there.

    A loss that counts padding is then NaN, and not a wrong number.

    Args:
        values: The positions of some rows.
        mask: True at the tokens of these rows, shape ``(N, T)``.

    Returns:
        Arrays of the shape ``(N, T, ...)``, in the structure of the values.
    """

    def whole(flat: Array) -> Array:
        filler = 0 if flat.dtype.kind == "i" else np.nan
        rows = np.full((*mask.shape, *flat.shape[1:]), filler, flat.dtype)
        rows[mask] = flat
        return rows

    return tuple(map(whole, values.values)) if isinstance(values.values, tuple) else whole(values.values)
