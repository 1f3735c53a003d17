"""Chunks of rows, and the precision of the arithmetic, of the ways with gradients written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.chunks import chunk_numbers

_BUFFERS = 4  # float32 tensors of a chunk's size that exist at the same time


def precision(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The type of the arithmetic: float32, or float64 if one of the two is.

    Args:
        student: Of any floating point type.
        teacher: Of any floating point type.
    """
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def pieces(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Parts of tensors, cut along their first dimensions into chunks of the size for their device.

    Args:
        first: A tensor whose last dimension is not cut.
        others: Tensors with the same first dimensions, or None.

    Yields:
        Views of the parts, with None in the place of None.
    """
    return _cut(chunk_numbers(first, _BUFFERS), first, *others)


def _cut(limit: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    if first.numel() <= limit or first.ndim == 1:
        yield first, *others
        return
    step = limit // (first.numel() // len(first))
    for start in range(0, len(first), max(step, 1)):
        at = slice(start, start + step) if step else start
        yield from _cut(limit, first[at], *(None if other is None else other[at] for other in others))
