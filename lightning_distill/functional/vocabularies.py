"""Formulas on the logits of two models with vocabularies of their own: student first, one value per row of logits."""

from __future__ import annotations

import torch  # noqa: F401 - for the examples
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, check_logits, prepare, reduced
from lightning_distill.functional.primitives import softened

__all__ = ["universal_logit"]


def universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Wasserstein distance of two models' probabilities that do not share their classes.

    .. math:: \sum_i |p^s_{(i)} - p^t_{(i)}|, \qquad p = \mathrm{softmax}(z / T)

    Here :math:`p_{(i)}` is the i-th largest probability, and 0 beyond the last class. It compares how certain the two
    models are and how they spread the rest, not which class is likely. It needs no mapping between two vocabularies.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape but for the number of classes.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Distance from 0 to 2, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ in more than the number of classes, there are fewer than two classes, or the
            temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 4.0, 1.0, 1.0]])
        >>> universal_logit(student, teacher)
        tensor([0.4914])

    References:
        Boizard et al. 2024 (ULD), arXiv:2402.12030: the distance in closed form, where every move costs
        the same. It has no factor :math:`T^2`.
    """
    checks.positive("temperature", temperature)
    student, teacher, dim, counts = check_logits(
        student_logits, teacher_logits, class_dim, mask=mask, same_classes=False
    )
    student, teacher = (softened(logits, temperature, counts, dim) for logits in prepare(student, teacher))
    student, teacher = (F.softmax(scores.movedim(dim, -1), dim=-1) for scores in (student, teacher))
    return reduced(sorted_distance(student, teacher), counts, reduction)


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of the absolute differences of sorted probabilities.

    Args:
        student: Shape ``(..., C)``.
        teacher: Shape ``(..., D)``; the shorter rows are padded with zeros.

    Returns:
        Shape ``(...)``.

    Example:
        >>> sorted_distance(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.25, 0.25]))
        tensor(0.5000)
    """
    student, teacher = (probabilities.sort(dim=-1, descending=True).values for probabilities in (student, teacher))
    return rank_differences(student, teacher).abs().sum(dim=-1)


def rank_differences(student: Tensor, teacher: Tensor) -> Tensor:
    """The differences of sorted rows, rank by rank.

    Args:
        student: Shape ``(..., C)``.
        teacher: Shape ``(..., D)``; the shorter rows are padded with zeros.

    Returns:
        Shape ``(..., max(C, D))``.
    """
    more = teacher.shape[-1] - student.shape[-1]
    return F.pad(student, (0, max(more, 0))) - F.pad(teacher, (0, max(-more, 0)))
