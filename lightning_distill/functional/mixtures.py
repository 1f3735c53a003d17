"""Mixtures of several teachers' class scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.functional.primitives import LEAST_SCORE

__all__ = ["confidence_weights", "mean_logits", "mixture_logits"]


def confidence_weights(logits: Sequence[Tensor], class_dim: int = -1) -> Tensor:
    r"""Weights of several teachers for each row, by their confidence.

    .. math:: w_k = \frac{\exp(-H(p_k))}{\sum_j \exp(-H(p_j))}, \qquad H(p) = -\sum_c p_c \log p_c, \quad
        p_k = \mathrm{softmax}(z_k)

    :math:`\exp(H)` is the perplexity, the number of classes that a teacher hesitates between: a teacher that hesitates
    between four classes gets a quarter of the weight of one that is sure.

    Args:
        logits: The scores of each teacher, all of the same shape ``(N, ..., C)``, with the classes at ``class_dim``.
        class_dim: Dimension of the classes.

    Returns:
        Shape ``(K, N, ..., 1)`` for K teachers, with size 1 in the place of the classes; they sum to 1 over the
        teachers.

    Example:
        >>> sure, unsure = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> confidence_weights([sure, unsure]).flatten()
        tensor([0.6667, 0.3333])

    References:
        Kwon et al. 2020, Adaptive Knowledge Distillation Based on Entropy (ICASSP): teachers of lower entropy have a
        larger share. The exponential is a choice of this library, defined for every entropy, 0 included.
    """
    entropies = []
    for scores in logits:
        logs = _widened(scores).clamp(min=LEAST_SCORE).log_softmax(class_dim)
        entropies.append(-(logs.exp() * logs).sum(class_dim, keepdim=True))
    return torch.stack(entropies).neg().softmax(0)


def mixture_logits(
    logits: Sequence[Tensor], weights: Tensor, *, temperature: float = 1.0, class_dim: int = -1
) -> Tensor:
    r"""Logits whose softmax at a temperature is the weighted mean of the teachers' softened probabilities.

    .. math:: z = T \log \sum_k w_k \, \mathrm{softmax}(z_k / T)

    Args:
        logits: The scores of each teacher, all of the same shape ``(N, ..., C)``.
        weights: Shape ``(K,)``, or ``(K, N, ..., 1)``; they sum to 1 over the teachers.
        temperature: Softening of the probabilities, greater than 0.
        class_dim: Dimension of the classes.

    Returns:
        The shape of the scores of one teacher, float32 or better.

    Example:
        >>> unsure, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]])
        >>> mixture_logits([unsure, sure], torch.tensor([0.5, 0.5])).softmax(-1)
        tensor([[0.7500, 0.2500]])
    """
    logs = torch.stack([_widened(scores).div(temperature).log_softmax(class_dim) for scores in logits])
    return temperature * (logs + _over(weights, logs).log()).logsumexp(0)


def mean_logits(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted mean of the teachers' logits.

    Args:
        logits: The scores of each teacher, all of the same shape ``(N, ..., C)``.
        weights: Shape ``(K,)``, or ``(K, N, ..., 1)``.

    Returns:
        The shape of the scores of one teacher, float32 or better.

    Example:
        >>> mean_logits([torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])], torch.tensor([0.25, 0.75]))
        tensor([[2.5000, 3.0000]])
    """
    scores = torch.stack([_widened(each) for each in logits])
    weights = _over(weights, scores)
    return torch.where(weights > 0, weights * scores, 0.0).sum(0)  # 0 times infinity would be NaN


def _over(weights: Tensor, scores: Tensor) -> Tensor:
    weights = weights.to(device=scores.device, dtype=scores.dtype)
    return weights.reshape(-1, *[1] * (scores.ndim - 1)) if weights.ndim == 1 else weights


def _widened(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
