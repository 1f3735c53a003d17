"""Formulas over a few chunks of a batch, so that their temporary memory does not exceed the loss's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers in a chunk's largest tensor; smaller chunks would hardly save memory.
_SMALLEST_CHUNK = 2**20
_MOST_CHUNKS = 8  # each is kept for the backward pass, so more chunks would save little
# Numbers in a chunk of simple arithmetic, for each thread: all of its tensors stay in a processor's cache.
_IN_CACHE = 2**17
_SHARE_OF_GPU = 4  # a chunk's tensors may take one part in so many of a GPU's free memory


def chunk_numbers(inputs: Tensor, tensors: int) -> int:
    """How many numbers each tensor of a chunk may have, in element-wise arithmetic on some inputs.

    Args:
        inputs: A tensor on the device, of which the chunk is a part.
        tensors: Number of float32 tensors of the chunk's size that exist at the same time.

    Returns:
        A count for the processor's cache on the CPU, and as much as memory allows on a GPU, where many small chunks
        would cost more time to launch than to compute.
    """
    if inputs.device.type == "cpu":
        return _IN_CACHE * torch.get_num_threads()
    return max(_free_memory(inputs) // (_SHARE_OF_GPU * 4 * tensors), _SMALLEST_CHUNK)


def _free_memory(inputs: Tensor) -> int:
    """Bytes of a GPU that a loss may use; for other accelerators, or inputs that are small anyway, a typical size."""
    device = inputs.device
    if device.type != "cuda" or inputs.numel() < 2**24 or torch.cuda.is_current_stream_capturing():
        return 2**33
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
