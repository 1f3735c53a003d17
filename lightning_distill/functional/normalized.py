"""Formulas on features that are normalised first: student first, no gradient into the teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.primitives import centred, gram, product, standardized, unit
from lightning_distill.functional.vectors import (
    channel_maps,
    channels_at,
    check_positions,
    of_counted,
    over_examples,
    over_numbers,
    positions_mask,
    prepare_equal,
    prepare_examples,
    prepare_vectors,
    relative_gram,
    without,
)

__all__ = [
    "centered_kernel_alignment",
    "feature_map_transfer",
    "neuron_selectivity",
    "normalized_mse",
    "pearson_feature",
]

_PEARSON_EPS = 1e-6


def pearson_feature(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Half the mean squared difference of the two features' z-scores, each channel over examples and positions.

    .. math:: \frac{1}{2 M} \sum_{n,c,i} (\hat f^s_{nci} - \hat f^t_{nci})^2, \qquad
        \hat f_{nci} = \frac{f_{nci} - \mu_c}{\sigma_c + 10^{-6}}

    M is the number of elements. Up to the factor (M_c - 1) / M_c, with M_c numbers a channel, it is one minus Pearson's
    correlation: the student need not copy the mean or the size of a channel. A channel that is constant over the batch
    counts as zero and gets no gradient.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.

    Returns:
        One value from 0 (same up to mean and size) to 2 for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the channel dimension is missing.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0], [1.0], [2.0]])
        >>> teacher = torch.tensor([[0.0], [4.0], [2.0]])
        >>> pearson_feature(student, teacher)
        tensor(0.3333)

    References:
        Cao et al. 2022 (PKD), section 3, arXiv:2207.02039, with the unbiased standard deviation plus 1e-6 of the
        authors' code; deviation: a constant channel is not divided, because dividing by 1e-6 would give gradients that
        overflow half precision.
    """
    if mask is not None:
        return of_counted(_pearson, *prepare_vectors(student, teacher, mask))
    student, teacher, _ = prepare_equal(student, teacher)
    return _pearson(student, teacher)


def neuron_selectivity(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Squared maximum mean discrepancy of the two models' channels, with a polynomial kernel on their maps.

    .. math:: \frac{1}{C_s^2} \sum_{i,j} k(s_i, s_j) + \frac{1}{C_t^2} \sum_{i,j} k(t_i, t_j)
        - \frac{2}{C_s C_t} \sum_{i,j} k(s_i, t_j), \qquad k(a, b) = \left(\frac{a \cdot b}{\|a\| \|b\|}\right)^2

    s_i and t_j are the maps of single channels: where in the image each neuron is active. The two sets of maps are
    compared as distributions, so the number and the order of the channels do not matter. The usual weight is 50.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Discrepancy, at least 0, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the positions differ or there is only one.

    Example:
        >>> import torch
        >>> neuron_selectivity(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]]]))
        tensor([1.2800])

    References:
        Huang and Wang 2017, section 4, arXiv:1707.01219, with the polynomial kernel of d = 2 and c = 0; deviation:
        without the factor 1/2 that the paper gives its term.
    """
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    positions = positions_mask(mask, student)
    # Zeros add nothing to the products: only the positions that count are compared.
    maps = [unit(channel_maps(without(feature, positions)), dim=2) for feature in (student, teacher)]
    return over_examples(_discrepancy(maps[0], maps[1]), positions, reduction)


def centered_kernel_alignment(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""One minus the linear centred kernel alignment (CKA) of the two models' features.

    .. math:: 1 - \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    X and Y are the features of the batch, one row per example, their columns centred. Rotations, reflections and one
    common factor of a model's features change nothing. Features that are the same for all examples have alignment 0.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.

    Returns:
        One value from 0 (aligned) to 1 for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0], [0.0], [4.0]])
        >>> centered_kernel_alignment(student, teacher)
        tensor(0.9343)

    References:
        Kornblith et al. 2019, equation 4, arXiv:1905.00414; with the biased estimate of HSIC.
    """
    return of_counted(_misalignment, *prepare_examples(student, teacher, mask))


def normalized_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of the two models' channel vectors, each of length one.

    .. math:: \frac{1}{C} \sum_c \left( \frac{f^s_c}{\|f^s\|_2} - \frac{f^t_c}{\|f^t\|_2} \right)^2

    Averaged over the positions. It is 2 / C times one minus the cosine. A vector of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean squared difference, at most 4 / C, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the channel dimension is missing.

    Example:
        >>> import torch
        >>> normalized_mse(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
        tensor([0.4000, 1.0000])

    References:
        Sun et al. 2019 (Patient KD), equation 7, arXiv:1908.09355; deviation: the mean over the channels, as in the
        authors' code, where the equation has the sum.
    """
    student, teacher, positions = prepare_equal(student, teacher, mask)
    dim = channels_at(student)
    return over_numbers(F.mse_loss(unit(student, dim), unit(teacher, dim), reduction="none"), dim, positions, reduction)


def feature_map_transfer(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-12, mask: Tensor | None = None, reduction: Reduction = "none"
) -> Tensor:
    r"""Mean squared difference of the two features after a layer normalisation without weights.

    .. math:: \frac{1}{C} \sum_c (\hat f^s_c - \hat f^t_c)^2, \qquad
        \hat f_c = \frac{f_c - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Mean and (biased) variance are those of one position's channels. Averaged over the positions.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        eps: Added to the variance, at least 0.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the positions that count.

    Returns:
        Mean squared difference, from 0 to 4, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``eps`` is not a number.
        ValueError: If the shapes differ, the channel dimension is missing or ``eps`` is less than 0.

    Example:
        >>> import torch
        >>> feature_map_transfer(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 4.0, 2.0]]))
        tensor([1.0000])

    References:
        Sun et al. 2020 (MobileBERT), section 3.5 and equation 2, arXiv:2004.02984: the discrepancy of the normalised
        feature maps, not that of their statistics; deviation: a vector that is constant up to rounding becomes zero
        and gets no gradient, because dividing by the root of a tiny eps would overflow half precision.
    """
    checks.non_negative("eps", eps)
    student, teacher, positions = prepare_equal(student, teacher, mask)
    dim = channels_at(student)
    scores = [standardized(feature, dim, count=feature.shape[dim], eps=eps) for feature in (student, teacher)]
    return over_numbers(F.mse_loss(scores[0], scores[1], reduction="none"), dim, positions, reduction)


def _pearson(student: Tensor, teacher: Tensor) -> Tensor:
    dim = channels_at(student) % student.ndim
    others = tuple(i for i in range(student.ndim) if i != dim)
    count = max(student.numel() // student.shape[dim] - 1, 1)
    scores = [standardized(feature, others, count=count, added=_PEARSON_EPS) for feature in (student, teacher)]
    return F.mse_loss(scores[0], scores[1]) / 2


def _discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    positions, channels = student.shape[2], (student.shape[1], teacher.shape[1])
    if positions <= max(channels):
        # The same sums as traces: sum_ij (a_i . b_j)^2 = <A^T A, B^T B>, which the fewer positions keep small.
        grams = [gram(matrix.mT) / matrix.shape[1] for matrix in (student, teacher)]
        return (grams[0] - grams[1]).square().sum(dim=(1, 2))
    within = [gram(matrix).square().mean(dim=(1, 2)) for matrix in (student, teacher)]
    return within[0] + within[1] - 2 * product(student, teacher.mT).square().mean(dim=(1, 2))


def _misalignment(student: Tensor, teacher: Tensor) -> Tensor:
    # <X X^T, Y Y^T> is the same number as |Y^T X|^2, from matrices of N^2 instead of D^2 elements.
    kernels = [unit(relative_gram(centred(feature, 0)).flatten(), dim=0) for feature in (student, teacher)]
    return 1 - (kernels[0] * kernels[1]).sum()
