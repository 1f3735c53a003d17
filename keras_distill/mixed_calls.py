"""Calls that stand for the calls of several teachers, as one term reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import logarithm
from keras_distill.functional.mixtures import confidence_weights, mean_logits, mixture_logits
from keras_distill.mixing import TeacherMix
from keras_distill.recording import Call, Tap, select
from keras_distill.terms import DistillationTerm, LogitsDistillation
from keras_distill.terms.weighing import expanded, zeroed


def combined(term: DistillationTerm, calls: Sequence[Call], join: Callable[[list[Any]], Any]) -> Call:
    """One call whose tensors, as far as a term reads them, are made of those of several calls.

    Args:
        term: The term.
        calls: The teachers' calls.
        join: Makes one tensor from the tensors of all teachers, which have equal shapes.

    Returns:
        The call.

    Raises:
        ValueError: If the teachers' tensors differ in shape.
    """
    masks: dict[int, Any] = {}

    def joined(*tensors: Any) -> Any:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if any(checks.shapes_differ(shapes[0], shape) for shape in shapes):
            expected = "all teachers to score the same classes"
            remedy = "Use mix='losses', or teachers of the same classes."
            raise ValueError(checks.message(expected, f"outputs of shapes {shapes}", remedy))
        result = join(list(tensors))
        known = [call.mask_of(tensor) for call, tensor in zip(calls, tensors, strict=True)]
        if any(mask is not None for mask in known):
            masks[id(result)] = ops.all(ops.stack([mask for mask in known if mask is not None]), axis=0)
        return result

    output: Any = None
    if isinstance(term, LogitsDistillation):
        outputs, key = [call.output for call in calls], term.output_key
        if key is not None:
            output = {key: joined(*(select(each, key, "the teacher's output") for each in outputs))}
        else:
            _check_structures(outputs)
            output = keras.tree.map_structure(joined, *outputs)
    parts = [term.for_teacher(number) for number in range(len(calls))]
    features = {}
    each_teacher = [_levels(part, call) for part, call in zip(parts, calls, strict=True)]
    for levels in zip(*each_teacher, strict=True):
        features[levels[0].key] = joined(*(call.feature(level) for level, call in zip(levels, calls, strict=True)))
    return Call(
        output,
        features=features,
        who="teacher",
        training=calls[0].training,
        declared=all(call.declared for call in calls),
        masks=masks,
        inputs=calls[0].inputs,
    )


def mixed(term: LogitsDistillation, student: Call, calls: Sequence[Call], mix: TeacherMix) -> Call:
    """The call of ``mix="probabilities"`` and ``mix="logits"``.

    Args:
        term: A term on logits.
        student: The student's call.
        calls: The teachers' calls.
        mix: The settings.

    Returns:
        The call.
    """
    loss = term.loss_of(student)
    temperature = ops.convert_to_tensor(getattr(loss, "temperature", 1.0))
    from_logits = getattr(loss, "from_logits", True)

    def join(outputs: list[Any]) -> Any:
        logits = outputs if from_logits else [logarithm(output) for output in outputs]
        weights = confidence_weights(logits) if mix.by_entropy else mix.shares(len(calls))
        if mix.mix == "logits":
            return mean_logits(logits, weights)
        mixture = mixture_logits(logits, weights, temperature=temperature)
        return mixture if from_logits else ops.softmax(mixture, axis=-1)

    return combined(term, calls, join)


def routed(term: DistillationTerm, calls: Sequence[Call], teacher_of: Any) -> Call:
    """The call in which each example has the tensors of its own teacher.

    Args:
        term: The term.
        calls: The teachers' calls.
        teacher_of: The teacher of each example, integers ``(N,)``.

    Returns:
        The call; a row that no teacher has is NaN.
    """

    def join(tensors: list[Any]) -> Any:
        chosen = ops.full_like(tensors[0], float("nan"))
        for number, tensor in enumerate(tensors):
            rows = expanded(teacher_of == number, len(tensor.shape))
            chosen = ops.where(rows, ops.cast(tensor, chosen.dtype), chosen)
        return chosen

    return combined(term, calls, join)


def rows_of(call: Call, term: DistillationTerm, rows: Any) -> Call:
    """The call with zeros in the features of all other rows, whose loss does not count.

    Args:
        call: A teacher's call.
        term: The part of a term that reads it.
        rows: True for the rows of this teacher, ``(N,)``.

    Returns:
        The call.
    """
    taps = _levels(term, call)
    features = {tap.key: zeroed(call.feature(tap), rows) for tap in taps}
    masks = {id(features[tap.key]): call.mask_of(call.feature(tap)) for tap in taps}
    masks = {key: mask for key, mask in masks.items() if mask is not None}
    return replace(call, features=features, masks=masks)


def weights_by_confidence(
    term: LogitsDistillation, student: Call, calls: Sequence[Call], sample_weight: Any
) -> list[Any]:
    """For each teacher the weights of the examples: the batch's, times the teacher's confidence in the example.

    Args:
        term: A term on logits.
        student: The student's call.
        calls: The teachers' calls.
        sample_weight: The batch's sample weights, or None.

    Returns:
        One entry for each teacher: a tensor, or a list of one for each of several outputs.
    """
    from_logits = getattr(term.loss, "from_logits", True)
    pairs = [term.paired(student, call, sample_weight) for call in calls]
    by_output = []
    for outputs in zip(*pairs, strict=True):
        logits = [other if from_logits else logarithm(other) for _, other, _ in outputs]
        factors = ops.unstack(confidence_weights(logits), len(calls))
        by_output.append([times(outputs[0][2], factor) for factor in factors])
    per_teacher = [list(weights) for weights in zip(*by_output, strict=True)]
    return [weights[0] if len(weights) == 1 else weights for weights in per_teacher]


def times(sample_weight: Any, factor: Any) -> Any:
    """Sample weights times a factor of each example or position.

    Args:
        sample_weight: Shape ``(N,)``, ``(N, 1)`` or that of the positions, or None.
        factor: Shape ``(N,)``, or that of the positions.

    Returns:
        The product.
    """
    if sample_weight is None:
        return factor
    weights = ops.cast(sample_weight, factor.dtype)
    while len(weights.shape) > len(factor.shape) and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    rank = max(len(weights.shape), len(factor.shape))
    return expanded(weights, rank) * expanded(factor, rank)


def _levels(term: DistillationTerm, call: Call) -> list[Tap]:
    """The places of a teacher that a term reads, with one for each level of a pyramid."""
    return [level for tap in term.teacher_taps for level in call.levels(tap)]


def _check_structures(outputs: Sequence[Any]) -> None:
    try:
        for other in outputs[1:]:
            keras.tree.assert_same_structure(outputs[0], other)
    except ValueError as error:
        expected = "all teachers to return the same outputs"
        remedy = "Pass LogitsDistillation(output=...), or mix='losses'."
        raise ValueError(checks.message(expected, "outputs of different structures", remedy)) from error
