"""The metrics of the teacher that a model measures, and the class scores that they compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_distill import checks
from keras_distill.functional.mixtures import confidence_weights, mixture_logits
from keras_distill.metrics import TeacherAgreement, TeacherMetric
from keras_distill.terms import DistillationTerm, LogitsDistillation
from keras_distill.terms.logits import Scores


class StepLosses(NamedTuple):
    """Losses of one step.

    Attributes:
        total: The weighted sum of the values.
        values: The value of each computed term, without its weight, by the name of the term.
        scores: The two models' class scores, or None if they were not asked for or the teacher did not run.
    """

    total: Any
    values: dict[str, Any]
    scores: list[Scores] | None = None


def chosen_metrics(metrics: Any, terms: Sequence[DistillationTerm], parts: Iterable[str]) -> list[TeacherMetric]:
    """The metrics that a model measures.

    Args:
        metrics: A metric, several, or None for the agreement if a term compares class scores.
        terms: The terms.
        parts: Names of the parts of the loss, which the logs hold with ``_loss``.

    Returns:
        The metrics.

    Raises:
        TypeError: If one of them is not a :class:`TeacherMetric`.
        ValueError: If no term compares class scores, or two parts of the logs share a name.
    """
    compares = any(isinstance(term, LogitsDistillation) and term.scores_classes for term in terms)
    if metrics is None:
        return [TeacherAgreement()] if compares else []
    several = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    names = {"loss", *(f"{part}_loss" for part in parts)}
    for index, metric in enumerate(several):
        place = f"`teacher_metrics[{index}]`"
        if not isinstance(metric, TeacherMetric):
            expected = f"{place} to be a TeacherMetric, such as TeacherDivergence()"
            raise TypeError(checks.message(expected, f"{metric!r}", "Pass metrics of the labels to `compile`."))
        if metric.name in names:
            expected = f"{place} to have a name that the logs do not hold yet"
            raise ValueError(checks.message(expected, f"name={metric.name!r}", "Pass name=... to it."))
        names.add(metric.name)
    if several and not compares:
        expected = "a term that compares class scores, for `teacher_metrics`"
        remedy = "Add LogitsDistillation(weight=0.0), which only measures."
        raise ValueError(checks.message(expected, f"the terms {[term.name for term in terms]}", remedy))
    return several


def refuse_compiled(metrics: Iterable[Any]) -> None:
    """Refuse metrics of the teacher in ``compile``, where Keras would call them with the labels.

    Args:
        metrics: The metrics passed to ``compile``.

    Raises:
        ValueError: If one of them is a :class:`TeacherMetric`.
    """
    for metric in metrics:
        if isinstance(metric, TeacherMetric):
            name = type(metric).__name__
            expected = "`metrics` of `compile` to compare the student with the labels"
            remedy = f"Pass it to the model: DistillModel(..., teacher_metrics=[{name}(...)])."
            raise ValueError(checks.message(expected, f"{name}, which compares it with the teacher", remedy))


def mean_scores(scores: Sequence[Scores], shares: Any = None) -> Any:
    """The teacher's logits; of several teachers the logits of the weighted mean of their probabilities.

    Args:
        scores: The scores of each teacher.
        shares: The weights of the teachers ``(K,)``, which sum to 1; None weighs them by confidence.

    Returns:
        Logits, or a :class:`TopK` of a single teacher.
    """
    if len(scores) == 1:
        return scores[0].teacher
    logits = [score.teacher for score in scores]
    if len(logits[0].shape) > 1 and logits[0].shape[-1] != 1:
        return mixture_logits(logits, confidence_weights(logits) if shares is None else shares)
    pairs = [ops.stack([logit, ops.zeros_like(logit)], axis=-1) for logit in logits]  # the scores of both classes
    mixture = mixture_logits(pairs, confidence_weights(pairs) if shares is None else shares)
    return mixture[..., 0] - mixture[..., 1]
