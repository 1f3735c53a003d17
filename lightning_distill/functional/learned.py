"""Formulas with learned parts: student first, one value per example, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.primitives import or_one, precise, standardized
from lightning_distill.functional.vectors import (
    averaged,
    channels_at,
    examples_of,
    of_counted,
    over_numbers,
    positions_mask,
    without,
)

__all__ = ["log_sum_distance", "masked_generative", "variational_information"]

_REMEDY = "The learned part must return the teacher's channels at the teacher's positions."


def variational_information(
    student: Tensor,
    teacher: Tensor,
    *,
    mean: Callable[[Tensor], Tensor],
    variance: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Negative log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts.

    .. math:: \frac{1}{D} \sum_d \frac{1}{2} \left( \frac{(\mu(f^s)_d - f^t_d)^2}{\sigma_{c(d)}^2}
        + \log \sigma_{c(d)}^2 \right)

    Minimizing it raises a lower bound on the information that the two features share. Channels that the student cannot
    predict get a large variance and cost little. The constant :math:`\frac{1}{2} \log 2 \pi` is left out, so values may
    be negative.

    Args:
        student: The student's feature, shape ``(N, ..., C_s)`` or ``(N, C_s, H, W)``.
        teacher: The teacher's feature with D numbers per example, shape ``(N, ..., C)`` or ``(N, C, H, W)``.
        mean: The learned map from the student's feature to the teacher's shape.
        variance: The learned variance of each channel of the teacher, greater than 0, shape ``(C,)``.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean over the example's numbers in nats, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If ``mean`` does not have the teacher's shape, or ``variance`` not one number for each channel.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])
        >>> variational_information(student, teacher, mean=lambda feature: 2 * feature, variance=torch.tensor([1.0, 4]))
        tensor([1.5966])

    References:
        Ahn et al. 2019, equations 5 and 6, arXiv:1904.05835; deviation: the mean instead of the sum over channels and
        positions, as in published code.
    """
    student, teacher = prepare(student, teacher)
    positions = positions_mask(mask, student)
    student = without(student, positions)
    predicted = precise(mean, student)
    checks.same_shape(predicted, teacher, names=("mean(student)", "teacher"), remedy=_REMEDY)
    teacher = without(teacher, positions)
    channels = channels_at(teacher)
    if variance.shape != (teacher.shape[channels],):
        expected = f"`variance` to have one value for each of the teacher's {teacher.shape[channels]} channels"
        raise ValueError(checks.message(expected, f"shape {tuple(variance.shape)}"))
    variance = variance.view(-1, *[1] * (teacher.ndim - 2)) if channels == 1 else variance
    values = 0.5 * ((predicted - teacher).square() / variance + variance.log())
    return over_numbers(values, channels, positions, reduction)


def masked_generative(
    student: Tensor, teacher: Tensor, *, generator: Callable[[Tensor], Tensor], mask: Tensor | None = None
) -> Tensor:
    r"""Squared error of the teacher's feature as generated from the unmasked part of the student's.

    .. math:: \sum_d \left( G(m \odot f^s)_d - f^t_d \right)^2

    Each part of the student's feature must hold enough information to predict the rest. The sum makes values large: the
    paper's weights are 7e-5 and smaller.

    Args:
        student: The student's feature, shape ``(N, ..., C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature with D numbers per example, shape ``(N, ...)``.
        generator: The learned map G from the masked feature to the teacher's.
        mask: 0 where the student's feature is hidden, else 1; a shape that broadcasts to the feature's. None hides
            nothing.

    Returns:
        Sum over the example's numbers, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the generator does not return the teacher's shape.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[4.0, 3.0, 1.0]])
        >>> masked_generative(student, teacher, generator=lambda f: 3 * f, mask=torch.tensor([1.0, 0.0, 1.0]))
        tensor([10.2500])

    References:
        Yang et al. 2022, section 3, arXiv:2205.01529, which weighs the sum with alpha.
    """
    student, teacher = prepare(student, teacher)
    generated = precise(generator, student if mask is None else student * mask)
    checks.same_shape(generated, teacher, names=("generator(student)", "teacher"), remedy=_REMEDY)
    return torch.sum((generated - teacher).square().flatten(1), dim=1)


def log_sum_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    projection: Callable[[Tensor], Tensor],
    power: float = 4.0,
    eps: float = 1e-4,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of the summed powers of the differences between two batch-normalised features, one projected.

    .. math:: \log \sum_n \sum_c |\hat z^s_{nc} - \hat z^t_{nc}|^a, \qquad
        z^s_n = W \bar f^s_n, \quad z^t_n = \bar f^t_n, \quad
        \hat z_{nc} = \frac{z_{nc} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

    Features are averaged over their positions first; the mean :math:`\mu` and the variance :math:`\sigma^2` are those
    of the batch. The logarithm keeps the gradient large while the difference shrinks, and the power stresses the
    largest differences. The value may be negative. Where the features do not differ at all, as in a batch of one
    example, it is 0 without a gradient.

    Args:
        student: The student's feature, shape ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
        teacher: The teacher's feature of the same examples, such a shape too, with C channels.
        projection: The learned map W from ``(N, C_s)`` to ``(N, C)``.
        power: The exponent a of the differences, at least 1.
        eps: Added to the variances, greater than 0.
        mask: True where an example counts, shape ``(N,)``, or a position, if both features have the same positions;
            None where all count. The examples are selected, for which the host waits for the device.

    Returns:
        A scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting is not a number.
        ValueError: If the numbers of examples differ, a feature has no channels, ``projection`` does not have the
            teacher's channels, or a setting is out of its range.

    Example:
        >>> student, teacher = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
        >>> log_sum_distance(student, teacher, projection=lambda feature: 2 * feature)
        tensor(2.4714)

    References:
        Miles and Mikolajczyk 2023 (SRD), section 3, arXiv:2303.11098; deviation: 0 in the place of the logarithm of 0.
    """
    checks.at_least("power", power, 1)
    checks.positive("eps", eps)
    student, teacher = prepare(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        expected = "`student` and `teacher` to have the same number of examples and a dimension of channels"
        raise ValueError(checks.message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}"))
    student, teacher = (averaged(feature, positions_mask(mask, feature)) for feature in (student, teacher))
    if mask is not None:
        counts = examples_of(mask)
        student, teacher = student[counts], teacher[counts]

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        projected = precise(projection, student)
        checks.same_shape(projected, teacher, names=("projection(student)", "teacher"), remedy=_REMEDY)
        scores = [standardized(rows, 0, count=len(rows), eps=eps) for rows in (projected, teacher)]
        return or_one((scores[0] - scores[1]).abs().pow(power).sum()).log()

    return of_counted(distance, student, teacher)
