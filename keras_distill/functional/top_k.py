"""Losses on a cache that holds only the likeliest classes of each row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from keras import ops

from keras_distill import backends, checks
from keras_distill.functional.inputs import prepare
from keras_distill.functional.primitives import LEAST_SCORE, bounded


class TopK(NamedTuple):
    """The k likeliest classes of each row, in the teacher's part of ``DistillTargets``.

    Attributes:
        indices: Their indices, the most likely first, int32, shape ``(N, ..., k)``.
        logs: Their log-probabilities in nats, shape ``(N, ..., k)``.
        tail: The log-probability of all other classes together, shape ``(N, ..., 1)``.
        classes: An empty tensor ``(N, 0, C)``. Its static shape holds C, the number of all classes, also after batching
            and tracing, so that C can be checked before the first step.
    """

    indices: Any
    logs: Any
    tail: Any
    classes: Any


class Sampled(TopK):
    """Classes drawn at random from each row, with probabilities whose mean over the draws is the teacher's.

    All other classes have probability 0: ``tail`` is a large negative number.
    """

    __slots__ = ()


def merge_classes(student_logits: Any, teacher: TopK, temperature: Any) -> tuple[Any, Any]:
    r"""Logits over k + 1 outcomes: the teacher's k likeliest classes, and all others together.

    .. math:: z_i, \quad i \le k; \qquad z_{k+1} = T \log \sum_{i > k} \exp(z_i / T)

    A divergence of the two results at that temperature is the divergence of the merged distributions. Only the sum of
    the teacher's other classes is known: at another temperature than 1 they are taken to be equally likely.

    Args:
        student_logits: Logits of the student, shape ``(N, ..., C)``.
        teacher: The teacher's likeliest classes for the same rows.
        temperature: Softening at which the divergence will be taken, greater than 0.

    Returns:
        The student's and the teacher's logits, both ``(N, ..., k + 1)``.

    Raises:
        ValueError: If the numbers of classes or the rows differ.

    Example:
        >>> known = ops.log(ops.array([[0.5]]))
        >>> teacher = TopK(ops.array([[2]]), known, known, classes=ops.zeros((1, 0, 3)))
        >>> student, _ = merge_classes(ops.log(ops.array([[0.1, 0.3, 0.6]])), teacher, temperature=1.0)
        >>> ops.convert_to_numpy(ops.exp(student)).round(3)
        array([[0.6, 0.4]], dtype=float32)
    """
    check_classes(student_logits, teacher)
    backends.check_batch(student_logits, teacher.indices)
    logits, logs = prepare(student_logits, teacher.logs, ("student_logits", "teacher_logits"))
    tail = ops.cast(teacher.tail, logits.dtype)
    temperature = ops.cast(temperature, logits.dtype)
    # summed over the other classes: 1 minus the sum of the k would lose all digits if the student is confident
    logits = bounded(logits)  # the gradient would be NaN if all other classes were impossible
    hidden = ops.where(_chosen(logits, teacher.indices), ops.cast(LEAST_SCORE, logits.dtype), logits)
    others = temperature * ops.logsumexp(hidden / temperature, axis=-1, keepdims=True)
    student = ops.concatenate([ops.take_along_axis(logits, teacher.indices, axis=-1), others], axis=-1)
    number = math.log(teacher.classes.shape[-1] - teacher.indices.shape[-1])
    teacher_merged = ops.concatenate([logs / temperature, (tail - number) / temperature + number], axis=-1)
    return student, temperature * teacher_merged


def check_classes(student_logits: Any, teacher: TopK) -> None:
    """Check that a student's logits have the rows and the number of classes of a teacher's.

    Args:
        student_logits: Logits of the student, or a specification of them.
        teacher: The teacher's likeliest classes.

    Raises:
        ValueError: If they do not.
    """
    shape = (*teacher.indices.shape[:-1], teacher.classes.shape[-1])
    if checks.shapes_differ(student_logits.shape, shape):
        expected = f"`student_logits` to have the teacher's shape {shape}"
        remedy = "The cache comes from another teacher or other data."
        raise ValueError(checks.message(expected, f"{tuple(student_logits.shape)}", remedy))


def best_scores(teacher: TopK) -> Any:
    """Scores ``(N, ..., C)`` that are 1 for the teacher's likeliest class and 0 for all others."""
    return ops.one_hot(teacher.indices[..., 0], teacher.classes.shape[-1])


def _chosen(logits: Any, indices: Any) -> Any:
    """True at the classes among the indices, in the shape of the logits."""
    flat, picked = ops.reshape(logits, (-1, logits.shape[-1])), ops.reshape(indices, (-1, indices.shape[-1]))
    picked = ops.cast(picked, "int32")
    rows = ops.expand_dims(ops.arange(ops.shape(picked)[0], dtype="int32"), -1)
    places = ops.reshape(ops.stack([ops.broadcast_to(rows, ops.shape(picked)), picked], axis=-1), (-1, 2))
    unchosen = ops.zeros_like(flat, dtype="bool")
    chosen = ops.scatter_update(unchosen, places, ops.ones_like(places[:, 0], dtype="bool"))
    return ops.reshape(chosen, ops.shape(logits))
