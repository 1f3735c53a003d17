r"""The divergences with their gradients written out, in chunks of rows: nothing of the logits' size is kept.

Where a divergence is :math:`\sum_c f(q_c, p_c)` and :math:`h = q \, \partial f / \partial q`, the gradient for the
student's logits is :math:`(h - q \sum h) / T`. Six numbers of each row pass from the values to the gradient:

====  ==================================================================================
0     the student's largest logit
1     the sum of its exponentials, :math:`\exp((z - \max z) / T)`
2, 3  the teacher's
4     the sum of :math:`h`; for the reverse divergence the value, which is 1 less
5     the student's sum of exponentials at a temperature of 1, if there are labels
====  ==================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.kernels.pieces import pieces, precision
from lightning_distill.functional.kernels.settings import Divergence

NUMBERS = 6
_TINY = 1.2e-38  # about the smallest normal float32, in place of a mixture of two probabilities that are less


def statistics(
    student: Tensor, teacher: Tensor, settings: Divergence, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Values of each row, and the numbers that their gradient needs.

    Args:
        student: Logits, shape ``(..., C)``, any strides and floating point type.
        teacher: The teacher's logits, same shape.
        settings: The divergence.
        mask: True where a row counts, shape ``(...)``; None where all count.
        labels: Class index of each row, negative where it has none, shape ``(...)``; None without a cross entropy.

    Returns:
        The divergence of each row in nats, the cross entropy of each row's label (or None), and the numbers of each
        row, shape ``(..., 6)``. A row that does not count has the value 0; so has the cross entropy without a label.
    """
    dtype = precision(student, teacher)
    numbers = student.new_zeros(*student.shape[:-1], NUMBERS, dtype=dtype)
    values = torch.zeros_like(numbers[..., 0])
    task = None if labels is None else torch.zeros_like(values)
    for x, y, keep, label, value, cross_entropy, number in pieces(
        student, teacher, mask, labels, values, task, numbers
    ):
        at, dx, dy, label = _counted(x, y, keep, label, dtype, settings)
        largest, teachers_largest = dx.amax(-1, keepdim=True), dy.amax(-1, keepdim=True)
        dx, dy = dx.sub_(largest), dy.sub_(teachers_largest)
        whole = torch.zeros_like(largest)
        if label is not None:
            whole = dx.exp().sum(-1, keepdim=True)
            picked = dx.gather(-1, label.clamp(min=0).unsqueeze(-1))
            cross_entropy[at] = torch.where(label < 0, 0.0, (whole.log() - picked).squeeze(-1))
        dx, dy = _softened(dx, settings), _softened(dy, settings)
        q, p = dx.exp(), dy.exp()
        sum_q, sum_p = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
        divergence, centre = _value(dx, dy, q, p, sum_q, sum_p, settings)
        value[at] = divergence.squeeze(-1)
        number[at] = torch.cat([largest, sum_q, teachers_largest, sum_p, centre, whole], dim=-1)
    return values if mask is None else torch.where(mask, values, 0.0), task, numbers


def gradient(
    student: Tensor,
    teacher: Tensor,
    numbers: Tensor,
    settings: Divergence,
    mask: Tensor | None,
    labels: Tensor | None,
    upstream: Tensor,
    task_upstream: Tensor | None,
) -> Tensor:
    """Gradient of the values for the student's logits.

    Args:
        student: As in :func:`statistics`.
        teacher: As in :func:`statistics`.
        numbers: Those of :func:`statistics`.
        settings: The divergence.
        mask: As in :func:`statistics`.
        labels: As in :func:`statistics`.
        upstream: Gradient of each row's divergence, shape ``(...)``.
        task_upstream: Gradient of each row's cross entropy, shape ``(...)``; None without labels.

    Returns:
        Shape and type of ``student``; 0 in rows that do not count.
    """
    dtype = precision(student, teacher)
    result = torch.empty_like(student) if mask is None else torch.zeros_like(student)
    for x, y, keep, label, number, up, task_up, out in pieces(
        student, teacher, mask, labels, numbers, upstream, task_upstream, result
    ):
        at, dx, dy, label = _counted(x, y, keep, label, dtype, settings)
        largest, sum_q, teachers_largest, sum_p, centre, whole = number[at].split(1, dim=-1)
        dx, dy = dx.sub_(largest), dy.sub_(teachers_largest)
        task = None
        if label is not None:
            factor = torch.where(label < 0, 0.0, task_up[at]).unsqueeze(-1)
            task = dx.exp().mul_(factor / whole)
            task.scatter_add_(-1, label.clamp(min=0).unsqueeze(-1), -factor)
        dx, dy = _softened(dx, settings), _softened(dy, settings)
        factor = up[at].unsqueeze(-1) / settings.temperature
        if keep is not None:
            factor = torch.where(keep[at].unsqueeze(-1), factor, 0.0)
        slope = _slope(dx, dy, sum_q, sum_p, centre, factor, settings)
        out[at] = (slope if task is None else slope.add_(task)).to(out.dtype)
    return result


def _value(
    dx: Tensor, dy: Tensor, q: Tensor, p: Tensor, sum_q: Tensor, sum_p: Tensor, settings: Divergence
) -> tuple[Tensor, Tensor]:
    """Value and sum of h of each row, from logits below the row's largest and their exponentials; all are used up."""
    if settings.kind == "forward_kl":
        value = dy.sub_(dx).mul_(p).sum(-1, keepdim=True) / sum_p + (sum_q / sum_p).log()
        return value, value
    if settings.kind == "cross_entropy":
        value = sum_q.log() - dx.mul_(p).sum(-1, keepdim=True) / sum_p
        return value, value
    if settings.kind == "reverse_kl":
        value = dx.sub_(dy).mul_(q).sum(-1, keepdim=True) / sum_q + (sum_p / sum_q).log()
        return value, value
    q, p = q.div_(sum_q), p.div_(sum_p)
    if settings.kind == "total_variation":
        apart = q - p
        value = 0.5 * apart.abs().sum(-1, keepdim=True)
        return value, 0.5 * apart.sign_().mul_(q).sum(-1, keepdim=True)
    log_q, log_p, share = dx.sub_(sum_q.log()), dy.sub_(sum_p.log()), settings.share
    if settings.kind == "jensen_shannon":
        log_m = _mixture(q, p, share).log_()
        h = log_q.sub_(log_m).mul_(q).sum(-1, keepdim=True) * (1 - share)
        return h + share * log_p.sub_(log_m).mul_(p).sum(-1, keepdim=True), h
    if settings.kind == "skew_kl":
        mixture = _mixture(q, p, share)
        value = log_p.sub_(mixture.log()).mul_(p).sum(-1, keepdim=True)
        return value, (share - 1) * p.div_(mixture).mul_(q).sum(-1, keepdim=True)
    mixture = _mixture(p, q, share)
    value = log_q.sub_(mixture.log()).mul_(q).sum(-1, keepdim=True)
    return value, value + (1 - share * (q / mixture)).mul_(q).sum(-1, keepdim=True)


def _slope(
    dx: Tensor, dy: Tensor, sum_q: Tensor, sum_p: Tensor, centre: Tensor, factor: Tensor, settings: Divergence
) -> Tensor:
    """The gradient of each row times a factor, from logits below the row's largest, which are used up."""
    if settings.kind in ("forward_kl", "cross_entropy"):
        return dx.exp_().mul_(factor / sum_q).sub_(dy.exp_().mul_(factor / sum_p))
    if settings.kind == "reverse_kl":
        q = dx.exp().mul_(factor / sum_q)
        return dx.sub_(dy).add_((sum_p / sum_q).log() - centre).mul_(q)
    q, p, share = dx.exp().div_(sum_q), dy.exp().div_(sum_p), settings.share
    if settings.kind == "total_variation":
        h = (q - p).sign_().mul_(0.5)
    elif settings.kind == "jensen_shannon":
        h = dx.sub_(sum_q.log()).sub_(_mixture(q, p, share).log_()).mul_(1 - share)
    elif settings.kind == "skew_kl":
        h = p.div_(_mixture(q, p, share)).mul_(share - 1)
    else:
        mixture = _mixture(p, q, share)
        h = dx.sub_(sum_q.log()).sub_(mixture.log()).sub_((q / mixture).mul_(share)).add_(1)
    return h.sub_(centre).mul_(q).mul_(factor)


def _mixture(rest: Tensor, first: Tensor, share: float) -> Tensor:
    return torch.lerp(rest, first, share).clamp_min_(_TINY)


def _softened(scores: Tensor, settings: Divergence) -> Tensor:
    return scores if settings.temperature == 1 else scores.div_(settings.temperature)


def _counted(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    dtype: torch.dtype,
    settings: Divergence,
) -> tuple[Any, Tensor, Tensor, Tensor | None]:
    """An index of the rows that count, new tensors of their finite logits, and their labels.

    To select rows, the host would have to wait for a GPU: there the others become zeros instead.
    """
    at: Any = ...
    if mask is not None:
        mask = mask if labels is None else mask | (labels >= 0)
        if mask.device.type == "cpu":
            at = mask
        else:
            student, teacher = (logits.masked_fill(~mask.unsqueeze(-1), 0.0) for logits in (student, teacher))
    student, teacher = (
        logits.clamp(min=settings.floor) if logits.dtype == dtype else logits.to(dtype).clamp_(min=settings.floor)
        for logits in (student[at], teacher[at])
    )
    if settings.kind == "reverse_kl":
        student.masked_fill_(teacher <= settings.floor, settings.floor)
    return at, student, teacher, None if labels is None else labels[at]
