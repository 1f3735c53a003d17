"""The distance that leaves alone what a ReLU cuts off: student first, one value per example."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction
from lightning_distill.functional.vectors import channels_at, over_numbers, prepare_equal

__all__ = ["margin_relu_distance"]


def margin_relu_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    margins: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Mean squared difference from the teacher's response, except where both are cut off by a ReLU.

    .. math:: \frac{1}{D} \sum_d \begin{cases} 0 & f^s_d \le t_d \le 0 \\ (f^s_d - t_d)^2 & \text{else} \end{cases},
        \qquad t_d = \max(f^t_d, m_{c(d)})

    Both features are taken before the ReLU. Positive responses are matched. A negative response of the teacher only
    asks for one that is at least as far below zero, and the margin :math:`m_c` of the channel is far enough.

    Args:
        student: The student's feature before its activation, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``, with
            D numbers per example.
        teacher: The teacher's feature before its activation, same shape.
        margins: The margin of each channel, at most 0, shape ``(C,)``.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean squared difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ, or ``margins`` does not have one number for each channel.

    Example:
        >>> student, teacher = torch.tensor([[0.5, -3.0, 2.0]]), torch.tensor([[1.5, -1.0, -4.0]])
        >>> margin_relu_distance(student, teacher, margins=torch.tensor([-1.0, -1.0, -1.0]))
        tensor([3.3333])

    References:
        Heo et al. 2019, equations 1 to 3, arXiv:1904.01866; deviation: the mean instead of the sum over the numbers.
        Published code has a factor of 0.001 and halves it for each layer before the last.
    """
    student, teacher, positions = prepare_equal(student, teacher, mask)
    if student.ndim < 2:
        raise ValueError(checks.message("features to have channels", f"shape {tuple(student.shape)}"))
    dim = channels_at(student) % student.ndim
    if margins.shape != (student.shape[dim],):
        expected = f"`margins` to have one number for each of the {student.shape[dim]} channels"
        raise ValueError(checks.message(expected, f"shape {tuple(margins.shape)}"))
    margins = margins.detach().to(student).view(-1, *[1] * (student.ndim - 1 - dim))
    teacher = torch.maximum(teacher, margins)
    counts = (student > teacher) | (teacher > 0)
    values = torch.where(counts, student - teacher, 0.0).square()
    return over_numbers(values, dim, positions, reduction)
