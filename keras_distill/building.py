"""Making the adapters of a step's terms, and checking its models against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_distill import compat
from keras_distill.ensemble import Ensemble
from keras_distill.recording import Call, Recorder, probed
from keras_distill.teachers import EMATeacher, LiveTeacher, chosen_inputs
from keras_distill.terms import DistillationTerm


class BuildsTerms:
    """Base of :class:`keras_distill.DistillStep`: it makes the adapters.

    Attributes:
        student: The student.
        terms: The step's own terms.
        recorder: Records the student.
        ensemble: The teachers.
        averages: The teachers that are moving averages of the student.
        behind: The layers behind the student's taps, by the key of the tap.
    """

    student: keras.Model
    terms: list[DistillationTerm]
    recorder: Recorder
    ensemble: Ensemble
    averages: list[EMATeacher]
    behind: dict[str, Any]

    @property
    def teachers(self) -> list[LiveTeacher]:
        """The teachers with their recorders."""
        return self.ensemble.live

    def build(self, inputs: Any, teacher: Call | None = None) -> None:
        """Check the models against the terms, and make the adapters.

        Args:
            inputs: A batch's inputs or their specifications.
            teacher: The teacher's call, if its outputs are known already.

        Raises:
            ValueError: If layers, layouts, shapes or outputs do not fit the terms.
        """
        knows_teacher = self.ensemble.can_answer(teacher)
        waiting = [term for term in self.terms if not term.built and (knows_teacher or not term.needs_teacher)]
        if not waiting:
            return
        student = probed(self.recorder, chosen_inputs(self.student, inputs))
        reads_teacher = any(term.needs_teacher for term in waiting)
        self._build_terms(waiting, student, self.ensemble.probe(inputs, teacher) if reads_teacher else [student])
        for average in self.averages:
            average.build()

    def build_from_models(self) -> None:
        """Build at once if student and teachers know their inputs, so that errors are raised by the constructor."""
        inputs = self.ensemble.joint_inputs(compat.input_structure(self.student))
        if inputs is not None:
            self.build(inputs)

    def build_from_config(self, configs: Mapping[str, Any]) -> None:
        """Make the adapters of a saved model.

        Args:
            configs: The result of each term's ``get_shapes``, by the name of the term.
        """
        for term in self.terms:
            if not term.built and term.name in configs:
                if configs[term.name] is not None:
                    term.build_from_shapes(configs[term.name])
                self._adopt(term)
        for average in self.averages:
            average.build()

    def _check_teacher(self) -> None:
        """Check that a new teacher fits the adapters, if both models know their inputs.

        Raises:
            ValueError: If it does not.
        """
        built = [term for term in self.terms if term.built and term.needs_teacher]
        inputs = compat.input_structure(self.student)
        joint = self.ensemble.joint_inputs(inputs) if built and self.teachers and self.ensemble.hook is None else None
        if joint is not None:
            student, calls = probed(self.recorder, inputs), self.ensemble.probe(joint)
            for term in built:
                for number, call in zip(self.ensemble.numbers, calls, strict=True):
                    term.for_teacher(number).check_calls(student, call)

    def _build_terms(self, terms: Sequence[DistillationTerm], student: Call, teachers: Sequence[Call]) -> None:
        for term in terms:
            term.build_for(student, teachers if term.needs_teacher else [student])
            self._adopt(term)
            for tap in term.trained_taps:
                behind = [student.facts_of(student.feature(level)).behind for level in student.levels(tap)]
                self.behind[tap.key] = None if None in behind else [each for layers in behind for each in layers or ()]

    def _adopt(self, term: DistillationTerm) -> None:
        term.built = True
        if term.state is not None:
            term.state.adopt()
