"""Terms: losses at places in the two models, each with a weight and possibly an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_distill import checks
from keras_distill.terms.base import DistillationTerm
from keras_distill.terms.cross_head import CrossHeadDistillation
from keras_distill.terms.features import FeatureDistillation
from keras_distill.terms.logits import LogitsDistillation
from keras_distill.terms.loss_term import LossTerm
from keras_distill.terms.reused_classifier import ReusedClassifierDistillation
from keras_distill.terms.review import ReviewDistillation
from keras_distill.terms.state import TermState
from keras_distill.terms.tokens import SequenceDistillation
from keras_distill.terms.weighing import weigh
from keras_distill.terms.within import SelfDistillation

__all__ = [
    "CrossHeadDistillation",
    "DistillationTerm",
    "FeatureDistillation",
    "LogitsDistillation",
    "LossTerm",
    "ReusedClassifierDistillation",
    "ReviewDistillation",
    "SelfDistillation",
    "SequenceDistillation",
    "TermState",
    "as_terms",
    "weigh",
]


def as_terms(terms: DistillationTerm | Sequence[DistillationTerm] | None) -> list[DistillationTerm]:
    """Check the terms and put them into a list.

    Args:
        terms: One term, several, or ``None`` for ``LogitsDistillation()``.

    Returns:
        At least one term, with distinct names.

    Raises:
        TypeError: If an entry is not a term.
        ValueError: If the list is empty, or two terms share a name.

    Example:
        >>> [term.name for term in as_terms(None)]
        ['logits']
    """
    several: Any = [LogitsDistillation()] if terms is None else terms
    listed = [*several] if isinstance(several, (list, tuple)) else [several]
    if not listed:
        raise ValueError(checks.message("`terms` to hold at least one term", "terms=[]", "Pass None for logits alone."))
    for index, term in enumerate(listed):
        if not isinstance(term, DistillationTerm):
            raise TypeError(_not_a_term(index, term))
    names = [term.name for term in listed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(checks.message("`terms` to have distinct names", f"{twice!r} twice", "Pass name=... to one."))
    return listed


def _not_a_term(index: int, term: Any) -> str:
    remedy = "Wrap a loss: LogitsDistillation(loss) or FeatureDistillation(layer, layer, loss)."
    kind, received = type(term), f"a {type(term).__name__}"
    if kind.__module__.startswith("keras.src.distillation"):
        received = f"a keras.distillation.{kind.__name__}"
        remedy = f"Use keras_distill.{kind.__name__}, whose settings differ: see docs/losses.md."
    return checks.message(f"`terms[{index}]` to be a term", received, remedy)
