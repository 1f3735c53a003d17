"""The shapes that a term's parts are made from, so that a process without a batch can make them too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_distill.recording import Call, Tap
from lightning_distill.recording.outputs import entries_of
from lightning_distill.recording.rows import DataRows

Shape = tuple[list[int], str]
Shapes = dict[str, Any]  # "student" and "teachers": the shapes at the term's taps and of the outputs


class Learner(Protocol):
    """The interface of a term for this package: its taps, and how its parts are made, saved and loaded."""

    name: str
    needs_teacher: bool
    student_taps: Sequence[Tap]
    teacher_taps: Sequence[Tap]

    @property
    def makes_parts(self) -> bool:
        """Whether parts are made from the features' shapes."""

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the parts."""

    def reset(self) -> None:
        """Drop the parts."""

    def remake(self, make: Callable[..., None], *arguments: Any) -> None:
        """Call ``build`` or ``reset`` for one owner."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the parts."""

    def modules(self) -> Iterator[nn.Module]:
        """The term and all modules in it."""

    def state_dict(self) -> dict[str, Any]:
        """The values of the parts."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Load values."""


class _ShapedCall(Call):
    """A call with known shapes only: its features are zeros."""

    features: dict[Tap, Tensor]
    spread: dict[Tap, list[Tap]]
    image: tuple[int, int] | None = None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the network was called with."""
        return self.image

    def levels(self, tap: Tap) -> list[Tap]:
        """The levels of a pyramid that were noted."""
        return self.spread[tap] if tap in self.spread else super().levels(tap)

    def feature(self, tap: Tap) -> Tensor:
        """Zeros in the shape of the feature."""
        return self.features[tap] if tap in self.features else super().feature(tap)


def describe(term: Learner, student: Call, teachers: Sequence[Call]) -> Shapes:
    """The shapes and dtypes that a term reads in these calls.

    Args:
        term: The term.
        student: A recorded call of the student.
        teachers: The answer of each teacher to it.
    """
    return {
        "student": _side(student, term.student_taps),
        "teachers": [_side(teacher, term.teacher_taps) for teacher in teachers],
    }


def calls_of(term: Learner, shapes: Shapes, device: torch.device) -> tuple[Call, list[Call]]:
    """Calls of zeros in the shapes that :func:`describe` has noted.

    Args:
        term: The term.
        shapes: The shapes.
        device: Device of the zeros.
    """
    student = _shaped(shapes["student"], term.student_taps, device, "student", 0)
    teachers = [
        _shaped(side, term.teacher_taps, device, "teacher", index) for index, side in enumerate(shapes["teachers"])
    ]
    return student, teachers


def _side(call: Call, taps: Sequence[Tap]) -> dict[str, Any]:
    # only of a pyramid is the output noted too: another may be a function, which could not be sent to other processes
    read = [
        [(level.output if tap.spreads else None, _shape(call.feature(level))) for level in call.levels(tap)]
        for tap in taps
    ]
    size = None if call.data_rows is None else call.data_rows.size
    return {"taps": read, "output": _shapes_in(call.output), "image": call.image_size, "size": size}


def _shapes_in(value: Any) -> Any:
    """The value with a shape in the place of each tensor, in lists and dicts."""
    if isinstance(value, Tensor):
        return _shape(value)
    entries = entries_of(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return [_shapes_in(entry) for entry in entries.values()]
    return {key: _shapes_in(entry) for key, entry in entries.items()} or None


def _shape(tensor: Tensor) -> Shape:
    # under autocast parameters stay in float32
    dtype = torch.float32 if torch.is_autocast_enabled(tensor.device.type) else tensor.dtype
    return list(tensor.shape), str(dtype).removeprefix("torch.")


def _zeros(shapes: Any, device: torch.device) -> Any:
    """Zeros in the places of shapes."""
    if isinstance(shapes, tuple):
        return torch.zeros(shapes[0], dtype=getattr(torch, shapes[1]), device=device)
    if isinstance(shapes, list):
        return [_zeros(entry, device) for entry in shapes]
    return None if shapes is None else {key: _zeros(entry, device) for key, entry in shapes.items()}


def _shaped(side: dict[str, Any], taps: Sequence[Tap], device: torch.device, who: str, teacher: int) -> Call:
    call = _ShapedCall((), {}, output=_zeros(side["output"], device), who=who, teacher=teacher)
    call.features, call.spread = {}, {}
    for tap, levels in zip(taps, side["taps"], strict=True):
        call.spread[tap] = [replace(tap, output=output) if tap.spreads else tap for output, _ in levels]
        call.features |= {
            level: _zeros(shape, device) for level, (_, shape) in zip(call.spread[tap], levels, strict=True)
        }
    call.image = side["image"]
    if side["size"] is not None:
        call.data_rows = DataRows(torch.zeros(0, dtype=torch.int64), side["size"])
    return call
