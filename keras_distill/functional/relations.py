"""Formulas on the relations between the examples, or the channels, of a batch: student first, channels last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import epsilon_of, prepare, prepare_equal
from keras_distill.functional.primitives import huber
from keras_distill.functional.vectors import (
    by_rows,
    centred,
    flattened,
    gram,
    or_one,
    per_example,
    prepare_examples,
    relative_gram,
    transposed,
    unit,
)

__all__ = [
    "correlation_congruence",
    "inter_channel_correlation",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
]

_TRANSFER_EPS = 1e-7
KERNELS = ("gaussian", "neighbour")


def similarity_preserving(student: Any, teacher: Any) -> Any:
    r"""Mean squared difference of the two models' similarities between the examples.

    .. math:: \frac{1}{N^2} \sum_{i,j} (\hat G^s_{ij} - \hat G^t_{ij})^2, \qquad G = F F^\top, \quad
        \hat G_i = G_i / \|G_i\|_2

    F has one row per example: examples that are similar for the teacher should be similar for the student.
    The usual weight is 3000. A row of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        One value for the whole batch, at most 4 / N, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> round(float(similarity_preserving([[1.0, 0.0], [0.0, 2.0]], [[3.0], [4.0]])), 4)
        0.3

    References:
        Tung and Mori 2019, equation 4, arXiv:1907.09682, for one pair of layers.
    """
    student, teacher = prepare_examples(student, teacher)
    rows = [unit(relative_gram(feature), 1) for feature in (student, teacher)]
    return ops.mean(ops.square(rows[0] - rows[1]))


def relational_distance(student: Any, teacher: Any) -> Any:
    r"""Mean Huber difference of the two models' distances between the examples, divided by each model's mean.

    .. math:: \frac{1}{N^2} \sum_{i,j} h\left( \frac{d^s_{ij}}{\mu^s} - \frac{d^t_{ij}}{\mu^t} \right), \qquad
        d_{ij} = \|f_i - f_j\|_2, \quad h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    The mean distance is over the pairs with a distance above 0. Shifts, rotations and one common factor of a model's
    features change nothing. The usual weight is 25.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        One value for the whole batch, shape ``()``; the N pairs of an example with itself count as zeros.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> round(float(relational_distance([[0.0], [1.0], [3.0]], [[0.0], [1.0], [2.0]])), 4)
        0.0139

    References:
        Park et al. 2019, equations 5 to 8, arXiv:1904.05068; deviation, as in the authors' code: the mean over all
        pairs, where the paper has the sum over pairs of different examples.
    """
    student, teacher = prepare_examples(student, teacher)
    return _distance_differences([_distances(feature)[1] for feature in (student, teacher)])


def relational_angle(student: Any, teacher: Any) -> Any:
    r"""Mean Huber difference of the two models' angles between the examples.

    .. math:: \frac{1}{N^3} \sum_{i,j,k} h(\cos^s_{ijk} - \cos^t_{ijk}), \qquad
        \cos_{ijk} = \frac{(f_j - f_i) \cdot (f_k - f_i)}{\|f_j - f_i\| \, \|f_k - f_i\|}, \quad
        h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    It compares the angle between two examples as seen from a third. Shifts, rotations and one common factor of a
    model's features change nothing. Where two of the three coincide the cosine is 0. The usual weight is 50.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        One value for the whole batch, shape ``()``; all N^3 triples count, degenerate ones as zeros.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> student = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        >>> round(float(relational_angle(student, [[0.0], [1.0], [2.0]])), 4)
        0.1296

    References:
        Park et al. 2019, equations 8 to 10, arXiv:1904.05068; deviation, as in the authors' code: the mean over all
        triples, where the paper has the sum over triples of different examples.
    """
    student, teacher = prepare_examples(student, teacher)
    return _angle_differences([_distances(feature) for feature in (student, teacher)])


def relational_distance_and_angle(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Both relations between the examples, from the same products.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        The values of :func:`relational_distance` and :func:`relational_angle`.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.
    """
    student, teacher = prepare_examples(student, teacher)
    seen = [_distances(feature) for feature in (student, teacher)]
    return _distance_differences([distances for _, distances in seen]), _angle_differences(seen)


def probabilistic_transfer(student: Any, teacher: Any) -> Any:
    r"""Divergence of the two models' probabilities that one example is the neighbour of another.

    .. math:: \frac{1}{N^2} \sum_{i,j} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \qquad
        p_{ij} = \frac{k_{ij}}{\sum_m k_{im}}, \quad k_{ij} = \tfrac{1}{2} (\cos(f_i, f_j) + 1)

    With :math:`\epsilon = 10^{-7}`, also added to the lengths in the cosine. The values are small: the usual weight is
    30000.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        One value in nats for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> round(float(probabilistic_transfer([[1.0, 0.0], [0.0, 2.0]], [[3.0], [4.0]])), 4)
        0.0294

    References:
        Passalis and Tefas 2018, equations 3 to 7, arXiv:1803.10837; deviations, as in the authors' code: the mean over
        all pairs, an example with itself included, where the paper has the sum over pairs of different examples.
    """
    student, teacher = prepare_examples(student, teacher)
    probabilities = []
    for feature in (student, teacher):
        kernel = ops.maximum(_cosines(feature, eps=_TRANSFER_EPS) + 1, 0.0) / 2  # rounding may take a cosine below -1
        probabilities.append(kernel / ops.sum(kernel, axis=1, keepdims=True))
    logarithms = [ops.log(probability + _TRANSFER_EPS) for probability in probabilities]
    return ops.mean(probabilities[1] * (logarithms[1] - logarithms[0]))


def correlation_congruence(
    student: Any, teacher: Any, *, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> Any:
    r"""Mean squared difference of the two models' correlations between the examples.

    .. math:: \frac{1}{N^2} \sum_{i,j} (K^s_{ij} - K^t_{ij})^2, \qquad
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} (\hat f_i \cdot \hat f_j)^p, \quad
        \hat f = f / \|f\|_2

    K is the Taylor series of the Gaussian kernel :math:`e^{-\gamma \|\hat f_i - \hat f_j\|^2}`. The second form, from
    the published code, multiplies the errors of neighbouring examples, so it depends on the order of the batch:

    .. math:: \frac{1}{N - 1} \sum_{n=1}^{N-1} \sum_d |f^s_{nd} - f^t_{nd}| \, |f^s_{n+1,d} - f^t_{n+1,d}|

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; for the neighbours, the student's shape.
        kernel: "gaussian" for the first form, "neighbour" for the second.
        gamma: Inverse squared width of the Gaussian, greater than 0.
        order: Highest power P of the series, at least 1.

    Returns:
        One value for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting has the wrong type.
        ValueError: If the numbers of examples (or the shapes) differ, or a setting is out of its range.

    Example:
        >>> student, teacher = [[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [4.0, 4.0]]
        >>> round(float(correlation_congruence(student, teacher)), 4)
        0.0532
        >>> float(correlation_congruence(student, teacher, kernel="neighbour"))
        8.0

    References:
        Peng et al. 2019, equations 6 to 10, arXiv:1904.01802. "neighbour": the authors' code as RepDistiller has it,
        there with a weight of 0.02.
    """
    checks.one_of("kernel", kernel, KERNELS)
    checks.positive("gamma", gamma)
    checks.at_least("order", order, 1)
    if kernel == "neighbour":
        student, teacher = prepare_examples(*prepare_equal(student, teacher))
        errors = ops.abs(student - teacher)
        pairs = ops.maximum(ops.shape(errors)[0] - 1, 1)
        return ops.sum(ops.einsum("nd,nd->n", errors[1:], errors[:-1])) / ops.cast(pairs, errors.dtype)
    student, teacher = prepare_examples(student, teacher)
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** power / math.factorial(power) for power in range(order + 1)]
    kernels = []
    for feature in (student, teacher):
        cosines = _cosines(feature)
        value = ops.full_like(cosines, factors[-1])
        for factor in reversed(factors[:-1]):
            value = value * cosines + factor
        kernels.append(value)
    return ops.mean(ops.square(kernels[0] - kernels[1]))


def inter_channel_correlation(student: Any, teacher: Any) -> Any:
    r"""Mean squared difference of the two models' correlations between the channels.

    .. math:: \frac{1}{C^2} \sum_{i,j} (\hat G^s_{ij} - \hat G^t_{ij})^2, \qquad G = F F^\top, \quad
        \hat G_i = G_i / \|G_i\|_2

    F has one row per channel, which holds the channel's map. It compares how diverse the channels are and which of them
    are active together. The authors' weight of 2.5 is 2.5 C here. A row of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, H, W, C)`` or ``(N, L, C)``.
        teacher: The teacher's feature, same N and C; the positions may differ.

    Returns:
        Mean squared difference, at most 4 / C, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the examples or channels differ, or a feature has no positions.

    Example:
        >>> value = inter_channel_correlation([[[[1.0, 0.0], [0.0, 2.0]]]], [[[[3.0, 4.0]]]])
        >>> round(float(value[0]), 4)
        0.3

    References:
        Liu et al. 2021, equations 2 to 4, arXiv:2202.03680; deviations: rows of length one, as in the authors' code,
        and the mean over examples and pairs of channels, as in equation 4, where that code divides by N C.
    """
    student, teacher = prepare(student, teacher)
    student_shape, teacher_shape = tuple(student.shape), tuple(teacher.shape)
    if min(len(student_shape), len(teacher_shape)) < 3 or checks.shapes_differ(
        (student_shape[0], student_shape[-1]), (teacher_shape[0], teacher_shape[-1])
    ):
        expected = "`student` and `teacher` to have the same numbers of examples and channels, and to have positions"
        remedy = "Map the student's channels with an adapter."
        raise ValueError(checks.message(expected, f"{student_shape} and {teacher_shape}", remedy))
    maps = [flattened(feature, 1, -1) for feature in (student, teacher)]
    return by_rows(_channel_differences, maps, row_size=student_shape[-1] ** 2)


def _channel_differences(student: Any, teacher: Any) -> Any:
    grams = [unit(relative_gram(transposed(maps)), 2) for maps in (student, teacher)]
    return ops.mean(ops.square(grams[0] - grams[1]), axis=(1, 2))


def _cosines(feature: Any, *, eps: float = 0.0) -> Any:
    """Cosines between the examples, ``eps`` added to their lengths; 0 where one of the two is a vector of zeros."""
    products = gram(feature)
    # The lengths are divided out of the N^2 products instead of the N D numbers, which would take copies of them.
    inverse = 1 / (ops.sqrt(or_one(ops.diagonal(products))) + eps)
    return products * inverse[:, None] * inverse[None, :]


def _distances(feature: Any) -> tuple[Any, Any]:
    """Products of the centred examples, and the distances between them: 0 where they coincide up to rounding."""
    # Centred first: distances do not change, and their differences lose fewer digits.
    products = gram(centred(feature, 0))
    sizes = ops.diagonal(products)
    sums = sizes[:, None] + sizes[None, :]
    squares = sums - 2 * products
    apart = squares > 4 * epsilon_of(products) * sums
    # The root has no gradient at zero: it is taken of 1 there, and the result dropped.
    roots = ops.sqrt(ops.where(apart, squares, ops.ones_like(squares)))
    return products, ops.where(apart, roots, ops.zeros_like(roots))


def _distance_differences(distances: Sequence[Any]) -> Any:
    ratios = []
    for each in distances:
        pairs = ops.sum(ops.cast(each > 0, each.dtype))
        ratios.append(each / or_one(ops.sum(each) / or_one(pairs)))
    return ops.mean(huber(ratios[0] - ratios[1]))


def _angle_differences(seen: Sequence[tuple[Any, Any]]) -> Any:
    rows = []
    for products, distances in seen:
        # One row for each anchor, an example that others are seen from: the products with it less half its square, and
        # the inverse distances to it.
        rows += [
            transposed(products - ops.diagonal(products)[None, :] / 2),
            ops.where(distances > 0, 1 / or_one(distances), ops.zeros_like(distances)),
        ]
    grams = [products for products, _ in seen]
    return ops.mean(by_rows(_differences_from_anchors, rows, grams, row_size=ops.shape(grams[0])[0] ** 2))


def _differences_from_anchors(student: Any, teacher: Any, *rows: Any) -> Any:
    cosines = []
    for between, to_anchor, inverse in ((student, *rows[:2]), (teacher, *rows[2:])):
        # (f_j - f_i) . (f_k - f_i) from the products alone: the differences themselves would take N^2 D numbers.
        products = between - to_anchor[:, :, None] - to_anchor[:, None, :]
        cosines.append(products * inverse[:, :, None] * inverse[:, None, :])
    return per_example(huber(cosines[0] - cosines[1]))
