"""Formulas on the logits of two models with vocabularies of their own: student first, one value per row of logits."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_logits, prepare_temperature

__all__ = ["universal_logit"]


def universal_logit(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Wasserstein distance of two models' probabilities that do not share their classes.

    .. math:: \sum_i |p^s_{(i)} - p^t_{(i)}|, \qquad p = \mathrm{softmax}(z / T)

    Here :math:`p_{(i)}` is the i-th largest probability, and 0 beyond the last class. It compares how certain the two
    models are and how they spread the rest, not which class is likely. It needs no mapping between two vocabularies.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape but for the number of classes.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Distance from 0 to 2, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ in more than the number of classes, there are fewer than two classes, or the
            temperature is not greater than 0.

    Example:
        >>> round(float(universal_logit([[2.0, 0.0, 1.0]], [[0.0, 4.0, 1.0, 1.0]])[0]), 4)
        0.4914

    References:
        Boizard et al. 2024 (ULD), arXiv:2402.12030: the distance in closed form, where every move costs
        the same. It has no factor :math:`T^2`.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits, same_classes=False)
    temperature = prepare_temperature(temperature, student)
    student, teacher = (_sorted(ops.softmax(logits / temperature, axis=-1)) for logits in (student, teacher))
    if student.shape[-1] is None or teacher.shape[-1] is None:
        expected = "the number of classes of both models to be known"
        got = f"shapes {tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(checks.message(expected, got, "Give the last dimension of the logits a fixed size."))
    more = teacher.shape[-1] - student.shape[-1]
    student, teacher = _padded(student, max(more, 0)), _padded(teacher, max(-more, 0))
    return ops.sum(ops.abs(student - teacher), axis=-1)


def _sorted(probabilities: Any) -> Any:
    return -ops.sort(-probabilities, axis=-1)


def _padded(probabilities: Any, zeros: int) -> Any:
    return ops.pad(probabilities, [(0, 0)] * (len(probabilities.shape) - 1) + [(0, zeros)]) if zeros else probabilities
