"""Formulas over a few chunks of a batch, so that their temporary memory does not exceed the loss's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers in a chunk's largest tensor; smaller chunks would hardly save memory.
_SMALLEST_CHUNK = 2**20
_MOST_CHUNKS = 8  # each is kept for the backward pass, so more chunks would save little


def summed(function: Callable[..., Tensor], rows: Sequence[Tensor], *, row_size: int, inputs: int) -> Tensor:
    """Sum of a function over chunks of rows, so small that temporary memory does not exceed the loss's inputs.

    The backward pass recomputes a chunk instead of keeping it.

    Args:
        function: Called with a chunk of each tensor; returns a scalar that is a sum over the rows.
        rows: Tensors with the same number of rows.
        row_size: How many numbers the largest tensor that ``function`` makes has for each row.
        inputs: Numbers in one model's feature.

    Returns:
        A scalar.
    """
    size = max(max(_SMALLEST_CHUNK, inputs // 8) // row_size, 1)
    if len(rows[0]) <= size:
        return function(*rows)
    # Not slices: each of them would have a gradient of the whole tensor's size.
    chunks = zip(*(tensor.chunk(-(-len(tensor) // size)) for tensor in rows), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum()


def by_examples(function: Callable[..., Tensor], examples: Sequence[Tensor], *, example_size: int) -> Tensor:
    """Values of a function for each example, computed over a few chunks of the batch to save memory.

    Args:
        function: Called with a chunk of each tensor; returns one value for each example.
        examples: Tensors with the same number of examples.
        example_size: How many numbers the largest tensor that ``function`` makes has for each example.

    Returns:
        The values, shape ``(N,)``.
    """
    count = len(examples[0])
    chunks = min(_MOST_CHUNKS, count * example_size // _SMALLEST_CHUNK, count)
    if chunks < 2:
        return function(*examples)
    parts = zip(*(tensor.chunk(chunks) for tensor in examples), strict=True)
    return torch.cat([function(*part) for part in parts])
