"""Checks before the first step: the terms, the tapped layers, the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_distill.recording.student import StudentFinder
from lightning_distill.teachers.source import LiveTeachers, TeacherSource
from lightning_distill.terms import DistillationTerm
from lightning_distill.terms.mixing import TeacherMix


def check_step(
    terms: Sequence[DistillationTerm], student: StudentFinder, source: TeacherSource, mix: TeacherMix
) -> None:
    """Raise if a tapped layer does not exist, or the teacher does not have what the terms read.

    Args:
        terms: The terms.
        student: Finds the student.
        source: The teacher.
        mix: How the answers of several teachers become the value of a term.

    Raises:
        ValueError: With the closest layer names.
    """
    taps: dict[str, list[tuple[str, Any]]] = {}
    for side, kind in (("student", "recorded_taps"), ("teacher", "teacher_taps")):
        taps[side] = [
            (f"terms[{index}].{side}_layer", tap) for index, term in enumerate(terms) for tap in getattr(term, kind)
        ]
    readers = [term for term in terms if term.needs_teacher]
    reader = next((term.name for term in readers), None)
    output_reader = next((term.name for term in readers if not term.teacher_taps), None)
    skipping = [term.name for term in terms if term.skips_heads]
    if len(skipping) > 1:
        raise ValueError(f"Expected one term to skip the heads, but got {skipping}. Use one FusedLinearDistillation.")
    if skipping and not isinstance(source, LiveTeachers):
        raise ValueError(
            f"Expected `teacher` to be a network for term {skipping[0]!r}, which reads what goes into its head, but"
            " it is not. Use SequenceDistillation."
        )
    bound = next((term.name for term in terms if term.needs_network), None)
    if bound is not None and source.stored:
        raise ValueError(
            f"Expected `teacher` to be a network for term {bound!r}, which reads what a cache does not hold, but"
            " got a cache. Pass the network. For layers build the cache with layers=[...], for FeatureDistillation."
        )
    mix.check_terms(terms)
    source.check(taps["teacher"], reader, output_reader)
    source.check_student(student.root)
    student.check(taps["student"])
