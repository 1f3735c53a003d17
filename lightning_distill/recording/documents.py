"""Packed documents: several texts in one row, of which none predicts the first token of the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_distill.recording.batches import find_entry

_BLOCKED = -9e3  # masks add a smaller number to scores that do not count: -10000 or less, which is -9984 in bfloat16


class Documents(NamedTuple):
    """The entries of a call and its batch that tell the documents of a row apart.

    Attributes:
        attention: The attention mask of tokens, shape ``(B, T)``; it may have a number for each document.
        pairs: The attention mask of pairs of tokens, shape ``(B or 1, T, T)``.
        position_ids: Places of the tokens, shape ``(B or 1, T)``, or ``(3, B, T)`` in time, height and width; they
            begin again at 0.
        numbers: Numbers of the documents, shape ``(B, T)``.
    """

    attention: Tensor | None
    pairs: Tensor | None
    position_ids: Tensor | None
    numbers: Tensor | None

    @classmethod
    def of(cls, batch: Any, arguments: Mapping[str, Any], seq2seq: bool = False) -> Documents:
        """Find the entries.

        Args:
            batch: The batch.
            arguments: The arguments of the student's call.
            seq2seq: Whether the attention mask is that of a decoder.
        """
        name = "decoder_attention_mask" if seq2seq else "attention_mask"
        attention, pairs, of_heads = (find_entry(name, batch, arguments, ndim) for ndim in (2, 3, 4))
        if pairs is None and of_heads is not None:
            pairs = of_heads[:, 0]
        places, numbers = (find_entry(name, batch, arguments) for name in ("position_ids", "seq_idx"))
        if isinstance(places, Tensor) and places.ndim == 3:
            places = places.amax(0)
        return cls(attention, pairs, *(rows if _is_rows(rows) else None for rows in (places, numbers)))

    def ends(self, shape: torch.Size) -> Iterator[Tensor]:
        """For each entry, True where the next token of a row begins another document, shape ``(B or 1, T)``.

        Args:
            shape: Shape ``(B, T)`` of the tokens. Entries of other lengths are left out.
        """
        for border in self._borders(shape):
            yield torch.cat([border, border.new_zeros(len(border), 1)], 1)

    def _borders(self, shape: torch.Size) -> Iterator[Tensor]:
        attention, pairs, places, numbers = self
        if pairs is not None and pairs.shape[1:] == (shape[1], shape[1]) and pairs.shape[0] in (1, shape[0]):
            seen = _seen(pairs)
            itself, before = seen.diagonal(0, 1, 2)[:, 1:], seen.diagonal(-1, 1, 2)
            yield itself & ~before
        if places is not None and places.shape[1] == shape[1]:
            yield places[:, 1:] == 0
        if numbers is not None and numbers.shape == shape:
            yield numbers[:, 1:] != numbers[:, :-1]
        if attention is not None and attention.shape == shape:
            current, following = attention[:, :-1], attention[:, 1:]
            yield (current != following) & (current != 0) & (following != 0)


def _seen(pairs: Tensor) -> Tensor:
    """Where a token sees another, from a mask of pairs: bools, 1 and 0, or numbers that are added to the scores."""
    if not pairs.is_floating_point():
        return pairs != 0
    ones_and_zeros = ((pairs == 0) | (pairs == 1)).all()  # stays on the device: nothing waits for it
    return torch.where(ones_and_zeros, pairs != 0, pairs > _BLOCKED)


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2
