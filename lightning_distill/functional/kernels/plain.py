"""The formulas as they are written in the papers, for every tensor, transform and compiler that PyTorch has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import compat
from lightning_distill.functional.inputs import IGNORE_INDEX, Reduction, prepare, reduced
from lightning_distill.functional.kernels.settings import Divergence
from lightning_distill.functional.primitives import is_ordinary, softened


def divergence(
    student: Tensor,
    teacher: Tensor,
    settings: Divergence,
    dim: int,
    mask: Tensor | None,
    reduction: Reduction = "none",
) -> Tensor:
    """Divergence of each row or their mean, with autograd's own gradient.

    Args:
        student: Logits of any shape and floating point type.
        teacher: The teacher's logits, same shape.
        settings: The divergence.
        dim: Dimension of the classes.
        mask: True where a row counts, the shape without ``dim``; None where all count.
        reduction: "none" or "mean".

    Returns:
        Divergence in nats, the shape without ``dim``, 0 in rows that do not count; or a scalar.
    """
    student, teacher = prepare(student, teacher)
    if settings.kind == "reverse_kl":
        student = _without_forbidden(student, teacher, settings.floor)
    scores = [softened(logits, settings.temperature, mask, dim) for logits in (student, teacher)]
    if settings.kind == "total_variation":
        apart = F.softmax(scores[0], dim=dim) - F.softmax(scores[1], dim=dim)
        return reduced(0.5 * apart.abs().sum(dim=dim), mask, reduction)
    log_student, log_teacher = (F.log_softmax(logits, dim=dim) for logits in scores)
    if settings.kind == "forward_kl" and reduction == "mean" and mask is None:  # in one kernel and one quotient
        rows = student.numel() // student.shape[dim]
        return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / rows
    return reduced(_of_rows(log_student, log_teacher, settings, dim), mask, reduction)


def cross_entropy(student: Tensor, labels: Tensor, dim: int) -> Tensor:
    """Cross entropy of each row's label.

    Args:
        student: Logits of any shape.
        labels: Class index of each row, the shape without ``dim``; negative where a row has none.
        dim: Dimension of the classes.

    Returns:
        Cross entropy in nats, the shape of the labels; 0 in rows without a label.
    """
    rows = prepare(student, student)[0].movedim(dim, -1)
    labels = torch.where(labels < 0, IGNORE_INDEX, labels)
    values = F.cross_entropy(rows.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return values.view(labels.shape)


def kl_from_logs(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """Kullback-Leibler divergence of two distributions given by their log-probabilities.

    Args:
        log_p: Log-probabilities of the first distribution, finite.
        log_q: Log-probabilities of the second, same shape.
        dim: Dimension of the classes.

    Returns:
        Divergence in nats, the shape without ``dim``.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=dim)


def _without_forbidden(student: Tensor, teacher: Tensor, floor: float) -> Tensor:
    """The student's logits, with minus infinity for the classes to which the teacher gives probability 0.

    On a CPU they are not copied if no class has probability 0. A GPU would have to wait for the answer.
    """
    can_look = student.device.type == "cpu" and not torch.compiler.is_compiling() and is_ordinary(student, teacher)
    if can_look and teacher.numel() and teacher.amin().item() > floor:
        return student
    return student.masked_fill(teacher <= floor, -math.inf)


def _of_rows(log_student: Tensor, log_teacher: Tensor, settings: Divergence, dim: int) -> Tensor:
    kind, share = settings.kind, settings.share
    if kind == "forward_kl" and not compat.transforms_are_active():  # vmap takes torch's own rows one by one
        return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=dim)
    if kind == "forward_kl":
        return kl_from_logs(log_teacher, log_student, dim)
    if kind == "cross_entropy":
        return -(log_teacher.exp() * log_student).sum(dim=dim)
    if kind == "reverse_kl":
        return kl_from_logs(log_student, log_teacher, dim)
    if kind == "skew_reverse_kl":
        return kl_from_logs(log_student, _log_mixture(log_student, log_teacher, share), dim)
    mixture = _log_mixture(log_teacher, log_student, share)
    from_teacher = kl_from_logs(log_teacher, mixture, dim)
    if kind == "skew_kl":
        return from_teacher
    return share * from_teacher + (1 - share) * kl_from_logs(log_student, mixture, dim)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    # log(share p + (1 - share) q) without leaving log space, where p or q may be less than the smallest float.
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
