"""The agreement of student and teacher: how often they choose the same class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_distill.metrics import agreement
from keras_distill.recording import Call
from keras_distill.terms import DistillationTerm, LogitsDistillation
from keras_distill.terms.logits import Scores


def agreement_of(terms: Sequence[DistillationTerm], student: Call, calls: Sequence[Call]) -> tuple[Any, Any]:
    """Share of the rows in which student and teacher choose the same class, from the first term on class scores.

    Args:
        terms: The terms.
        student: The student's call.
        calls: The teachers' calls, at least one.

    Returns:
        The share and the number of rows; None for both if no term compares class scores.
    """
    for term in terms:
        if not isinstance(term, LogitsDistillation):
            continue
        scores = [term.scores(student, call) for call in calls]
        if scores and scores[0]:
            pairs = [
                agreement(pair[0].student, _mean_scores(pair), pair[0].mask, threshold=pair[0].threshold)
                for pair in zip(*scores, strict=True)
            ]
            rows = sum(rows for _, rows in pairs)
            return sum(share * rows for share, rows in pairs) / ops.maximum(rows, 1), rows
    return None, None


def _mean_scores(scores: Sequence[Scores]) -> Any:
    """The teacher's scores, or the mean probabilities of several teachers; for single scores their mean."""
    if len(scores) == 1:
        return scores[0].teacher
    single = scores[0].teacher.shape[-1] == 1
    values = [score.teacher if single else ops.softmax(ops.cast(score.teacher, "float32")) for score in scores]
    return sum(values) / len(values)
