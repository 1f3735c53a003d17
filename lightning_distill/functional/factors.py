"""Formulas on factors of features and on features with margins: student first, one value per example."""

from __future__ import annotations

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction
from lightning_distill.functional.primitives import unit
from lightning_distill.functional.vectors import (
    channels_at,
    mean_of_counted,
    over_examples,
    per_example,
    prepare_equal,
)

__all__ = ["factor_transfer"]


def factor_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Mean power of the differences between two factors of length one.

    .. math:: \frac{1}{D} \sum_d \left| \frac{f^s_d}{\|f^s\|_2} - \frac{f^t_d}{\|f^t\|_2} \right|^p

    A factor is a learned summary of a feature: the translator makes the student's, the paraphraser the teacher's. The
    length of a factor does not matter, only its direction. A factor of zeros stays zero.

    Args:
        student: The student's factor, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's factor, same shape.
        power: The exponent p of the differences, at least 1.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Mean power of the differences, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a factor is not a floating point tensor, or ``power`` is not a number.
        ValueError: If the shapes differ or ``power`` is less than 1.

    Example:
        >>> import torch
        >>> factor_transfer(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([0.6000])

    References:
        Kim et al. 2018, equation 2, arXiv:1802.04977; deviation: the mean instead of the sum, as in the authors' code,
        whose weight is 500.
    """
    checks.at_least("power", power, 1)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    if student.ndim < 2:
        raise ValueError(checks.message("factors to have an inner dimension", f"shape {tuple(student.shape)}"))
    student, teacher = (unit(factor.flatten(1), dim=1).view_as(student) for factor in (student, teacher))
    values = (student - teacher).abs().pow(power)
    if positions is None or positions.ndim == 1:
        values = per_example(values)
    else:
        values = mean_of_counted(values.mean(dim=channels_at(values)), positions)
    return over_examples(values, positions, reduction)
