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
            begin again at 0. Padding may be at place 0 too.
        numbers: Numbers of the documents, shape ``(B, T)``.
        tokens: The tokens, shape ``(B, T)``.
    """

    attention: Tensor | None
    pairs: Tensor | None
    position_ids: Tensor | None
    numbers: Tensor | None
    tokens: Tensor | None

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
        tokens = "decoder_input_ids" if seq2seq else "input_ids"
        others = (find_entry(name, batch, arguments) for name in ("position_ids", "seq_idx", tokens))
        places, *rest = others
        if isinstance(places, Tensor) and places.ndim == 3:
            places = places.amax(0)
        return cls(attention, pairs, *(rows if _is_rows(rows) else None for rows in (places, *rest)))

    def ends(self, shape: torch.Size) -> Iterator[Tensor]:
        """For each entry, True where the next token of a row begins another document, shape ``(B or 1, T)``.

        Args:
            shape: Shape ``(B, T)`` of the tokens. Entries of other lengths are left out.
        """
        for border in self._borders(shape):
            yield torch.cat([border, border.new_zeros(len(border), 1)], 1)

    def padding(self, shape: torch.Size, least: int = 2) -> Tensor:
        """The tokens that are seen to be padding: by the attention mask, else as a row's end of one token at place 0.

        Args:
            shape: Shape ``(B, T)`` of the tokens.
            least: The least number of such tokens: the last one alone may be a document of one token.

        Returns:
            True at padding, shape ``(B, T)``.
        """
        attention, places, tokens = self.attention, self.position_ids, self.tokens
        if attention is not None and attention.shape == shape:
            return attention == 0
        if places is None or tokens is None or places.shape[1] != shape[1] or tokens.shape != shape:
            device = next(entry.device for entry in self if entry is not None)
            return torch.zeros(shape, dtype=torch.bool, device=device)
        repeated = (places == 0) & (tokens == tokens[:, -1:])
        ends = repeated.flip(1).cumprod(1).flip(1)
        return (ends > 0) & (ends.sum(1, keepdim=True) >= least)

    def _borders(self, shape: torch.Size) -> Iterator[Tensor]:
        attention, pairs, places, numbers, _ = self
        if pairs is not None and pairs.shape[1:] == (shape[1], shape[1]) and pairs.shape[0] in (1, shape[0]):
            seen = _seen(pairs)
            itself, before = seen.diagonal(0, 1, 2)[:, 1:], seen.diagonal(-1, 1, 2)
            yield itself & ~before
        if places is not None and places.shape[1] == shape[1]:
            yield (places[:, 1:] == 0) & ~self.padding(shape)[:, 1:]
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
