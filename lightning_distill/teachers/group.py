"""Several teachers of which not all are networks, such as a cache beside a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_distill.recording import Call, Tap
from lightning_distill.recording.student import StudentFinder
from lightning_distill.teachers.moving_average import EMATeacher
from lightning_distill.teachers.source import TeacherEnsemble, TeacherSource


class TeacherGroup:
    """Several teachers, each with a source of its own.

    Args:
        teachers: The teachers: networks, moving averages, the student itself, at most one cache.

    Raises:
        ValueError: If there are several caches.
    """

    def __init__(self, teachers: Sequence[Any]) -> None:
        self._teachers = list(teachers)
        caches = sum(hasattr(teacher, "as_source") for teacher in teachers)
        if caches > 1:
            raise ValueError(
                f"Expected `teacher` to hold at most one cache, since a batch carries the answers of one, but got"
                f" {caches}. Pass the networks of the others."
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._teachers)

    def __len__(self) -> int:
        return len(self._teachers)

    def __getitem__(self, index: int) -> Any:
        return self._teachers[index]

    def __repr__(self) -> str:
        return f"TeacherGroup({', '.join(type(teacher).__name__ for teacher in self)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherGroup:
        # of another training, whose student has an average of its own; the others stay as they are
        return TeacherGroup(
            [copy.deepcopy(each, memo) if isinstance(each, EMATeacher) else each for each in self._teachers]
        )


def members(teacher: Any) -> list[Any]:
    """The teachers in a list, of one too.

    Args:
        teacher: The teacher, as ``as_teacher`` returns it.
    """
    return [*teacher] if isinstance(teacher, (TeacherEnsemble, TeacherGroup)) else [teacher]


class GroupSource:
    """The source of several teachers that have sources of their own.

    Args:
        sources: The sources, in the order of the teachers.
    """

    def __init__(self, sources: Sequence[TeacherSource]) -> None:
        self.sources = list(sources)
        self._cached = next((source for source in sources if source.stored), None)
        self.live = self._cached is None
        self.stored = self._cached is not None
        self.moves = any(source.moves for source in sources)

    @property
    def scheduled(self) -> list[tuple[str, Any]]:
        """Objects with settings that may be schedules, with a prefix that has the number of the teacher."""
        return [
            (f"{prefix}_{index}", holder)
            for index, source in enumerate(self.sources)
            for prefix, holder in source.scheduled
        ]

    @property
    def cache(self) -> Any:
        """The cache among the teachers, if ``stored``."""
        return getattr(self._cached, "cache", None)

    @property
    def layers_named(self) -> Callable[[str], list[nn.Module]] | None:
        """Finds the modules of a name, one of each teacher; ``None`` if one of them is not a network of its own."""
        finders = [getattr(source, "layers_named", None) for source in self.sources]
        if None in finders:
            return None
        return lambda name: [module for find in finders if find is not None for module in find(name)]

    def meet(self, student: StudentFinder) -> None:
        """Take note of the student."""
        for source in self.sources:
            source.meet(student)

    def follow(self, leader: Optimizer) -> None:
        """Take note of the student's optimizer."""
        for source in self.sources:
            source.follow(leader)

    def unfollow(self) -> None:
        """Stop following the optimizer."""
        for source in self.sources:
            source.unfollow()

    def before_step(self) -> None:
        """Called before the student is called in a step, and before its optimizer steps."""
        for source in self.sources:
            source.before_step()

    def check_followed(self) -> None:
        """Raise if an optimizer is missing."""
        for source in self.sources:
            source.check_followed()

    def state_dict(self) -> dict[str, Any]:
        """The states of the teachers that have one, by their numbers."""
        states = {str(index): source.state_dict() for index, source in enumerate(self.sources)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, or from the start if it is empty.

        Raises:
            ValueError: If it is the state of other teachers, or of the same in another order.
        """
        changing = [str(index) for index, source in enumerate(self.sources) if source.moves]
        if not state.keys() <= set(changing):
            raise ValueError(
                f"Expected the saved state of the teachers that change, at positions {changing} of the list, but got"
                f" {sorted(state)}. Pass the teachers in the order of the training that is resumed."
            )
        for index, source in enumerate(self.sources):
            source.load_state_dict(state.get(str(index), {}))

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if a teacher lacks an output or a layer that the terms read."""
        for source in self.sources:
            source.check(taps, reader, output_reader)

    def check_student(self, student: nn.Module) -> None:
        """Compare the teachers with the student."""
        for source in self.sources:
            source.check_student(student)

    def hold(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Prepare the teachers for a run."""
        for source in self.sources:
            source.hold(device, dtype)

    def release(self) -> None:
        """Restore everything to its state before the run."""
        for source in self.sources:
            source.release()

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The answer of each teacher to a call of the student."""
        answers = [answer for source in self.sources for answer in source.answers(call, stored)]
        rows = next((answer.data_rows for answer in answers if answer.data_rows is not None), None)
        for index, answer in enumerate(answers):
            answer.teacher, answer.data_rows = index, rows  # of the examples, whichever teacher knows them
        return answers

    def cast(self, value: Any) -> Any:
        """The unchanged value: each teacher has a precision of its own."""
        return value

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """A batch as the user's code knows it, and the answers that came with it, if any."""
        return (batch, None) if self._cached is None else self._cached.unpack(batch)

    def clear(self) -> None:
        """Release everything recorded."""
        for source in self.sources:
            source.clear()

    def modules(self) -> Iterator[nn.Module]:
        """The networks."""
        for source in self.sources:
            yield from source.modules()
