"""Formulas on factors of features: student first, channels last, one value per example."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_equal
from keras_distill.functional.vectors import flattened, unit

__all__ = ["factor_transfer"]


def factor_transfer(student: Any, teacher: Any, *, power: float = 1.0) -> Any:
    r"""Mean power of the differences between two factors of length one.

    .. math:: \frac{1}{D} \sum_d \left| \frac{f^s_d}{\|f^s\|_2} - \frac{f^t_d}{\|f^t\|_2} \right|^p

    A factor is a learned summary of a feature: the translator makes the student's, the paraphraser the teacher's. The
    length of a factor does not matter, only its direction. A factor of zeros stays zero.

    Args:
        student: The student's factor, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's factor, same shape.
        power: The exponent p of the differences, at least 1.

    Returns:
        Mean power of the differences, shape ``(N,)``.

    Raises:
        TypeError: If a factor is not a floating point tensor, or ``power`` is not a number.
        ValueError: If the shapes differ or ``power`` is less than 1.

    Example:
        >>> round(float(factor_transfer([[3.0, 4.0]], [[2.0, 0.0]])[0]), 4)
        0.6

    References:
        Kim et al. 2018, equation 2, arXiv:1802.04977; deviation: the mean instead of the sum, as in the authors' code,
        whose weight is 500.
    """
    checks.at_least("power", power, 1)
    student, teacher = prepare_equal(student, teacher)
    if len(student.shape) < 2:
        raise ValueError(checks.message("factors to have an inner dimension", f"shape {tuple(student.shape)}"))
    student, teacher = (unit(flattened(factor, 1), -1) for factor in (student, teacher))
    return ops.mean(ops.power(ops.abs(student - teacher), power), axis=-1)
