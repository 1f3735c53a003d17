"""Formulas on the two models' logits: student first, one value per row of logits, no gradient into the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, check_logits, prepare, prepare_logits, reduced
from lightning_distill.functional.kernels import Divergence, divergence
from lightning_distill.functional.primitives import LEAST_SCORE, softened

__all__ = ["hard_target", "logit_mse", "soft_cross_entropy", "soft_target_kl"]

_STANDARDIZE_EPS = 1e-7


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    class_dim: int | None = None,
    mask: Tensor | None = None,
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
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T^2`: the shape of the logits without ``class_dim``, or a scalar.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0, or
            ``reduction`` is unknown.

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
    checks.temperature(temperature)
    student, teacher, dim, counts = check_logits(student_logits, teacher_logits, class_dim, mask=mask)
    if standardize:
        student, teacher = (_standardized(logits, dim, counts) for logits in prepare(student, teacher))
    settings = Divergence("forward_kl", temperature=temperature)
    return divergence(student, teacher, settings, dim, counts, reduction) * temperature**2


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Cross entropy of the student's softened probabilities under the teacher's soft targets.

    .. math:: -T^2 \sum_c p^t_c \log p^s_c, \qquad p = \mathrm{softmax}(z / T)

    It is :func:`soft_target_kl` plus :math:`T^2` times the teacher's entropy: the gradient is the same, and the
    smallest value is that entropy instead of 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> soft_cross_entropy(student, teacher)
        tensor([0.5180])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531.
    """
    checks.temperature(temperature)
    student, teacher, dim, counts = check_logits(student_logits, teacher_logits, class_dim, mask=mask)
    settings = Divergence("cross_entropy", temperature=temperature)
    return divergence(student, teacher, settings, dim, counts, reduction) * temperature**2


def hard_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Cross entropy of the student's probabilities with the teacher's decision.

    .. math:: -\log p^s_k, \qquad k = \arg\max_c z^t_c, \quad p = \mathrm{softmax}(z)

    The teacher's most likely class is taken as a label: how sure the teacher is does not count. Of equally likely
    classes it is the first.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or ``class_dim`` is not an int.
        ValueError: If the shapes differ or there are fewer than two classes.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 4.0, 0.0]])
        >>> hard_target(student, teacher)
        tensor([2.4076])

    References:
        Touvron et al. 2021 (DeiT), equation 3, arXiv:2012.12877; deviation: the student's cross entropy on the label is
        the task loss and not part of this one.
    """
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask)
    log_student = F.log_softmax(softened(student, 1.0, counts, dim), dim=dim)
    values = -log_student.gather(dim, teacher.argmax(dim=dim, keepdim=True)).squeeze(dim)
    return reduced(values, counts, reduction)


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Mean squared difference of the two models' logits.

    .. math:: \frac{1}{C} \sum_c (z^s_c - z^t_c)^2

    Logits keep what the softmax throws away (their common shift) and need no temperature.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Mean squared difference, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or ``class_dim`` is not an int.
        ValueError: If the shapes differ.

    Example:
        >>> logit_mse(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor([2.])

    References:
        Ba and Caruana 2014, section 2.2, arXiv:1312.6184; deviation: the mean over the classes, without the factor 1/2.
    """
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask, at_least=1)
    if counts is not None:
        student, teacher = (logits.masked_fill(~counts.unsqueeze(dim), 0.0) for logits in (student, teacher))
    return reduced((student - teacher).square().mean(dim=dim), counts, reduction)


def _standardized(logits: Tensor, dim: int, counts: Tensor | None) -> Tensor:
    impossible = logits <= LEAST_SCORE  # a class of probability 0 has no part in the row's mean and deviation
    if counts is not None:
        impossible = impossible | ~counts.unsqueeze(dim)
    scores = logits.masked_fill(impossible, 0.0)
    absent = impossible.sum(dim=dim, keepdim=True)
    count = logits.shape[dim] - absent
    mean = scores.sum(dim=dim, keepdim=True) / count.clamp(min=1)
    centred = scores - mean
    squares = centred.square().sum(dim=dim, keepdim=True) - absent * mean.square()
    variance = squares / (count - 1).clamp(min=1)
    rounding = 4 * torch.finfo(logits.dtype).eps * scores.detach().abs().amax(dim=dim, keepdim=True)
    # The root of a zero variance has no gradient and 1e-7 is a divisor out of reach of float16: constant rows get 1.
    deviation = torch.where(variance <= rounding.square(), 1.0, variance).sqrt()
    standardized = centred / (deviation + _STANDARDIZE_EPS)
    if torch.compiler.is_compiling():
        return standardized.masked_fill(impossible, LEAST_SCORE)
    with torch.no_grad():  # as in softened, to save a copy and a backward pass
        return standardized.masked_fill_(impossible, LEAST_SCORE)
