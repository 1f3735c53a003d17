"""Formulas on one feature of each model: student first, channels last, no gradient into the teacher.

The distances that stand at every position take ``per_position=True``: one value per position, where a mask may follow.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_equal, prepare_temperature
from keras_distill.functional.primitives import huber, softmax_divergence
from keras_distill.functional.vectors import check_positions, or_one, per_example, unit

__all__ = [
    "attention_transfer",
    "channel_wise_kl",
    "feature_cosine",
    "feature_kl",
    "feature_l1",
    "feature_mse",
    "feature_smooth_l1",
]


def feature_mse(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""Mean squared difference of two features.

    .. math:: \frac{1}{D} \sum_d (f^s_d - f^t_d)^2

    The simplest way to make an inner layer of the student match the teacher's.

    Args:
        student: The student's feature, shape ``(N, ..., C)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        per_position: Whether only the channels are averaged.

    Returns:
        Mean squared difference, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> [float(value) for value in feature_mse([[1.0, 2.0], [0.0, 3.0]], [[1.0, 4.0], [0.0, 0.0]])]
        [2.0, 4.5]

    References:
        Romero et al. 2015 (FitNets), equation 3, arXiv:1412.6550; deviation: the mean, without the factor 1/2.
    """
    student, teacher = prepare_equal(student, teacher)
    return _mean(ops.square(student - teacher), per_position)


def feature_l1(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""Mean absolute difference of two features.

    .. math:: \frac{1}{D} \sum_d |f^s_d - f^t_d|

    A few large differences weigh less than in the mean squared difference.

    Args:
        student: The student's feature, shape ``(N, ..., C)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        per_position: Whether only the channels are averaged.

    Returns:
        Mean absolute difference, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> [float(value) for value in feature_l1([[1.0, 2.0], [0.0, 3.0]], [[1.0, 4.0], [0.0, 0.0]])]
        [1.0, 1.5]

    References:
        Romero et al. 2015 (FitNets), section 2.2, arXiv:1412.6550; deviation: absolute instead of squared differences.
    """
    student, teacher = prepare_equal(student, teacher)
    return _mean(ops.abs(student - teacher), per_position)


def feature_smooth_l1(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""Mean difference of two features, squared where it is small and absolute where it is large.

    .. math:: \frac{1}{D} \sum_d h(f^s_d - f^t_d), \qquad
        h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    The gradient is bounded as that of the absolute difference, and smooth at zero.

    Args:
        student: The student's feature, shape ``(N, ..., C)`` with D numbers per example.
        teacher: The teacher's feature, same shape.
        per_position: Whether only the channels are averaged.

    Returns:
        Mean difference, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> [float(value) for value in feature_smooth_l1([[1.0, 2.0], [0.0, 0.5]], [[1.0, 4.0], [0.0, 0.0]])]
        [0.75, 0.0625]

    References:
        Girshick 2015 (Fast R-CNN), equation 3, arXiv:1504.08083.
    """
    student, teacher = prepare_equal(student, teacher)
    return _mean(huber(student - teacher), per_position)


def feature_cosine(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""One minus the cosine of the angle between the two models' channel vectors, averaged over the positions.

    .. math:: 1 - \frac{f^s \cdot f^t}{\|f^s\| \, \|f^t\|}

    Only directions are compared: the student need not copy the size of the teacher's features. A vector of zeros has no
    direction; its cosine counts as 0 and its gradient points along the teacher's direction.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.
        teacher: The teacher's feature, same shape.
        per_position: Whether the positions are left as they are.

    Returns:
        Values from 0 (same direction) to 2 (opposite), shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ.

    Example:
        >>> [round(float(value), 4) for value in feature_cosine([[3.0, 4.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 5.0]])]
        [0.4, 1.0]

    References:
        Sanh et al. 2019 (DistilBERT), section 2, arXiv:1910.01108.
    """
    student, teacher = prepare_equal(student, teacher)
    values = 1.0 - ops.sum(unit(student, -1) * unit(teacher, -1), axis=-1)
    return values if per_position else per_example(values)


def feature_kl(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""Kullback-Leibler divergence between the softmaxes of two features over their channels, averaged over positions.

    .. math:: \sum_c q^t_c (\log q^t_c - \log q^s_c), \qquad q = \mathrm{softmax}(f)

    It compares which channel is active, not how strong all channels are together.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``; C of 2 or more.
        teacher: The teacher's feature, same shape.
        per_position: Whether the positions are left as they are.

    Returns:
        Divergence in nats, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or there are fewer than two channels.

    Example:
        >>> round(float(feature_kl([[0.0, 1.0, 3.0]], [[2.0, 1.0, 0.0]])[0]), 4)
        1.8226

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531, at temperature 1 and on a feature instead of logits.
    """
    student, teacher = prepare_equal(student, teacher)
    if student.shape[-1] == 1:
        # The softmax over one channel is always 1: the loss would be zero for any student.
        raise ValueError(checks.message("`student` to have at least 2 channels", f"shape {tuple(student.shape)}"))
    values = softmax_divergence(student, teacher)
    return values if per_position else per_example(values)


def attention_transfer(student: Any, teacher: Any, *, p: float = 2.0) -> Any:
    r"""Mean squared difference of the two models' normalised maps of attention.

    .. math:: \frac{1}{P} \sum_{i=1}^{P} \left( \frac{Q^s_i}{\|Q^s\|_2} - \frac{Q^t_i}{\|Q^t\|_2} \right)^2, \qquad
        Q_i = \frac{1}{C} \sum_c |f_{c,i}|^p

    It compares where a model is active, not in which channels, so the numbers of channels may differ. The usual weight
    of the term is 1000. A map of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, H, W, C_s)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        p: Power of the activations, at least 1; larger values stress the strongest positions.

    Returns:
        Mean squared difference, at most 2 / P, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``p`` is not a number.
        ValueError: If the positions differ, there is only one, or ``p`` is less than 1.

    Example:
        >>> round(float(attention_transfer([[[[1.0], [2.0]]]], [[[[1.0, 1.0], [0.0, 0.0]]]])[0]), 4)
        0.7575

    References:
        Zagoruyko and Komodakis 2017, equation 2, arXiv:1612.03928; deviation: the mean of the squared differences
        over the positions, as in the authors' code, where the equation has half the norm.
    """
    checks.at_least("p", p, 1)
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    difference = unit(_attention_map(student, p), -1) - unit(_attention_map(teacher, p), -1)
    return ops.mean(ops.square(difference), axis=-1)


def channel_wise_kl(student: Any, teacher: Any, *, temperature: Any = 4.0) -> Any:
    r"""Divergence between the two models' softmaxes over the positions of each channel, averaged over the channels.

    .. math:: \frac{T^2}{C} \sum_c \sum_i q^t_{c,i} (\log q^t_{c,i} - \log q^s_{c,i}), \qquad
        q_{c,i} = \frac{\exp(f_{c,i} / T)}{\sum_j \exp(f_{c,j} / T)}

    It compares where each channel is active: in dense prediction a channel, or the map of a class, marks a region.

    Args:
        student: The student's feature or map of logits, shape ``(N, H, W, C)`` or ``(N, L, C)``, with more than one
            position.
        teacher: The teacher's, same shape.
        temperature: Softening of both distributions over the positions, greater than 0; a scalar variable may be
            changed while training.

    Returns:
        Divergence in nats times :math:`T^2`, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the temperature is not a number.
        ValueError: If the shapes differ, there is only one position, or the temperature is not greater than 0.

    Example:
        >>> student = [[[0.0, 1.0], [1.0, 1.0], [3.0, 0.0]]]
        >>> teacher = [[[2.0, 4.0], [1.0, 0.0], [0.0, 1.0]]]
        >>> round(float(channel_wise_kl(student, teacher, temperature=2.0)[0]), 4)
        1.5985

    References:
        Shu et al. 2021, equations 4 and 5, arXiv:2011.13256.
    """
    student, teacher = prepare_equal(student, teacher)
    temperature = prepare_temperature(temperature, student)
    check_positions(student, teacher)
    positions = (ops.shape(student)[0], -1, ops.shape(student)[-1])
    student, teacher = (ops.reshape(maps, positions) / temperature for maps in (student, teacher))
    return ops.mean(softmax_divergence(student, teacher, axis=1), axis=-1) * temperature**2


def _mean(values: Any, per_position: bool) -> Any:
    if per_position:
        return ops.mean(values, axis=-1) if len(values.shape) > 1 else values
    return per_example(values)


def _attention_map(feature: Any, p: float) -> Any:
    # The normalised map does not change with the size of the feature: dividing by the largest activation costs nothing
    # and keeps the power, and the square of it, within float32.
    everything = tuple(range(1, len(feature.shape)))
    feature = feature / or_one(ops.max(ops.abs(ops.stop_gradient(feature)), axis=everything, keepdims=True))
    size = ops.abs(feature)
    powered = ops.square(size) if p == 2 else size if p == 1 else ops.power(size, p)
    attention = ops.mean(powered, axis=-1)
    return ops.reshape(attention, (ops.shape(attention)[0], -1))
