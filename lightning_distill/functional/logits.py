"""Formulas on the two models' logits: student first, one value per row of logits, no gradient into the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare_logits

_STANDARDIZE_EPS = 1e-7


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    class_dim: int = -1,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's softened probabilities from the teacher's soft targets.

    .. math:: T^2 \sum_c p^t_c (\log p^t_c - \log p^s_c), \qquad p = \mathrm{softmax}(z / T)

    The factor :math:`T^2` keeps the size of the gradient about the same when the temperature changes.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        standardize: Whether each row of logits is z-scored first (unbiased standard deviation plus 1e-7), so that
            the student need not copy the size of the teacher's logits.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T^2`: the shape of the logits without ``class_dim``, or a scalar.

    Raises:
        TypeError: If the logits are no floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0, or
            there is no such reduction.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> soft_target_kl(student, teacher, temperature=2.0)
        tensor([0.5694])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531. Standardisation: Sun et al. 2024, section 4.3,
        arXiv:2403.01427; deviations: the unbiased deviation plus 1e-7, as in the authors' code, where algorithm 1
        divides by C and adds nothing; and a row that is constant up to rounding is centred but not divided, because
        dividing by 1e-7 would give gradients that overflow half precision.
    """
    checks.positive("temperature", temperature)
    student, teacher = prepare_logits(student_logits, teacher_logits, class_dim, at_least=2)
    if standardize:
        student, teacher = _standardized(student, class_dim), _standardized(teacher, class_dim)
    log_student = F.log_softmax(student / temperature, dim=class_dim)
    log_teacher = F.log_softmax(teacher / temperature, dim=class_dim)
    if reduction == "mean":  # in one kernel and one product
        rows = student.numel() // student.shape[class_dim]
        return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * (temperature**2 / rows)
    checks.one_of("reduction", reduction, ("none", "mean"))
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=class_dim) * temperature**2


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, class_dim: int = -1
) -> Tensor:
    r"""Cross entropy of the student's softened probabilities under the teacher's soft targets.

    .. math:: -T^2 \sum_c p^t_c \log p^s_c, \qquad p = \mathrm{softmax}(z / T)

    It is :func:`soft_target_kl` plus :math:`T^2` times the teacher's entropy: the same gradient, and a smallest value
    that is that entropy rather than 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        Cross entropy in nats times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are no floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> soft_cross_entropy(student, teacher)
        tensor([0.5180])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531.
    """
    checks.positive("temperature", temperature)
    student, teacher = prepare_logits(student_logits, teacher_logits, class_dim, at_least=2)
    log_student = F.log_softmax(student / temperature, dim=class_dim)
    soft_targets = F.softmax(teacher / temperature, dim=class_dim)
    return -(soft_targets * log_student).sum(dim=class_dim) * temperature**2


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, class_dim: int = -1) -> Tensor:
    r"""Mean squared difference of the two models' logits.

    .. math:: \frac{1}{C} \sum_c (z^s_c - z^t_c)^2

    Logits keep what the softmax throws away (their common shift) and need no temperature.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        Mean squared difference, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are no floating point tensors, or ``class_dim`` is no int.
        ValueError: If the shapes differ.

    Example:
        >>> logit_mse(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor([2.])

    References:
        Ba and Caruana 2014, section 2.2, arXiv:1312.6184; deviation: the mean over the classes, without the factor 1/2.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, class_dim, at_least=1)
    return (student - teacher).square().mean(dim=class_dim)


def _standardized(logits: Tensor, class_dim: int) -> Tensor:
    centred = logits - logits.mean(dim=class_dim, keepdim=True)
    variance = centred.square().sum(dim=class_dim, keepdim=True) / (logits.shape[class_dim] - 1)
    rounding = 4 * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(dim=class_dim, keepdim=True)
    # The root of a zero variance has no gradient and 1e-7 is a divisor out of reach of float16: constant rows get 1.
    deviation = torch.where(variance <= rounding.square(), 1.0, variance).sqrt()
    return centred / (deviation + _STANDARDIZE_EPS)
