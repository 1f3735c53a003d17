"""Reference values of the losses on tokens: dense, in float64, from the papers' formulas in probabilities.

Plain PyTorch, so that autograd gives the gradients by every input; nothing of the library is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v log(p_v / q_v)."""
    return (p * (p / q).log()).sum()


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """GKD, equation 1: beta KL(p_t || m) + (1 - beta) KL(p_s || m); its limits at 0 and 1."""
    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def alpha_beta(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """ABKD with the limits of Cichocki, Cruces and Amari 2011, p the teacher's and q the student's probabilities."""
    p, q, both = teacher, student, alpha + beta
    if alpha == beta == 0:
        return 0.5 * ((q.log() - p.log()) ** 2).sum()
    if alpha == 0:
        return (q**beta * (q**beta / p**beta).log() - q**beta + p**beta).sum() / beta**2
    if beta == 0:
        return (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha).sum() / alpha**2
    if both == 0:
        return ((q**alpha / p**alpha).log() + (p / q) ** alpha - 1).sum() / alpha**2
    return -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum() / (alpha * beta)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": lambda s, t, temperature, **_: temperature**2 * kl(t, s),
    "reverse_kl": lambda s, t, **_: kl(s, t),
    "jsd": lambda s, t, beta, **_: generalized_jsd(s, t, beta),
    "skew_kl": lambda s, t, skew, **_: kl(t, skew * t + (1 - skew) * s),
    "skew_reverse_kl": lambda s, t, skew, **_: kl(s, skew * s + (1 - skew) * t),
    "total_variation": lambda s, t, **_: (s - t).abs().sum() / 2,
    "alpha_beta": lambda s, t, alpha, beta, **_: alpha_beta(s, t, alpha, beta),
}


def softmax(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.max()).exp()
    return exponentials / exponentials.sum()


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float | None, cap: float | None) -> Tensor:
    """Linear head, factor, then soft cap."""
    scores = hidden @ weight.T
    scores = scores if bias is None else scores + bias
    scores = scores if scale is None else scale * scores
    return scores if cap is None else cap * torch.tanh(scores / cap)


def both(setting: Any) -> tuple[Any, Any]:
    return setting if isinstance(setting, tuple) else (setting, setting)


def fused_linear(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor | None,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    alpha: float = 1.0,
    ignore_index: int = -100,
    task_weight: float = 0.0,
    weight: float = 1.0,
    soft_cap: Any = None,
    scale: Any = None,
    mask: Tensor | None = None,
    normalizer: Any = None,
) -> Tensor:
    """Mean over the tokens that count of weight * divergence + task_weight * cross entropy, token by token."""
    vocabulary = min(len(student[1]), len(teacher[1]))
    scores = [
        logits(*(None if tensor is None else tensor.double() for tensor in side), factor, cap)[..., :vocabulary]
        for side, factor, cap in zip((student, teacher), both(scale), both(soft_cap), strict=True)
    ]
    settings = {"temperature": temperature, "beta": beta, "skew": skew, "alpha": alpha}
    total, number = sum(scores[0].flatten()[:1] * 0), 0
    for index in range(math.prod(scores[0].shape[:-1])):
        s, t = (tensor.reshape(-1, vocabulary)[index] for tensor in scores)
        label = None if labels is None else int(labels.flatten()[index])
        if mask is not None and not mask.flatten()[index]:
            continue
        if label is not None and (label < 0 or label == ignore_index):
            continue
        number += 1
        student_p, teacher_p = softmax(s / temperature), softmax(t / temperature).detach()
        total = total + weight * DIVERGENCES[divergence](student_p, teacher_p, **settings)
        if task_weight:
            total = total - task_weight * softmax(s)[label].log()
    return total / (max(number, 1) if normalizer is None else normalizer)
