"""Losses that remember examples, in several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from lightning_distill.losses.memories import RememberingLoss
from lightning_distill.processes import process_number, world_size


def exchange(losses: Sequence[RememberingLoss], device: torch.device) -> None:
    """Let each loss remember the examples that all processes have collected; every process must take part.

    The memories are then those of one process whose batches are these of all processes, in the order of their numbers.
    Processes may have collected examples of different numbers, or none.

    Args:
        losses: The losses, the same in all processes.
        device: Device of the communication.
    """
    if not losses:
        return
    own = [_table(loss) for loss in losses]
    sizes = torch.tensor([[len(table), len(loss.collected or ())] for table, loss in zip(own, losses, strict=True)])
    counts = _of_all(sizes.to(device)).tolist()  # of each process, for each loss: examples, and calls
    largest = [max(rows[index][0] for rows in counts) for index in range(len(losses))]
    if not any(largest):
        for loss in losses:
            loss.collected = []
        return
    padded = [
        torch.cat([table, table.new_zeros(size - len(table), table.shape[1])])
        for table, size in zip(own, largest, strict=True)
    ]
    gathered = _of_all(torch.cat([table.flatten() for table in padded]).to(device))
    starts = [0]
    for index, loss in enumerate(losses):
        starts.append(starts[-1] + padded[index].numel())
        blocks = torch.unflatten(gathered[:, starts[-2] : starts[-1]], 1, padded[index].shape)
        rows = torch.cat([block[: counts[number][index][0]] for number, block in enumerate(blocks)])
        calls = max(each[index][1] for each in counts)
        for call in range(calls):
            of_call = rows if calls == 1 else rows[rows[:, 0] == call]
            loss.update(*_columns(of_call[:, 1:], loss.no_examples()))
        loss.collected = []


def _table(loss: RememberingLoss) -> Tensor:
    """The collected examples as rows of double precision, which holds the other types: the call, then the columns."""
    tables = []
    for number, columns in enumerate([*(loss.collected or ()), loss.no_examples()]):
        flat = [column.reshape(len(column), column.shape[1:].numel()).double() for column in columns]
        tables.append(torch.cat([flat[0].new_full((len(flat[0]), 1), number), *flat], dim=1))
    return torch.cat(tables)


def _columns(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Rows of such a table as columns again, with the shapes and types of others."""
    widths = [column.shape[1:].numel() for column in like]
    return [
        part.reshape(len(rows), *column.shape[1:]).to(column.dtype)
        for part, column in zip(torch.split(rows, widths, dim=1), like, strict=True)
    ]


def _of_all(own: Tensor) -> Tensor:
    """The tensors of equal shape of all processes, stacked; by a sum, which every backend has on every device."""
    everyone = own.new_zeros(world_size(), *own.shape)
    everyone[process_number()] = own
    torch.distributed.all_reduce(everyone)
    return everyone
