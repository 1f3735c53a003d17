"""Calls that stand for several answers, or for some examples of one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_distill.recording import Call, Tap
from lightning_distill.teachers.route import rows_of


def examples_of(answer: Call) -> Tensor:
    """The examples that a teacher answered for under a route."""
    return cast(Tensor, answer.rows)


def alike(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs, if they have the same shape.

    Raises:
        ValueError: If not.
    """
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"Expected all teachers to score the same classes, but got outputs of the shapes {shapes}. Use"
            " mix='losses', or teachers of equal classes."
        )
    return outputs


def assembled(outputs: Sequence[Tensor | None], rows: Sequence[Tensor]) -> Tensor:
    """The outputs of all teachers in the order of the batch.

    Raises:
        ValueError: If a teacher did not answer for its examples alone, or the outputs differ in shape.
    """
    pairs = [(output, part) for output, part in zip(outputs, rows, strict=True) if output is not None and len(part)]
    for output, part in pairs:
        if output.ndim == 0 or len(output) != len(part):
            raise ValueError(
                f"Expected a teacher to answer for its {len(part)} examples under a route, but got an output of the"
                f" shape {tuple(output.shape)}. The first dimension of its inputs and outputs must be the examples."
            )
    first, dtype = pairs[0][0], functools.reduce(torch.promote_types, [output.dtype for output, _ in pairs])
    if len({output.shape[1:] for output, _ in pairs}) > 1:
        shapes = [tuple(output.shape[1:]) for output, _ in pairs]
        raise ValueError(f"Expected all teachers of a route to have outputs of one shape, but got {shapes}.")
    whole = first.new_empty((sum(len(part) for part in rows), *first.shape[1:]), dtype=dtype)
    for output, part in pairs:
        whole[part.to(whole.device)] = output.to(device=whole.device, dtype=dtype)
    return whole


@dataclass(eq=False)
class MixedCall(Call):
    """One answer in the place of several.

    Attributes:
        parts: The answer of each teacher.
        combine: Makes one tensor from one of each answer; ``None`` for a teacher without examples.
    """

    parts: Sequence[Call] = ()
    combine: Callable[[list[Any]], Tensor] | None = None

    @classmethod
    def of(cls, answers: Sequence[Call], combine: Callable[[list[Any]], Tensor]) -> MixedCall:
        """The answers as one."""
        first = answers[0]
        return cls(first.args, first.kwargs, who="teacher", parts=answers, combine=combine)

    def output_at(self, output: Any) -> Tensor:
        """One tensor of all teachers' outputs together."""
        combine = cast(Callable[[list[Any]], Tensor], self.combine)
        return combine([part.output_at(output) if part.rows is None or len(part.rows) else None for part in self.parts])


@dataclass(eq=False)
class PartCall(Call):
    """Some examples of a call of the student, ``rows``.

    Attributes:
        whole: The call.
        number: Number of its examples.
    """

    whole: Call = field(default_factory=lambda: Call((), {}))
    number: int = 0

    @classmethod
    def of(cls, call: Call, rows: Tensor, number: int) -> PartCall:
        """These examples of a call that has so many."""
        kept = {"counted": call.counted, "logged": call.logged, "trains": call.trains}
        # the arguments are of all examples, and tell the size of their images
        return cls(call.args, call.kwargs, rows=rows, whole=call, number=number, **kept)  # type: ignore[arg-type]

    def levels(self, tap: Tap) -> list[Tap]:
        """The levels of a pyramid."""
        return self.whole.levels(tap)

    def recorded(self, tap: Tap) -> Any:
        """All that a layer returned for these examples."""
        return rows_of(self.whole.recorded(tap), examples_of(self), self.number)

    def feature(self, tap: Tap) -> Tensor:
        """The feature of these examples."""
        return self._taken(self.whole.feature(tap), f"layer {tap.layer!r}")

    def output_at(self, output: Any) -> Tensor:
        """A tensor of the output, of these examples."""
        return self._taken(self.whole.output_at(output), "output")

    def _taken(self, value: Tensor, place: str) -> Tensor:
        if value.ndim == 0 or len(value) != self.number:
            raise ValueError(
                f"Expected the first dimension of the student's {place} to be the {self.number} examples under a"
                f" route, but got shape {tuple(value.shape)}. Pick or transpose it: Tap(layer, output=<function>)."
            )
        return value[examples_of(self).to(value.device)]
