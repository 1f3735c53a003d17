"""Divergences of two softmaxes in float64, from the papers' formulas: the reference for large vocabularies.

``oracle.py`` and ``oracle_outputs.py`` hold the same formulas in loops; ``test_kernels.py`` compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(kind: str, student: Tensor, teacher: Tensor, share: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One value for each row, whose gradient autograd computes. Classes are last."""
    possible = ((student > -torch.inf) | (teacher > -torch.inf)).any(0)  # a class of probability 0 in both adds nothing
    if kind == "reverse_kl":  # a class that the teacher forbids is left out
        possible = (teacher > -torch.inf).any(0)
    student, teacher = student[:, possible], teacher[:, possible]
    log_q, log_p = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    match kind:
        case "forward_kl":  # Hinton et al. 2015, without T^2
            return kl(p, log_p, log_q)
        case "cross_entropy":
            return -expectation(p, log_q)
        case "reverse_kl":  # Gu et al. 2023, equation 1
            return kl(q, log_q, log_p)
        case "jensen_shannon":  # Agarwal et al. 2023, section 2
            log_m = (share * p + (1 - share) * q).log()
            return share * kl(p, log_p, log_m) + (1 - share) * kl(q, log_q, log_m)
        case "skew_kl":  # Ko et al. 2024, equation 4
            return kl(p, log_p, (share * p + (1 - share) * q).log())
        case "skew_reverse_kl":
            return kl(q, log_q, (share * q + (1 - share) * p).log())
        case "total_variation":  # Wen et al. 2023, theorem 1
            return 0.5 * (p - q).abs().sum(-1)
    raise ValueError(kind)


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The sum of p log(p / q)."""
    return expectation(p, log_p) - expectation(p, log_q)


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """The sum of p times values, where 0 times minus infinity is 0."""
    possible = p > 0
    return torch.where(possible, p * torch.where(possible, values, 0.0), 0.0).sum(-1)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """The negative logarithm of the label's probability; 0 in rows whose label is negative."""
    log_q = torch.log_softmax(student, dim=-1)
    picked = log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels < 0, 0.0, -picked)
