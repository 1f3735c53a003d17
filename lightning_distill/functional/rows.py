"""Divergences and cross entropies of rows of logits, each row's gradient written over the student's logits.

The reference for any faster kernel: :func:`rows_in_place` is the contract. The formulas are those of
:mod:`~lightning_distill.functional.kernels.in_place`, and the alpha-beta divergence, which is in this file.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distill.functional.kernels import Divergence, in_place, rows_in_place_for
from lightning_distill.functional.kernels.in_place import through_softmax
from lightning_distill.functional.kernels.settings import Kind
from lightning_distill.functional.primitives import LEAST_SCORE

# The kernels' names, and the setting that is the share of a mixture.
_KINDS: dict[str, tuple[Kind, str | None]] = {
    "kl": ("forward_kl", None),
    "reverse_kl": ("reverse_kl", None),
    "jsd": ("jensen_shannon", "beta"),
    "skew_kl": ("skew_kl", "skew"),
    "skew_reverse_kl": ("skew_reverse_kl", "skew"),
    "total_variation": ("total_variation", None),
}
DIVERGENCES = (*_KINDS, "alpha_beta")

# Numbers that are worked on at a time. On a CPU three such blocks stay in the cache of a core; elsewhere larger blocks
# need fewer launches.
_BLOCK_ON_CPU, _BLOCK = 2**17, 2**24
# Logarithms of probabilities and of their powers: a forbidden token's would overflow if the exponent is negative.
_LEAST_LOG, _LARGEST_LOG = -1e15, math.log(1e15)
_CLOSE_TO_ZERO = 1e-6  # exponents below it take the formula's limit, which is the more accurate there


class RowSettings(NamedTuple):
    """The loss of one row: ``weight * divergence + task_weight * cross entropy``.

    Attributes:
        divergence: One of ``DIVERGENCES``.
        temperature: Softening of both distributions in the divergence.
        beta: Share of the teacher in the mixture of ``"jsd"``; the student's exponent in ``"alpha_beta"``.
        skew: Share of the first distribution in the mixture of ``"skew_kl"`` and ``"skew_reverse_kl"``.
        alpha: The teacher's exponent in ``"alpha_beta"``.
        weight: Factor of the divergence.
        task_weight: Factor of the cross entropy with the labels.
        scales: Factors of the student's and the teacher's logits, applied first.
        soft_caps: Bounds of the student's and the teacher's scaled logits, or None.
    """

    divergence: str = "kl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    alpha: float = 1.0
    weight: float = 1.0
    task_weight: float = 0.0
    scales: tuple[float, float] = (1.0, 1.0)
    soft_caps: tuple[float | None, float | None] = (None, None)


def rows_in_place(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    settings: RowSettings,
    *,
    gradient_factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Divergence and cross entropy of each row; the gradient of the row's loss overwrites the student's logits.

    Args:
        student_logits: Products of hidden states and head, before scale and soft cap, shape ``(N, V)``. Afterwards they
            hold the derivative of ``weight * divergence + task_weight * cross entropy`` by themselves.
        teacher_logits: The teacher's, same shape; their content is lost.
        labels: Class index of each row, not negative, shape ``(N,)``; unused if ``task_weight`` is 0.
        settings: The formula.
        gradient_factor: Multiplies the gradient before it is rounded to the logits' precision. Half precision clips it
            to the largest finite number.

    Returns:
        Divergence and cross entropy of each row in nats, without their weights, shape ``(N,)``, float32 or float64;
        None in the place of the cross entropy if ``task_weight`` is 0. The cross entropy of a label that is too large
        is NaN.
    """
    if gradient_factor == 1 and (values := _in_kernel(student_logits, teacher_logits, labels, settings)) is not None:
        return values
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    number = len(student_logits)
    divergences = student_logits.new_empty(number, dtype=dtype)
    cross_entropies = torch.empty_like(divergences) if settings.task_weight else None
    numbers = _BLOCK_ON_CPU * torch.get_num_threads() if student_logits.device.type == "cpu" else _BLOCK
    size = max(numbers // student_logits.shape[1], 1)
    for start in range(0, number, size):
        rows = slice(start, start + size)
        logits = student_logits[rows]
        student = logits.to(dtype)
        targets = labels[rows] if labels is not None and settings.task_weight else None
        divergence, cross_entropy = _block(student, teacher_logits[rows].to(dtype), targets, settings)
        divergences[rows] = divergence
        if cross_entropies is not None and cross_entropy is not None:
            cross_entropies[rows] = cross_entropy
        if gradient_factor != 1:
            student.mul_(gradient_factor)
        if student.dtype != logits.dtype:
            largest = torch.finfo(logits.dtype).max
            logits.copy_(student.clamp_(-largest, largest))
    return divergences, cross_entropies


def _in_kernel(
    student: Tensor, teacher: Tensor, labels: Tensor | None, settings: RowSettings
) -> tuple[Tensor, Tensor | None] | None:
    """The same in a kernel; None if no kernel has this formula or takes these logits."""
    divergence = _divergence(settings)
    labels = labels if settings.task_weight else None
    if divergence is None or settings.scales != (1.0, 1.0) or settings.soft_caps != (None, None):
        return None
    if divergence.kind == "reverse_kl" and labels is not None:
        return None  # the sums of that kernel leave out tokens that the cross entropy has
    kernel = rows_in_place_for(student, teacher)
    if kernel is None:
        return None
    factor = settings.temperature**2 if settings.divergence == "kl" else 1.0
    weights = torch.full((len(student),), settings.weight * factor, device=student.device)
    values, task = kernel(
        student, teacher, divergence, weights=weights, labels=labels, task_weight=settings.task_weight
    )
    if task is not None and labels is not None:
        task.masked_fill_(labels >= student.shape[1], math.nan)
    return values.mul_(factor), task


def _divergence(settings: RowSettings) -> Divergence | None:
    """The divergence as the kernels know it; None for the alpha-beta divergence, which they do not have."""
    if settings.divergence == "alpha_beta":
        return None
    kind, share = _KINDS[settings.divergence]
    return Divergence.of(kind, getattr(settings, share) if share else 0.0, settings.temperature)


def _block(
    student: Tensor, teacher: Tensor, labels: Tensor | None, settings: RowSettings
) -> tuple[Tensor, Tensor | None]:
    """The same for a few rows in the precision of the arithmetic."""
    slope = _squash(student, settings.scales[0], settings.soft_caps[0])
    _squash(teacher, settings.scales[1], settings.soft_caps[1])
    temperature, known = settings.temperature, _divergence(settings)
    least = LEAST_SCORE * temperature
    for scores in (student, teacher):
        scores.clamp_min_(least)  # the difference of two infinite scores is NaN
    forbidden = teacher <= least if known is not None and known.kind == "reverse_kl" else None
    for scores in (student, teacher):
        scores.sub_(scores.amax(-1, keepdim=True))  # before the division: it keeps more digits
    cross_entropy, task_gradient = (None, None) if labels is None else _cross_entropy(student, labels)
    # Logits z, scores x = z / T: dD/dz = dD/dx / T.
    factor = settings.weight / temperature
    if temperature != 1:
        student.div_(temperature)
        teacher.div_(temperature)
    if forbidden is not None:  # such a token is left out on both sides
        student.masked_fill_(forbidden, LEAST_SCORE)
        student.sub_(student.amax(-1, keepdim=True))
    if known is None:
        divergence = _alpha_beta(student, teacher, alpha=settings.alpha, beta=settings.beta)
    else:
        divergence = in_place.divergence(student, teacher, known)
    if settings.divergence == "kl":
        divergence.mul_(temperature**2)
        factor *= temperature**2
    if factor != 1:
        student.mul_(factor)
    if task_gradient is not None:
        student.add_(task_gradient, alpha=settings.task_weight)
    if slope is not None:
        student.mul_(slope)
    if settings.scales[0] != 1:
        student.mul_(settings.scales[0])
    return divergence.squeeze(-1), cross_entropy


def _squash(logits: Tensor, scale: float, cap: float | None) -> Tensor | None:
    """Scale and cap logits in place; the derivative of the cap, or None without a cap."""
    if scale != 1:
        logits.mul_(scale)
    if cap is None:
        return None
    tanh = logits.div_(cap).tanh_()
    slope = tanh.square().neg_().add_(1)
    logits.mul_(cap)
    return slope


def _cross_entropy(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy at temperature 1 of scores whose maximum is 0, and its derivative: softmax minus one-hot."""
    classes = scores.shape[-1]
    index = labels.clamp(max=classes - 1).unsqueeze(-1)
    gradient = scores.exp()
    total = gradient.sum(-1, keepdim=True)
    values = (total.log() - scores.gather(-1, index)).squeeze(-1)
    gradient.div_(total).scatter_add_(-1, index, torch.full_like(total, -1.0))
    return values.masked_fill_(labels >= classes, math.nan), gradient


def _alpha_beta(x: Tensor, y: Tensor, *, alpha: float, beta: float) -> Tensor:
    # D = sum [a p^(a+b) + b q^(a+b) - (a + b) p^a q^b] / (a b (a + b)). h = (q^(a+b) - p^a q^b) / a.
    # The divisor is 0 if a, b or a + b is: these cases are D's limits (Cichocki, Cruces and Amari 2011). h is the
    # same, but for a = 0, where its limit is q^b log(q / p).
    log_q, log_p = (scores.sub_(scores.exp().sum(-1, keepdim=True).log_()) for scores in (x, y))
    powers = _powers(log_q, log_p, alpha, beta)
    divergence = _alpha_beta_terms(powers, alpha, beta).sum(-1, keepdim=True)
    if abs(alpha) < _CLOSE_TO_ZERO:
        h = powers.q.mul_(powers.log_q - powers.log_p)
    else:
        h = powers.q.sub_(powers.mixed).div_(alpha)
    through_softmax(log_q.exp_(), h)
    return divergence


def alpha_beta_terms(log_q: Tensor, log_p: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The terms of the alpha-beta divergence, whose sum over the classes it is; autograd can differentiate them.

    Args:
        log_q: The student's log-probabilities, finite, any shape.
        log_p: The teacher's, same shape.
        alpha: Exponent of the teacher's probabilities.
        beta: Exponent of the student's probabilities.

    Returns:
        The terms, same shape.
    """
    return _alpha_beta_terms(_powers(log_q, log_p, alpha, beta), alpha, beta)


class _Powers(NamedTuple):
    """Log-probabilities and the powers of the alpha-beta divergence.

    Attributes:
        log_q: The student's log-probabilities.
        log_p: The teacher's.
        q: ``q^(alpha + beta)``.
        p: ``p^(alpha + beta)``.
        mixed: ``p^alpha q^beta``.
    """

    log_q: Tensor
    log_p: Tensor
    q: Tensor
    p: Tensor
    mixed: Tensor


def _powers(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> _Powers:
    if min(alpha, beta) >= _CLOSE_TO_ZERO:  # no power is greater than 1, and no limit squares a logarithm
        q, p = ((alpha + beta) * log_q).exp(), ((alpha + beta) * log_p).exp()
        return _Powers(log_q, log_p, q, p, (alpha * log_p).add(log_q, alpha=beta).exp())
    log_q, log_p = log_q.clamp(min=_LEAST_LOG), log_p.clamp(min=_LEAST_LOG)
    exponents = (alpha + beta) * log_q, (alpha + beta) * log_p, alpha * log_p + beta * log_q
    return _Powers(log_q, log_p, *(exponent.clamp(max=_LARGEST_LOG).exp() for exponent in exponents))


def _alpha_beta_terms(powers: _Powers, alpha: float, beta: float) -> Tensor:
    log_q, log_p, q, p, mixed = powers
    no_alpha, no_beta, no_total = (abs(exponent) < _CLOSE_TO_ZERO for exponent in (alpha, beta, alpha + beta))
    if no_alpha and no_beta:
        return 0.5 * (log_q - log_p).square()
    if no_alpha:  # [q^b log(q^b / p^b) - q^b + p^b] / b^2
        return (beta * q * (log_q - log_p) - q + p) / beta**2
    if no_beta:  # [p^a log(p^a / q^a) - p^a + q^a] / a^2
        return (q - p - alpha * p * (log_q - log_p)) / alpha**2
    if no_total:  # [log(q^a / p^a) + (p / q)^a - 1] / a^2
        return (alpha * (log_q - log_p) + mixed - 1) / alpha**2
    # With the divisor in the factors, these are three passes over the classes; the formula as it stands takes six.
    unmixed = torch.add(p / (beta * (alpha + beta)), q, alpha=1 / (alpha * (alpha + beta)))
    return torch.sub(unmixed, mixed, alpha=1 / (alpha * beta))
