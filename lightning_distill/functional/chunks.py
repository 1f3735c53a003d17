"""Formulas over a few chunks of a batch, so that their temporary memory does not exceed the loss's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On the CPU, numbers in a chunk's largest tensor; smaller chunks would hardly save memory.
_SMALLEST_CHUNK = 2**20
_MOST_CHUNKS = 8  # each is kept for the backward pass, so more chunks would save little
# On the CPU, numbers in a chunk of element-wise arithmetic, for each thread: its tensors stay in a processor's cache.
_IN_CACHE = 2**17
_SHARE_OF_GPU = 4  # the tensors of a chunk may take one part in so many of a GPU's free memory
_OF_A_RELATION = 12  # tensors of the size of all pairs, or triples, that a relation keeps for its backward pass
_TYPICAL_MEMORY = 2**34  # bytes, of an accelerator that cannot be asked


def chunk_numbers(inputs: Tensor, tensors: int) -> int:
    """How many numbers each tensor of a chunk may have, in element-wise arithmetic on some inputs.

    Args:
        inputs: A tensor on the device, of which the chunk is a part.
        tensors: Number of float32 tensors of the chunk's size that exist at the same time.

    Returns:
        A count for the processor's cache on the CPU. On a GPU as many as fit into a share of its free memory, since
        many small chunks take longer to launch than to compute.
    """
    if inputs.device.type == "cpu":
        return _IN_CACHE * torch.get_num_threads()
    return _fitting(inputs.device, inputs.numel(), tensors)


def summed(function: Callable[..., Tensor], rows: Sequence[Tensor], *, row_size: int, inputs: int) -> Tensor:
    """Sum of a function over chunks of rows.

    On the CPU they are so small that temporary memory does not exceed the loss's inputs; on a GPU as large as its
    memory allows. The backward pass recomputes a chunk instead of keeping it, unless there is only one.

    Args:
        function: Called with a chunk of each tensor; returns a scalar that is a sum over the rows.
        rows: Tensors with the same number of rows.
        row_size: How many numbers the largest tensor that ``function`` makes has for each row.
        inputs: Numbers in one model's feature.

    Returns:
        A scalar.
    """
    numbers = len(rows[0]) * row_size
    size = max(_limit(rows[0], numbers, at_least=inputs // 8) // row_size, 1)
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
    numbers = count * example_size
    chunks = min(_MOST_CHUNKS, numbers // _limit(examples[0], numbers), count)
    if chunks < 2:
        return function(*examples)
    parts = zip(*(tensor.chunk(chunks) for tensor in examples), strict=True)
    return torch.cat([function(*part) for part in parts])


def _limit(inputs: Tensor, numbers: int, *, at_least: int = 0) -> int:
    """The most numbers in the largest tensor of a chunk, of the numbers in all chunks together."""
    smallest = max(_SMALLEST_CHUNK, at_least)
    if inputs.device.type == "cpu" or numbers <= smallest:
        return smallest
    return max(_fitting(inputs.device, numbers, _OF_A_RELATION), smallest)


def _fitting(device: torch.device, numbers: int, tensors: int) -> int:
    """How many numbers each of some float32 tensors may have in a share of a GPU's free memory; all, if that is little.

    To ask for the memory does not make the host wait for the GPU.
    """
    if numbers < 2**24:
        return numbers
    free = _TYPICAL_MEMORY
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for new tensors
        free = torch.cuda.mem_get_info(device)[0] + kept
    return max(free // (_SHARE_OF_GPU * 4 * tensors), 1)
