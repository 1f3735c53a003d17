r"""The divergences of two rows of scores, with the derivative written over the student's scores.

With :math:`q = \mathrm{softmax}(x)`, :math:`p = \mathrm{softmax}(y)` and any :math:`D(p, q)`, the chain rule through
the softmax is

.. math:: \partial D / \partial x_i = q_i (f_i - \sum_j q_j f_j) = h_i - q_i \sum_j h_j, \qquad
    f_i = \partial D / \partial q_i, \quad h_i = q_i f_i,

and a constant may be added to all :math:`f_i`, because the :math:`q_i` sum to 1. Constants are chosen so that f is 0 if
q equals p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.functional.kernels.settings import Divergence

_TINY = 1e-37  # replaces a probability of 0 before a division or a logarithm


def divergence(x: Tensor, y: Tensor, settings: Divergence) -> Tensor:
    """Divergence of each row; the scores are used up.

    Args:
        x: The student's scores, with a maximum of 0 in each row, shape ``(..., C)``. Afterwards they hold the
            derivative of the divergence by themselves.
        y: The teacher's, same shape; afterwards their content has no meaning. If scores are minus infinity, the
            derivative is right wherever the divergence is finite.
        settings: The divergence. Its temperature is not used: the scores are those after the division.

    Returns:
        Divergence in nats, shape ``(..., 1)``.
    """
    share = settings.share
    if settings.kind == "forward_kl":
        return _kl(x, y)
    if settings.kind == "cross_entropy":
        return _cross_entropy(x, y)
    if settings.kind == "reverse_kl":
        return _reverse_kl(x, y)
    if settings.kind == "total_variation":
        return _total_variation(x, y)
    if settings.kind == "jensen_shannon":
        return _jensen_shannon(x, y, share)
    return _skew_kl(x, y, share) if settings.kind == "skew_kl" else _skew_reverse_kl(x, y, share)


def through_softmax(q: Tensor, h: Tensor) -> Tensor:
    """Overwrite ``q`` with ``h - q * sum(h)``, the derivative by the scores.

    Args:
        q: The student's probabilities, shape ``(..., C)``.
        h: Each probability times the divergence's derivative by it, same shape.

    Returns:
        The sum of ``h``, shape ``(..., 1)``.
    """
    total = h.sum(-1, keepdim=True)
    q.mul_(-total).add_(h)
    return total


def _kl(x: Tensor, y: Tensor) -> Tensor:
    # D = sum p log(p / q). f = -p / q, h = -p: dD/dx = q - p.
    p = y.exp()
    apart = y.sub_(x).mul_(p)
    q = x.exp_()
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    value = apart.sum(-1, keepdim=True) / p_total + (q_total / p_total).log_()
    q.div_(q_total).addcdiv_(p, p_total, value=-1)
    return value


def _cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    # D = -sum p log q, whose derivative is that of the divergence: they differ by the teacher's entropy.
    p = _softmax(y)
    mean = (p * x).sum(-1, keepdim=True)
    q = x.exp_()
    total = q.sum(-1, keepdim=True)
    q.div_(total).sub_(p)
    return total.log_().sub_(mean)


def _reverse_kl(x: Tensor, y: Tensor) -> Tensor:
    # D = sum q log(q / p). f = log(q / p) = x - y + constant: dD/dx = q (x - y - sum q (x - y)).
    q = x.exp()
    apart = x.sub_(y)
    q_total, p_total = q.sum(-1, keepdim=True), y.exp_().sum(-1, keepdim=True)
    q.div_(q_total)
    mean = torch.mul(q, apart, out=y).sum(-1, keepdim=True)
    apart.sub_(mean).mul_(q)
    return mean + (p_total / q_total).log_()


def _jensen_shannon(x: Tensor, y: Tensor, share: float) -> Tensor:
    # D = a sum p log(p / m) + (1 - a) sum q log(q / m), m = a p + (1 - a) q. f = (1 - a) log(q / m).
    q, p = _softmax(x), _softmax(y)
    mixture = torch.lerp(q, p, share).clamp_min_(_TINY)
    h = _times_log_ratio(q, mixture)
    from_teacher = _times_log_ratio(p, mixture).sum(-1, keepdim=True)
    from_student = through_softmax(q, h.mul_(1 - share))
    return from_teacher.mul_(share).add_(from_student)


def _skew_kl(x: Tensor, y: Tensor, share: float) -> Tensor:
    # D = sum p log(p / m), m = a p + (1 - a) q. f = -(1 - a) p / m, to which 1 - a is added.
    q, p = _softmax(x), _softmax(y)
    mixture = torch.lerp(q, p, share).clamp_min_(_TINY)
    value = _times_log_ratio(p, mixture).sum(-1, keepdim=True)
    through_softmax(q, p.div_(mixture).sub_(1).mul_(share - 1).mul_(q))
    return value


def _skew_reverse_kl(x: Tensor, y: Tensor, share: float) -> Tensor:
    # D = sum q log(q / m), m = a q + (1 - a) p. f = log(q / m) + 1 - a q / m, from which 1 - a is subtracted.
    q, p = _softmax(x), _softmax(y)
    mixture = p.lerp_(q, share).clamp_min_(_TINY)
    h = _times_log_ratio(q, mixture)
    value = h.sum(-1, keepdim=True)
    through_softmax(q, torch.div(q, mixture, out=mixture).sub_(1).mul_(-share).mul_(q).add_(h))
    return value


def _total_variation(x: Tensor, y: Tensor) -> Tensor:
    # D = 1/2 sum |q - p|. f = 1/2 sign(q - p).
    q, p = _softmax(x), _softmax(y)
    apart = p.sub_(q)
    value = apart.abs().sum(-1, keepdim=True).mul_(0.5)
    through_softmax(q, apart.sign_().mul_(-0.5).mul_(q))
    return value


def _softmax(scores: Tensor) -> Tensor:
    """Softmax, in place, of scores whose row maxima are 0."""
    exponentials = scores.exp_()
    return exponentials.mul_(exponentials.sum(-1, keepdim=True).reciprocal_())  # a division takes longer


def _times_log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """``p log(p / q)``, 0 where p is 0."""
    return (p / q).clamp_min_(_TINY).log_().mul_(p)
