"""Formulas on one feature of each model: student first, one value per example, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch  # noqa: F401 - the examples use it
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.primitives import softmax_divergence, sum_of_squares
from lightning_distill.functional.vectors import (
    channel_maps,
    channels_at,
    check_positions,
    or_one,
    per_example,
    prepare_equal,
    unit,
)


def feature_mse(student: Tensor, teacher: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Mean squared difference of two features.

    .. math:: \frac{1}{D} \sum_d (f^s_d - f^t_d)^2

    The plainest way to make an inner layer of the student give what the teacher's gives.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Mean squared difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is no floating point tensor.
        ValueError: If the shapes differ or there is no such reduction.

    Example:
        >>> feature_mse(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([2.0000, 4.5000])

    References:
        Romero et al. 2015 (FitNets), equation 3, arXiv:1412.6550; deviation: the mean, without the factor 1/2.
    """
    return _distance(F.mse_loss, student, teacher, reduction)


def feature_l1(student: Tensor, teacher: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Mean absolute difference of two features.

    .. math:: \frac{1}{D} \sum_d |f^s_d - f^t_d|

    A few large differences weigh less than in the mean squared difference.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Mean absolute difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is no floating point tensor.
        ValueError: If the shapes differ or there is no such reduction.

    Example:
        >>> feature_l1(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([1.0000, 1.5000])

    References:
        Romero et al. 2015 (FitNets), section 2.2, arXiv:1412.6550; deviation: absolute instead of squared differences.
    """
    return _distance(F.l1_loss, student, teacher, reduction)


def feature_smooth_l1(student: Tensor, teacher: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Mean difference of two features, squared where it is small and absolute where it is large.

    .. math:: \frac{1}{D} \sum_d h(f^s_d - f^t_d), \qquad
        h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    The gradient is bounded as that of the absolute difference, and smooth at zero.

    Args:
        student: The student's feature, shape ``(N, ...)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Mean difference, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is no floating point tensor.
        ValueError: If the shapes differ or there is no such reduction.

    Example:
        >>> feature_smooth_l1(torch.tensor([[1.0, 2.0], [0.0, 0.5]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor([0.7500, 0.0625])

    References:
        Girshick 2015 (Fast R-CNN), equation 3, arXiv:1504.08083.
    """
    return _distance(F.smooth_l1_loss, student, teacher, reduction)


def feature_cosine(student: Tensor, teacher: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""One minus the cosine of the angle between the two models' channel vectors, averaged over the positions.

    .. math:: 1 - \frac{f^s \cdot f^t}{\|f^s\| \, \|f^t\|}

    Only directions are compared: the student need not copy the size of the teacher's features. A vector of zeros has no
    direction; its cosine counts as 0 and its gradient points along the teacher's direction.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        channel_dim: Dimension of the vectors; None means 1 for tensors of four or more dimensions, else the last.

    Returns:
        Values from 0 (same direction) to 2 (opposite), shape ``(N,)``.

    Raises:
        TypeError: If a feature is no floating point tensor, or ``channel_dim`` is no int.
        ValueError: If the shapes differ or ``channel_dim`` is no inner dimension.

    Example:
        >>> feature_cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
        tensor([0.4000, 1.0000])

    References:
        Sanh et al. 2019 (DistilBERT), section 2, arXiv:1910.01108.
    """
    student, teacher = prepare_equal(student, teacher)
    dim = channels_at(student, channel_dim)
    cosine = (unit(student, dim) * unit(teacher, dim)).sum(dim=dim)
    return per_example(1 - cosine)


def feature_kl(student: Tensor, teacher: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Kullback-Leibler divergence between the softmaxes of two features over their channels, averaged over positions.

    .. math:: \sum_c q^t_c (\log q^t_c - \log q^s_c), \qquad q = \mathrm{softmax}(f)

    Which channel is active is compared, not how strongly all of them are.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``; C of 2 or more.
        teacher: The teacher's feature, same shape.
        channel_dim: Dimension of the softmax; None means 1 for tensors of four or more dimensions, else the last.

    Returns:
        Divergence in nats, shape ``(N,)``.

    Raises:
        TypeError: If a feature is no floating point tensor, or ``channel_dim`` is no int.
        ValueError: If the shapes differ, ``channel_dim`` is no inner dimension or there are fewer than two channels.

    Example:
        >>> feature_kl(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[2.0, 1.0, 0.0]]))
        tensor([1.8226])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531, at temperature 1 and on a feature instead of logits.
    """
    student, teacher = prepare_equal(student, teacher)
    dim = channels_at(student, channel_dim)
    if student.shape[dim] < 2:
        # The softmax over one channel is always 1: the loss would be zero whatever the student does.
        expected = f"`student` to have at least 2 channels at dimension {dim}"
        raise ValueError(checks.message(expected, f"shape {tuple(student.shape)}", "Pass another channel_dim."))
    return per_example(softmax_divergence(student, teacher, dim))


def attention_transfer(student: Tensor, teacher: Tensor, *, p: float = 2.0) -> Tensor:
    r"""Mean squared difference of the two models' normalised maps of attention.

    .. math:: \frac{1}{P} \sum_{i=1}^{P} \left( \frac{Q^s_i}{\|Q^s\|_2} - \frac{Q^t_i}{\|Q^t\|_2} \right)^2, \qquad
        Q_i = \frac{1}{C} \sum_c |f_{c,i}|^p

    Where a model is active is compared, not in which channels: the two may differ in their number. The usual weight of
    the term is 1000. A map of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        p: Power of the activations, at least 1; larger values stress the strongest positions.

    Returns:
        Mean squared difference, at most 2 / P, shape ``(N,)``.

    Raises:
        TypeError: If a feature is no floating point tensor, or ``p`` is no number.
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
    attention = [unit(_attention_map(feature, p), dim=1) for feature in (student, teacher)]
    return (attention[0] - attention[1]).square().mean(dim=1)


def channel_wise_kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Divergence between the two models' softmaxes over the positions of each channel, averaged over the channels.

    .. math:: \frac{T^2}{C} \sum_c \sum_i q^t_{c,i} (\log q^t_{c,i} - \log q^s_{c,i}), \qquad
        q_{c,i} = \frac{\exp(f_{c,i} / T)}{\sum_j \exp(f_{c,j} / T)}

    Where each channel is active is compared: in dense prediction a channel, or the map of a class, marks a region.

    Args:
        student: The student's feature or map of logits, shape ``(N, C, H, W)`` or ``(N, L, C)``, with more than one
            position.
        teacher: The teacher's, same shape.
        temperature: Softening of both distributions over the positions, greater than 0.

    Returns:
        Divergence in nats times :math:`T^2`, shape ``(N,)``.

    Raises:
        TypeError: If a feature is no floating point tensor, or the temperature is no number.
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
    student, teacher = prepare_equal(student, teacher)
    check_positions(student, teacher)
    student, teacher = (channel_maps(maps) / temperature for maps in (student, teacher))
    return softmax_divergence(student, teacher, dim=2).mean(dim=1) * temperature**2


def _distance(kernel: Callable[..., Tensor], student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    student, teacher = prepare_equal(student, teacher)
    if reduction == "mean":  # every example has D numbers, so one kernel gives the mean of the examples' means
        return kernel(student, teacher, reduction="mean")
    checks.one_of("reduction", reduction, ("none", "mean"))
    return per_example(kernel(student, teacher, reduction="none"))


def _attention_map(feature: Tensor, p: float) -> Tensor:
    # The normalised map does not change with the size of what it is made of: dividing by the largest number keeps the
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
