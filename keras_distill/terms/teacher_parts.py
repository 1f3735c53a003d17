"""The parts of a term on layers that read each of several teachers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from distill_core.checks import about_teacher
from keras_distill import checks
from keras_distill.recording import Call, Tap, find_layer
from keras_distill.terms.base import DistillationTerm
from keras_distill.terms.counting import CountingTerm
from keras_distill.terms.levels import Pair


class TeacherParts(CountingTerm):
    """Base of the terms on layers: with several teachers each has its taps and, if features differ, its adapters."""

    one_teacher = False  # whether the term, not its loss, takes numbers from the layers of its only teacher
    needs_network = False  # whether the term calls the teacher's layers
    adapters_per_teacher = False  # whether each teacher has adapters of its own, also if the features do not differ
    _find_in_teacher: Callable[[Any], tuple[str, keras.layers.Layer]] | None = None
    _further: list[Any]  # the parts for teachers after the first
    _adapters: list[Any]
    _learned: list[Any]
    _built_for: list[Any]
    _images: list[Any]

    @property
    def reads_layers(self) -> bool:
        """Whether the term takes numbers from the layers of its only teacher."""
        return self.one_teacher or self.requires.reads_teacher

    @property
    def own_parts(self) -> list[Any]:
        """The parts for further teachers that have adapters of their own, because the teachers' features differ."""
        return [part for part in self._further if part._built_for is not self._built_for]

    def in_teachers(self, teachers: Sequence[keras.Model | None]) -> None:
        """Let the taps name the layers by their paths in each teacher, as in :class:`DistillationTerm`.

        Raises:
            ValueError: If a tap does not name one layer of a teacher, the adapters were made for other teachers, or
                there are several and the term takes numbers from a teacher's layers.
        """
        if len(teachers) > 1 and self.reads_layers:
            expected = f"one teacher for term {self.name!r}, which takes numbers from the teacher's layers"
            raise ValueError(checks.message(expected, f"{len(teachers)}", "Use another loss, or one teacher."))
        further = list(teachers[1:]) if self.needs_teacher else []
        if teachers and self.own_parts and len(further) != len(self._further):
            expected = f"{len(self._further) + 1} teachers, for each of which term {self.name!r} has adapters"
            raise ValueError(checks.message(expected, f"{len(teachers)}", "Make a new DistillModel."))
        taps = [self._taps_in(teacher) for teacher in (*teachers[:1], *further)]
        super().in_teachers(teachers)
        if not self.own_parts:
            self._further = [self._part(self) for _ in further]
        for part, part_taps in zip(self._further, taps[1:], strict=False):
            part.teacher_taps = part_taps
        # a function: Keras would track a model in an attribute
        first = teachers[0] if teachers else None
        self._find_in_teacher = None if first is None else functools.partial(find_layer, first, who="teacher")
        if teachers and self._learned:
            self._read_teacher()

    def for_teacher(self, number: int) -> DistillationTerm:
        """The part of the term that reads one of several teachers."""
        part: DistillationTerm = self._further[number - 1] if number and self._further else self
        return part

    def parts(self) -> list[tuple[str, DistillationTerm]]:
        """The term and its parts for further teachers, each with a prefix for what it owns."""
        return [("part", self), *((f"teacher{index}", part) for index, part in enumerate(self._further, start=1))]

    def build_for(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the adapters, for each teacher its own if the teachers' features differ."""
        with about_teacher(0, len(teachers)):
            self.build_from_calls(student, teachers[0])
        pairs = list(zip(self._further, teachers[1:], strict=False))  # stored outputs are those of one teacher
        own = bool(pairs) and (self.requires.keeps_teacher or self.adapters_per_teacher)
        own = own or any(part._features(student, call) != self._features(student, teachers[0]) for part, call in pairs)
        self._further = [self._part(part) for part in self._further]
        for number, (part, call) in enumerate(zip(self._further, teachers[1:], strict=False), start=1):
            with about_teacher(number, len(teachers)):
                if own:
                    part._adapters, part._built_for, part._images = [], [], []  # not those of the first teacher
                    part.build_from_calls(student, call)
                else:
                    part.check_calls(student, call)

    def _part(self, reads: TeacherParts) -> TeacherParts:
        """A part with this term's adapters that reads the places of another part."""
        part: TeacherParts = object.__new__(type(self))
        part.__dict__.update({**vars(self), "_further": [], "teacher_taps": reads.teacher_taps})
        return part

    def _features(self, student: Call, teacher: Call) -> list[Any]:
        """The shapes and layouts that decide whether two teachers can share adapters."""
        raise NotImplementedError

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of taps that are compared, the student's and the teacher's."""
        return list(zip(self.student_taps, self.teacher_taps, strict=True))

    def _read_teacher(self) -> None:
        """Let the copies of a loss take numbers from the teacher's layers."""
        if self.requires.reads_teacher:
            for loss, (_, tap) in zip(self._learned, self.pairs, strict=True):
                loss.read_teacher(functools.partial(self._teacher_layer, tap))

    def _teacher_layer(self, tap: Tap, name: str | None) -> keras.layers.Layer:
        """The teacher's layer of a name; None is the tapped layer."""
        if self._find_in_teacher is None:
            expected = f"`teacher` to be a model for term {self.name!r}, whose loss takes numbers from its layers"
            remedy = "Pass the model, or the numbers to the loss."
            raise ValueError(checks.message(expected, f"no teacher, and {self.loss!r}", remedy))
        return self._find_in_teacher(tap.layer if name is None else name)[1]
