"""The positions of a batch's tokens: sequences are stored without padding, and put at the places of the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_core.store import CacheError
from lightning_distill.recording.batches import find_entry
from lightning_distill.recording.labels import find_tensor

Mask = str | int | Callable[[Any], Tensor]
ATTENTION, DECODER_ATTENTION, LABELS = "attention_mask", "decoder_attention_mask", "labels"
_IGNORED = -100  # the label of padding


def token_mask(batch: Any, place: Mask) -> Tensor | None:
    """The mask of a batch's tokens.

    Args:
        batch: The batch.
        place: Where the batch keeps it: a key, also of a dict in a tuple; an index; or a function of the batch.
            ``"labels"`` are not a mask: all positions up to the last label that is not -100 count as tokens.

    Returns:
        A bool tensor ``(B, T)``, or ``None`` if the batch has no rows of whole numbers there.

    Raises:
        CacheError: If the entry holds numbers below 0, as labels do.
    """
    if isinstance(place, str):
        values = find_entry(place, batch, {})
        values = getattr(batch, place, None) if values is None and not isinstance(batch, Mapping) else values
    else:
        try:
            values = find_tensor(batch, place)
        except ValueError:
            return None
    if not isinstance(values, Tensor) or values.ndim != 2 or values.is_floating_point():
        return None
    if place == LABELS:
        return (values != _IGNORED).flip(1).cumsum(1).flip(1) > 0
    if values.dtype != torch.bool and bool((values < 0).any()):
        raise CacheError(
            f"Expected `mask` to be a mask of the tokens, but got mask={place!r}, where the batch has numbers below 0,"
            " as in labels. Pass a function of the batch that returns the mask of the positions whose outputs are read:"
            " for a causal loss also the one before the first label that counts."
        )
    return values.bool()


def noted_place(mask: Mask | None) -> str | int | None:
    """The place of a batch's mask as a manifest notes it: the attention mask by default; ``None`` for a function."""
    if mask is None:
        return ATTENTION
    return None if callable(mask) else mask


def tokens_in(batch: Any, place: Mask | None) -> Tensor | None:
    """The mask of a batch's tokens at a place, else its attention mask; ``None`` without one."""
    return token_mask(batch, ATTENTION if place is None else place)


def needed_mask(batch: Any, place: Mask | None) -> Tensor:
    """The mask of a batch's tokens at the place that a cache was built with.

    Args:
        batch: The batch.
        place: The place; ``None`` for a cache that was built with a function that :meth:`TeacherCache.open` lacks.

    Raises:
        CacheError: If the batch has no mask there.
    """
    mask = None if place is None else token_mask(batch, place)
    if mask is not None:
        return mask
    if place is None:
        raise CacheError(
            "Expected `mask` to be the function that the cache was built with, but got None. Pass it to"
            " TeacherCache.open(path, mask=...)."
        )
    names = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise CacheError(
        f"Expected the batch to have {place!r}, which says where the tokens of its padded sequences are, but got a"
        f" batch of {names}. Put it into the batch, shape (batch, tokens), or pass mask=<key, index, or a function of"
        " the batch> to TeacherCache.build or TeacherCache.open."
    )


def place_of(tensor: Tensor, batch: Any, mask: Mask | None, decoder: bool, name: str) -> Mask | None:
    """Where a batch keeps the mask of the tokens that an output or a feature has a position for.

    Args:
        tensor: The output or feature, shape ``(B, ...)``.
        batch: The batch.
        mask: The place that the user names, or ``None``.
        decoder: Whether the positions are those of a decoder, whose attention mask has another name.
        name: Name of the tensor, for the message.

    Returns:
        The place; ``None`` if the tensor has no positions, or the batch no mask of its shape.

    Raises:
        CacheError: If the batch has two different masks of that shape.
    """
    if tensor.ndim < 3:
        return None
    places: list[Mask] = [DECODER_ATTENTION, LABELS] if decoder else [ATTENTION, DECODER_ATTENTION, LABELS]
    fitting: list[tuple[Mask, Tensor]] = []
    for place in places if mask is None else [mask]:
        tokens = token_mask(batch, place)
        if tokens is not None and tokens.shape == tensor.shape[:2]:
            fitting.append((place, tokens))
    if not fitting:
        return None
    has_decoder = token_mask(batch, DECODER_ATTENTION) is not None
    if has_decoder and any(not torch.equal(fitting[0][1], tokens) for _, tokens in fitting[1:]):
        raise CacheError(
            f"Expected one mask that fits {name!r}, but got {[place for place, _ in fitting]}, which differ. Pass"
            " mask=<the one of them>."
        )
    return fitting[0][0]


def padded(flat: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Stored positions at the places of a batch's tokens, NaN at padding; whole numbers are 0 there.

    A loss that counts padding is then NaN, and not a wrong number.

    Args:
        flat: The positions of all rows, shape ``(P, ...)``.
        mask: The places of the tokens, shape ``(B, T)``.
        places: The same as indices of the flattened mask, shape ``(P,)``, on the device of ``flat``.

    Returns:
        Shape ``(B, T, ...)``.

    Example:
        >>> mask = torch.tensor([[False, True], [True, True]])
        >>> padded(torch.tensor([1.0, 2.0, 3.0]), mask, mask.flatten().nonzero()[:, 0])
        tensor([[nan, 1.],
                [2., 3.]])
    """
    filler = torch.nan if flat.is_floating_point() else 0
    whole = flat.new_full((mask.numel(), *flat.shape[1:]), filler)
    return whole.index_copy_(0, places, flat).view(*mask.shape, *flat.shape[1:])
