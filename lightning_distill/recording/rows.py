"""The row of each example of a batch in the data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_distill.recording.calls import Call
from lightning_distill.recording.labels import entry_of_batch

IndexPlace = str | int | Callable[[Any], Tensor]


@dataclass(frozen=True)
class DataRows:
    """The examples of a call as rows of the data set that a cache was built from.

    Args:
        index: Row of each example, int64, shape ``(N,)``.
        size: Number of rows.
    """

    index: Tensor
    size: int


def find_index(student: Call, teacher: Call, place: IndexPlace | None, examples: int) -> Tensor:
    """The row of each example of a call in the data set.

    Args:
        student: The student's call, with the batch.
        teacher: The teacher's answer; a cached teacher knows the rows.
        place: A key, field name or index in the batch, or a function of the batch; ``None`` asks the cache.
        examples: Number of examples in the student's feature.

    Returns:
        Integers, shape ``(N,)``.

    Raises:
        ValueError: If the rows are not known, or they are not one integer for each example.
    """
    remedy = (
        "Let the data set return the number of each sample, and pass index=<key, index, or a function of the batch>;"
        " with a TeacherCache it is known."
    )
    if place is None:
        if teacher.data_rows is None:
            raise ValueError(
                "Expected `index` to say where a batch keeps the row of each example in the data set, but got"
                f" index=None. {remedy}"
            )
        known: DataRows = teacher.data_rows
        return known.index
    if student.batch is None:
        raise ValueError(f"Expected a batch for index={place!r}, but got none. Call distiller.total(task_loss, batch).")
    index = entry_of_batch(student.batch, place)
    if not isinstance(index, Tensor):
        raise ValueError(
            f"Expected a batch to hold the row of each example at index={place!r}, but got a"
            f" {type(student.batch).__name__} with {type(index).__name__} there. {remedy}"
        )
    index = index.squeeze(-1) if index.ndim == 2 else index
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not whole or tuple(index.shape) != (examples,):
        raise ValueError(
            f"Expected the batch's entry at index={place!r} to be one whole number for each of {examples} examples, but"
            f" got {index.dtype} of shape {tuple(index.shape)}. {remedy}"
        )
    return index


def check_index(index: Tensor, size: int) -> None:
    """Raise if a row is outside of the data set. It waits for the device.

    Args:
        index: Row of each example.
        size: Number of rows.

    Raises:
        ValueError: If so.
    """
    least, largest = (int(value) for value in torch.aminmax(index)) if len(index) else (0, 0)
    if least < 0 or largest >= size:
        raise ValueError(
            f"Expected `index` to be rows of the data set, 0 to {size - 1}, but got {least if least < 0 else largest}."
            " Pass size=<the number of examples in the training data>, and number them from 0."
        )
