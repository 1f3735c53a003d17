"""What the terms find between student and teacher in one step, without the work of those that rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_distill import backends
from keras_distill.metrics import agreement
from keras_distill.pairs import comparable_outputs
from keras_distill.taps import Call
from keras_distill.term import DistillationTerm
from keras_distill.terms import LogitsDistillation


class Comparison(NamedTuple):
    """Scalars of one step.

    Args:
        total: The weighted sum of the values.
        values: Of each term, without its weight; 0 for one that rests.
        computed: Of each term, 1 where its value was computed and 0 where it rests.
        agreement: Share of the rows where student and teacher choose the same class.
        rows: Number of those rows; None where no outputs can be compared.
    """

    total: Any
    values: list[Any]
    computed: list[Any]
    agreement: Any
    rows: Any


def compare(
    terms: Sequence[DistillationTerm],
    student: Call,
    ask_teacher: Callable[[], Call],
    labels: Any,
    sample_weight: Any,
    *,
    training: bool,
) -> Comparison:
    """The terms' values and how often the two models agree.

    In training a term whose weight is 0 is left out (see :attr:`DistillationTerm.may_rest`), and the teacher with it if
    no term is left; evaluation measures all of them.

    Args:
        terms: At least one.
        student: The student's call.
        ask_teacher: Gives the teacher's call.
        labels: The batch's labels.
        sample_weight: The batch's weights.
        training: Whether this is a step of training.

    Returns:
        The comparison.
    """
    weights = [ops.convert_to_tensor(term.weight) for term in terms]
    # a branch of a graph cannot make the variables of a term that is yet to be built
    may_rest = [training and term.built and term.may_rest for term in terms]
    outputs = keras.tree.flatten(student.output)
    trained = [variable for term in terms for variable in term.trainable_variables]
    # that of the compiled loss, to which the total is added: TensorFlow adds no float32 to a float64
    dtype = keras.backend.result_type(keras.config.floatx(), "float32")
    zero = backends.zero_of([*outputs, *trained] if any(may_rest) else [], dtype)
    comparable = True  # where the teacher rests in an eager step nobody knows

    def work() -> tuple[list[Any], list[Any]]:
        nonlocal comparable
        teacher = ask_teacher()
        values = []
        for term, weight, rests in zip(terms, weights, may_rest, strict=True):
            if not term.built:
                term.build_from_calls(student, teacher)
            weighting = sample_weight if term.use_sample_weight else None
            value = functools.partial(term.compute, student, teacher, labels=labels, sample_weight=weighting)
            values.append(backends.unless_zero([weight], value, zero) if rests else ops.cast(value(), dtype))
        pairs = _agreements(terms, student, teacher)
        comparable = bool(pairs)
        rows = sum((ops.cast(rows, dtype) for _, rows in pairs), zero)
        agreeing = sum((ops.cast(share * rows, dtype) for share, rows in pairs), zero)
        return values, [agreeing / ops.maximum(rows, 1), rows]

    if all(may_rest):
        values, (share, rows) = backends.unless_zero(weights, work, ([zero] * len(terms), [zero, zero]))
    else:
        values, (share, rows) = work()
    computed = [
        ops.cast(ops.not_equal(weight, 0), "float32") if rests else 1.0
        for weight, rests in zip(weights, may_rest, strict=True)
    ]
    total = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return Comparison(total, values, computed, share, rows if comparable else None)


def _agreements(terms: Sequence[DistillationTerm], student: Call, teacher: Call) -> list[tuple[Any, Any]]:
    output = next((term.output_key for term in terms if isinstance(term, LogitsDistillation)), None)
    pairs = comparable_outputs(student, teacher, output)
    return [agreement(mine, theirs, backends.mask_of(mine)) for mine, theirs in pairs]
