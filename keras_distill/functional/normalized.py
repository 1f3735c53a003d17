"""Formulas on features that are normalised first: student first, channels last, no gradient into the teacher."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_equal
from keras_distill.functional.vectors import (
    centred,
    check_positions,
    flattened,
    or_one,
    per_example,
    prepare_examples,
    spread_or_one,
    transposed,
    unit,
)

__all__ = [
    "centered_kernel_alignment",
    "feature_map_transfer",
    "neuron_selectivity",
    "normalized_mse",
    "pearson_feature",
]

_PEARSON_EPS = 1e-6


def pearson_feature(student: Any, teacher: Any) -> Any:
    r"""Half the mean squared difference of the two features' z-scores, each channel over examples and positions.

    .. math:: \frac{1}{2 M} \sum_{n,i,c} (\hat f^s_{nic} - \hat f^t_{nic})^2, \qquad
        \hat f_{nic} = \frac{f_{nic} - \mu_c}{\sigma_c + 10^{-6}}

    M is the number of elements. Up to the factor (M_c - 1) / M_c, with M_c numbers a channel, it is one minus Pearson's
    correlation: the student need not copy the mean or the size of a channel. A channel that is constant over the batch
    counts as zero and gets no gradient.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.
        teacher: The teacher's feature, same shape.

    Returns:
        One value from 0 (same up to mean and size) to 2 for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the channel dimension is missing.

    Example:
        >>> round(float(pearson_feature([[0.0], [1.0], [2.0]], [[0.0], [4.0], [2.0]])), 4)
        0.3333

    References:
        Cao et al. 2022 (PKD), section 3, arXiv:2207.02039, with the unbiased standard deviation plus 1e-6 of the
        authors' code; deviation: a constant channel is not divided, because dividing by 1e-6 would give gradients that
        overflow half precision.
    """
    student, teacher = _with_channels(student, teacher)
    others = tuple(range(len(student.shape) - 1))
    count = 1
    for size in ops.shape(student)[:-1]:
        count = count * size
    count = ops.cast(ops.maximum(count - 1, 1), student.dtype)
    scores = []
    for feature in (student, teacher):
        difference = centred(feature, others)
        # the product with the inverse has a cheaper gradient than the quotient
        scores.append(difference * (1 / (spread_or_one(difference, others, count=count) + _PEARSON_EPS)))
    return ops.mean(ops.square(scores[0] - scores[1])) / 2


def neuron_selectivity(student: Any, teacher: Any) -> Any:
    r"""Squared maximum mean discrepancy of the two models' channels, with a polynomial kernel on their maps.

    .. math:: \frac{1}{C_s^2} \sum_{i,j} k(s_i, s_j) + \frac{1}{C_t^2} \sum_{i,j} k(t_i, t_j)
        - \frac{2}{C_s C_t} \sum_{i,j} k(s_i, t_j), \qquad k(a, b) = \left(\frac{a \cdot b}{\|a\| \|b\|}\right)^2

    s_i and t_j are the maps of single channels: where in the image each neuron is active. The two sets of maps are
    compared as distributions, so the number and the order of the channels do not matter. The usual weight is 50.

    Args:
        student: The student's feature, shape ``(N, H, W, C_s)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.

    Returns:
        Discrepancy, at least 0, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the positions differ or there is only one.

    Example:
        >>> discrepancy = neuron_selectivity([[[[3.0], [4.0]]]], [[[[1.0, 2.0], [0.0, 0.0]]]])
        >>> round(float(discrepancy[0]), 4)
        1.28

    References:
        Huang and Wang 2017, section 4, arXiv:1707.01219, with the polynomial kernel of d = 2 and c = 0; deviation:
        without the factor 1/2 that the paper gives its term.
    """
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    maps = [unit(flattened(feature, 1, -1), 1) for feature in (student, teacher)]
    positions, channels = maps[0].shape[1], (maps[0].shape[2], maps[1].shape[2])
    if None not in (positions, *channels) and positions <= max(channels):
        # The same sums as traces: sum_ij (a_i . b_j)^2 = <A A^T, B B^T>, which the fewer positions keep small.
        grams = [ops.matmul(matrix, transposed(matrix)) / matrix.shape[2] for matrix in maps]
        return ops.sum(ops.square(grams[0] - grams[1]), axis=(1, 2))
    kernels = [_mean_square_products(*pair) for pair in ((maps[0], maps[0]), (maps[1], maps[1]), (maps[0], maps[1]))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


def centered_kernel_alignment(student: Any, teacher: Any) -> Any:
    r"""One minus the linear centred kernel alignment (CKA) of the two models' features.

    .. math:: 1 - \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    X and Y are the features of the batch, one row per example, their columns centred. Rotations, reflections and one
    common factor of a model's features change nothing. Features that are the same for all examples have alignment 0.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        One value from 0 (aligned) to 1 for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> student, teacher = [[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]], [[1.0], [0.0], [4.0]]
        >>> round(float(centered_kernel_alignment(student, teacher)), 4)
        0.9343

    References:
        Kornblith et al. 2019, equation 4, arXiv:1905.00414; with the biased estimate of HSIC.
    """
    student, teacher = prepare_examples(student, teacher)
    # <X X^T, Y Y^T> is the same number as |Y^T X|^2, from matrices of N^2 instead of D^2 elements.
    kernels = []
    for feature in (student, teacher):
        columns = centred(feature, 0)
        columns = columns / or_one(ops.max(ops.abs(ops.stop_gradient(columns))))
        kernels.append(unit(ops.reshape(ops.matmul(columns, transposed(columns)), (-1,)), 0))
    return 1 - ops.sum(kernels[0] * kernels[1])


def normalized_mse(student: Any, teacher: Any, *, per_position: bool = False) -> Any:
    r"""Mean squared difference of the two models' channel vectors, each of length one.

    .. math:: \frac{1}{C} \sum_c \left( \frac{f^s_c}{\|f^s\|_2} - \frac{f^t_c}{\|f^t\|_2} \right)^2

    Averaged over the positions. It is 2 / C times one minus the cosine. A vector of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.
        teacher: The teacher's feature, same shape.
        per_position: Whether the positions are left as they are.

    Returns:
        Mean squared difference, at most 4 / C, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the channel dimension is missing.

    Example:
        >>> [round(float(value), 4) for value in normalized_mse([[3.0, 4.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 5.0]])]
        [0.4, 1.0]

    References:
        Sun et al. 2019 (Patient KD), equation 7, arXiv:1908.09355; deviation: the mean over the channels, as in the
        authors' code, where the equation has the sum.
    """
    student, teacher = _with_channels(student, teacher)
    values = ops.mean(ops.square(unit(student, -1) - unit(teacher, -1)), axis=-1)
    return values if per_position else per_example(values)


def feature_map_transfer(student: Any, teacher: Any, *, eps: float = 1e-12, per_position: bool = False) -> Any:
    r"""Mean squared difference of the two features after a layer normalisation without weights.

    .. math:: \frac{1}{C} \sum_c (\hat f^s_c - \hat f^t_c)^2, \qquad
        \hat f_c = \frac{f_c - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Mean and (biased) variance are those of one position's channels. Averaged over the positions.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.
        teacher: The teacher's feature, same shape.
        eps: Added to the variance, at least 0.
        per_position: Whether the positions are left as they are.

    Returns:
        Mean squared difference, from 0 to 4, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor, or ``eps`` is not a number.
        ValueError: If the shapes differ, the channel dimension is missing or ``eps`` is less than 0.

    Example:
        >>> round(float(feature_map_transfer([[1.0, 2.0, 3.0]], [[0.0, 4.0, 2.0]])[0]), 4)
        1.0

    References:
        Sun et al. 2020 (MobileBERT), section 3.5 and equation 2, arXiv:2004.02984: the discrepancy of the normalised
        feature maps, not that of their statistics; deviation: a vector that is constant up to rounding becomes zero
        and gets no gradient, because dividing by the root of a tiny eps would overflow half precision.
    """
    checks.non_negative("eps", eps)
    student, teacher = _with_channels(student, teacher)
    normalized = []
    for feature in (student, teacher):
        difference = centred(feature, -1)
        count = ops.cast(ops.shape(feature)[-1], feature.dtype)
        normalized.append(difference / spread_or_one(difference, -1, count=count, eps=eps))
    values = ops.mean(ops.square(normalized[0] - normalized[1]), axis=-1)
    return values if per_position else per_example(values)


def _with_channels(student: Any, teacher: Any) -> tuple[Any, Any]:
    student, teacher = prepare_equal(student, teacher)
    if len(student.shape) < 2:
        received = f"shape {tuple(student.shape)}"
        raise ValueError(checks.message("`student` to have a batch dimension and channels", received))
    return student, teacher


def _mean_square_products(left: Any, right: Any) -> Any:
    return ops.mean(ops.square(ops.matmul(transposed(left), right)), axis=(1, 2))
