"""Formulas on one feature of each model: student first, one value per example, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, check_reduction, prepare
from lightning_distill.functional.kernels import softmax_divergence
from lightning_distill.functional.primitives import LEAST_SCORE, or_one, sum_of_squares, unit
from lightning_distill.functional.vectors import (
    channel_maps,
    channels_at,
    check_positions,
    mean_of_counted,
    over_examples,
    over_numbers,
    over_positions,
    positions_mask,
    prepare_equal,
    without,
)

__all__ = [
    "attention_transfer",
    "channel_wise_kl",
    "feature_cosine",
    "feature_kl",
    "feature_l1",
    "feature_mse",
    "feature_smooth_l1",
]


def feature_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of two features.

    .. math:: \frac{1}{D} \sum_d (f^s_d - f^t_d)^2

    The simplest way to make an inner layer of the student match the teacher's.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean squared difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or ``reduction`` is unknown.

    Example:
        >>> feature_mse(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([2.0000, 4.5000])

    References:
        Romero et al. 2015 (FitNets), equation 3, arXiv:1412.6550; deviation: the mean, without the factor 1/2.
    """
    return _distance(F.mse_loss, student, teacher, mask, reduction)


def feature_l1(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean absolute difference of two features.

    .. math:: \frac{1}{D} \sum_d |f^s_d - f^t_d|

    A few large differences weigh less than in the mean squared difference.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean absolute difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or ``reduction`` is unknown.

    Example:
        >>> feature_l1(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([1.0000, 1.5000])

    References:
        Romero et al. 2015 (FitNets), section 2.2, arXiv:1412.6550; deviation: absolute instead of squared differences.
    """
    return _distance(F.l1_loss, student, teacher, mask, reduction)


def feature_smooth_l1(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean difference of two features, squared where it is small and absolute where it is large.

    .. math:: \frac{1}{D} \sum_d h(f^s_d - f^t_d), \qquad
        h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    The gradient is bounded as that of the absolute difference, and smooth at zero.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or ``reduction`` is unknown.

    Example:
        >>> feature_smooth_l1(torch.tensor([[1.0, 2.0], [0.0, 0.5]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([0.7500, 0.0625])

    References:
        Girshick 2015 (Fast R-CNN), equation 3, arXiv:1504.08083.
    """
    return _distance(F.smooth_l1_loss, student, teacher, mask, reduction)


def feature_cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    channel_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""One minus the cosine of the angle between the two models' channel vectors, averaged over the positions.

    .. math:: 1 - \frac{f^s \cdot f^t}{\|f^s\| \, \|f^t\|}

    Only directions are compared: the student need not copy the size of the teacher's features. A vector of zeros has no
    direction; its cosine counts as 0 and its gradient points along the teacher's direction.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        channel_dim: Dimension of the vectors; None means 1 for tensors of four or more dimensions, else the last.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Values from 0 (same direction) to 2 (opposite), shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``channel_dim`` is not an int.
        ValueError: If the shapes differ or ``channel_dim`` is not an inner dimension.

    Example:
        >>> feature_cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
        tensor([0.4000, 1.0000])

    References:
        Sanh et al. 2019 (DistilBERT), section 2, arXiv:1910.01108.
    """
    student, teacher, positions = prepare_equal(student, teacher, mask, channel_dim)
    dim = channels_at(student, channel_dim)
    cosine = (unit(student, dim) * unit(teacher, dim)).sum(dim=dim)
    return over_positions(1 - cosine, positions, reduction)


def feature_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    channel_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence between the softmaxes of two features over their channels, averaged over positions.

    .. math:: \sum_c q^t_c (\log q^t_c - \log q^s_c), \qquad q = \mathrm{softmax}(f)

    It compares which channel is active, not how strong all channels are together.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``; C of 2 or more.
        teacher: The teacher's feature, same shape.
        channel_dim: Dimension of the softmax; None means 1 for tensors of four or more dimensions, else the last.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``channel_dim`` is not an int.
        ValueError: If the shapes differ, ``channel_dim`` is not an inner dimension or there are fewer than two
            channels.

    Example:
        >>> feature_kl(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[2.0, 1.0, 0.0]]))
        tensor([1.8226])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531, at temperature 1 and on a feature instead of logits.
    """
    student, teacher, positions = prepare_equal(student, teacher, mask, channel_dim)
    dim = channels_at(student, channel_dim)
    if student.shape[dim] < 2:
        # The softmax over one channel is always 1: the loss would be zero for any student.
        expected = f"`student` to have at least 2 channels at dimension {dim}"
        raise ValueError(checks.message(expected, f"shape {tuple(student.shape)}", "Pass another channel_dim."))
    return over_positions(softmax_divergence(student, teacher, dim), positions, reduction)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2.0, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of the two models' normalised maps of attention.

    .. math:: \frac{1}{P} \sum_{i=1}^{P} \left( \frac{Q^s_i}{\|Q^s\|_2} - \frac{Q^t_i}{\|Q^t\|_2} \right)^2, \qquad
        Q_i = \frac{1}{C} \sum_c |f_{c,i}|^p

    It compares where a model is active, not in which channels, so the numbers of channels may differ. The usual weight
    of the term is 1000. A map of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        p: Power of the activations, at least 1; larger values stress the strongest positions.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Mean squared difference, at most 2 / P, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``p`` is not a number.
        ValueError: If the positions differ, there is only one, or ``p`` is less than 1.

    Example:
        >>> student = torch.tensor([[[[1.0, 2.0]]]])
        >>> teacher = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
        >>> attention_transfer(student, teacher)
        tensor([0.7575])

    References:
        Zagoruyko and Komodakis 2017, equation 2, arXiv:1612.03928; deviation: the mean of the squared differences
        over the positions, as in the authors' code, where the equation has half the norm.
    """
    checks.at_least("p", p, 1)
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    positions = positions_mask(mask, student)
    maps = [unit(_attention_map(without(feature, positions), p), dim=1) for feature in (student, teacher)]
    differences = F.mse_loss(maps[0], maps[1], reduction="none")
    values = differences.mean(dim=1) if positions is None else mean_of_counted(differences, positions.flatten(1))
    return over_examples(values, positions, reduction)


def channel_wise_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Divergence between the two models' softmaxes over the positions of each channel, averaged over the channels.

    .. math:: \frac{T^2}{C} \sum_c \sum_i q^t_{c,i} (\log q^t_{c,i} - \log q^s_{c,i}), \qquad
        q_{c,i} = \frac{\exp(f_{c,i} / T)}{\sum_j \exp(f_{c,j} / T)}

    It compares where each channel is active: in dense prediction a channel, or the map of a class, marks a region.

    Args:
        student: The student's feature or map of logits, shape ``(N, C, H, W)`` or ``(N, L, C)``, with more than one
            position.
        teacher: The teacher's, same shape.
        temperature: Softening of both distributions over the positions, greater than 0.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Divergence in nats times :math:`T^2`, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the temperature is not a number.
        ValueError: If the shapes differ, there is only one position, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[[[0.0, 1.0, 3.0]], [[1.0, 1.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[2.0, 1.0, 0.0]], [[4.0, 0.0, 1.0]]]])
        >>> channel_wise_kl(student, teacher, temperature=2.0)
        tensor([1.5985])

    References:
        Shu et al. 2021, equations 4 and 5, arXiv:2011.13256.
    """
    checks.positive("temperature", temperature)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    check_positions(student, teacher)
    student, teacher = (channel_maps(maps) / temperature for maps in (student, teacher))
    if positions is not None:  # a position of probability 0 in both models
        student, teacher = (
            torch.where(positions.flatten(1)[:, None], maps, LEAST_SCORE) for maps in (student, teacher)
        )
    values = softmax_divergence(student, teacher, dim=2).mean(dim=1)
    return over_examples(values, positions, reduction) * temperature**2


def _distance(
    kernel: Callable[..., Tensor], student: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction
) -> Tensor:
    check_reduction(reduction)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    if reduction == "mean" and mask is None:  # every example has D numbers: one kernel gives the mean of their means
        return kernel(student, teacher, reduction="mean")
    values = kernel(student, teacher, reduction="none")
    return over_numbers(values, channels_at(student) if student.ndim > 1 else None, positions, reduction)


def _attention_map(feature: Tensor, p: float) -> Tensor:
    # The normalised map does not change with the size of the feature: dividing by the largest number keeps the
    # power of the feature, and the square of the map, within float32.
    dim = channels_at(feature)
    if p == 2:
        attention = sum_of_squares(feature, dim)
    else:
        feature = feature / _largest(feature.abs())
        attention = feature.abs().pow(p).mean(dim=dim)
    return (attention / _largest(attention)).flatten(1)


def _largest(values: Tensor) -> Tensor:
    largest = or_one(values.detach().flatten(1).amax(dim=1))
    return largest.view(-1, *[1] * (values.ndim - 1))
