"""Which of several teachers an example belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.recording import Call, first_tensor, map_tensors
from lightning_distill.recording.labels import find_tensor

Place = str | int | Callable[[Any], Tensor]


class Route:
    """Finds the teacher of each example in the batch.

    Args:
        place: Where a batch keeps the index of each example's teacher: a key, an index, or a function of the batch.

    Raises:
        TypeError: If ``place`` is none of these.

    Example:
        >>> call = Call((torch.zeros(3, 2),), {}, batch={"source": torch.tensor([1, 0, 1])})
        >>> Route("source").rows(call, 2)
        [tensor([1]), tensor([0, 2])]
    """

    def __init__(self, place: Place) -> None:
        if not callable(place) and (isinstance(place, bool) or not isinstance(place, (str, int))):
            raise TypeError(f"Expected `route` to be a key, an index or a function, but got route={place!r}.")
        self.place = place

    def rows(self, call: Call, teachers: int) -> list[Tensor]:
        """The examples of each teacher, int64 indices. It waits for the device.

        Args:
            call: A call of the student, with the batch.
            teachers: Number of teachers.

        Raises:
            ValueError: If the batch does not name one of the teachers for every example.
        """
        if call.batch is None:
            raise ValueError(
                f"Expected a batch for route={self.place!r}, but got none. Call distiller.total(task_loss, batch)."
            )
        named = find_tensor(call.batch, self.place, "route", "the teacher of each example")
        number = len(first_tensor(call.args, call.kwargs, call.output))
        if named.shape != (number,) or named.is_floating_point() or named.dtype == torch.bool:
            raise ValueError(
                f"Expected `route` to give the index of a teacher for each of the {number} examples, an integer tensor"
                f" ({number},), but got {named.dtype} of the shape {tuple(named.shape)}."
            )
        wrong = named[(named < 0) | (named >= teachers)]
        if len(wrong):
            raise ValueError(
                f"Expected `route` to name one of the {teachers} teachers, 0 to {teachers - 1}, for every example, but"
                f" got {wrong[0].item()}."
            )
        return [(named == index).nonzero()[:, 0] for index in range(teachers)]


def rows_of(value: Any, rows: Tensor, number: int) -> Any:
    """The value with these examples of each tensor that has all of them.

    Args:
        value: A tensor, or tensors in tuples, lists, dicts and dataclasses.
        rows: Indices of the examples.
        number: Number of all examples, the first dimension of the tensors that have them.
    """

    def taken(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == number else tensor

    return map_tensors(value, taken)


def shown_rows(rows: Sequence[Tensor], all_answer: bool) -> list[Tensor]:
    """The examples that each teacher is called with.

    Args:
        rows: The examples of each teacher.
        all_answer: Whether a teacher without examples is called with the first one, since terms take the shapes of its
            layers from the answer.
    """
    return [part.new_zeros(1) if all_answer and not len(part) else part for part in rows]
