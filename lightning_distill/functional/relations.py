"""Formulas on the relations between the examples, or the channels, of a batch: student first, a scalar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.chunks import summed
from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.primitives import centred, gram, or_one, unit
from lightning_distill.functional.vectors import (
    channel_maps,
    examples_of,
    of_counted,
    positions_mask,
    prepare_equal,
    prepare_examples,
    relative_gram,
    without,
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


def similarity_preserving(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the two models' similarities between the examples.

    .. math:: \frac{1}{N^2} \sum_{i,j} (\hat G^s_{ij} - \hat G^t_{ij})^2, \qquad G = F F^\top, \quad
        \hat G_i = G_i / \|G_i\|_2

    F has one row per example: examples that are similar for the teacher should be similar for the student.
    The usual weight is 3000. A row of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        One value for the whole batch, at most 4 / N, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> import torch
        >>> similarity_preserving(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor(0.3000)

    References:
        Tung and Mori 2019, equation 4, arXiv:1907.09682, for one pair of layers.
    """
    return of_counted(_similarity_differences, *prepare_examples(student, teacher, mask))


def relational_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean Huber difference of the two models' distances between the examples, divided by each model's mean.

    .. math:: \frac{1}{N^2} \sum_{i,j} h\left( \frac{d^s_{ij}}{\mu^s} - \frac{d^t_{ij}}{\mu^t} \right), \qquad
        d_{ij} = \|f_i - f_j\|_2, \quad h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    The mean distance is over the pairs with a distance above 0. Shifts, rotations and one common factor of a model's
    features change nothing. The usual weight is 25.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        One value for the whole batch, shape ``()``; the N pairs of an example with itself count as zeros.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> import torch
        >>> relational_distance(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]]))
        tensor(0.0139)

    References:
        Park et al. 2019, equations 5 to 8, arXiv:1904.05068; deviation, as in the authors' code: the mean over all
        pairs, where the paper has the sum over pairs of different examples.
    """
    return of_counted(_distance_part, *prepare_examples(student, teacher, mask))


def relational_angle(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean Huber difference of the two models' angles between the examples.

    .. math:: \frac{1}{N^3} \sum_{i,j,k} h(\cos^s_{ijk} - \cos^t_{ijk}), \qquad
        \cos_{ijk} = \frac{(f_j - f_i) \cdot (f_k - f_i)}{\|f_j - f_i\| \, \|f_k - f_i\|}, \quad
        h(x) = \tfrac{1}{2} x^2 \text{ if } |x| < 1 \text{ else } |x| - \tfrac{1}{2}

    It compares the angle between two examples as seen from a third. Shifts, rotations and one common factor of a
    model's features change nothing. Where two of the three coincide the cosine is 0. The usual weight is 50.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        One value for the whole batch, shape ``()``; all N^3 triples count, degenerate ones as zeros.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational_angle(student, torch.tensor([[0.0], [1.0], [2.0]]))
        tensor(0.1296)

    References:
        Park et al. 2019, equations 8 to 10, arXiv:1904.05068; deviation, as in the authors' code: the mean over all
        triples, where the paper has the sum over triples of different examples.
    """
    return of_counted(_angle_part, *prepare_examples(student, teacher, mask))


def relational_distance_and_angle(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both relations between the examples, from the same products.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        The values of :func:`relational_distance` and :func:`relational_angle`.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.
    """
    student, teacher = prepare_examples(student, teacher, mask)
    if not len(student):  # nothing counts
        return student.sum(), student.sum()
    seen = [_distances(feature) for feature in (student, teacher)]
    return _distance_differences([distances for _, distances in seen]), _angle_differences(seen, student.numel())


def probabilistic_transfer(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Divergence of the two models' probabilities that one example is the neighbour of another.

    .. math:: \frac{1}{N^2} \sum_{i,j} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \qquad
        p_{ij} = \frac{k_{ij}}{\sum_m k_{im}}, \quad k_{ij} = \tfrac{1}{2} (\cos(f_i, f_j) + 1)

    With :math:`\epsilon = 10^{-7}`, also added to the lengths in the cosine. The values are small: the usual weight is
    30000.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        One value in nats for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.

    Example:
        >>> import torch
        >>> probabilistic_transfer(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor(0.0294)

    References:
        Passalis and Tefas 2018, equations 3 to 7, arXiv:1803.10837; deviations, as in the authors' code: the mean over
        all pairs, an example with itself included, where the paper has the sum over pairs of different examples.
    """
    return of_counted(_neighbour_divergence, *prepare_examples(student, teacher, mask))


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    mask: Tensor | None = None,
) -> Tensor:
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
        mask: True where an example counts, shape ``(N,)``; None where all count.

    Returns:
        One value for the whole batch, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting has the wrong type.
        ValueError: If the numbers of examples (or the shapes) differ, or a setting is out of its range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [4.0, 4.0]])
        >>> correlation_congruence(student, teacher)
        tensor(0.0532)
        >>> correlation_congruence(student, teacher, kernel="neighbour")
        tensor(8.)

    References:
        Peng et al. 2019, equations 6 to 10, arXiv:1904.01802. "neighbour": the authors' code as RepDistiller has it,
        there with a weight of 0.02.
    """
    checks.one_of("kernel", kernel, KERNELS)
    checks.positive("gamma", gamma)
    checks.at_least("order", order, 1)
    if kernel == "neighbour":
        prepare_equal(student, teacher)
        return of_counted(_neighbours_in_common, *prepare_examples(student, teacher, mask))
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** power / math.factorial(power) for power in range(order + 1)]
    return of_counted(partial(_kernel_differences, factors), *prepare_examples(student, teacher, mask))


def inter_channel_correlation(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the two models' correlations between the channels.

    .. math:: \frac{1}{N C^2} \sum_n \sum_{i,j} (\hat G^s_{nij} - \hat G^t_{nij})^2, \qquad G_n = F_n F_n^\top, \quad
        \hat G_{ni} = G_{ni} / \|G_{ni}\|_2

    F has one row per channel, which holds the channel's map. It compares how diverse the channels are and which of them
    are active together. The authors' weight of 2.5 is 2.5 C here. A row of zeros stays zero.

    Args:
        student: The student's feature, shape ``(N, C, H, W)`` or ``(N, L, C)``.
        teacher: The teacher's feature, same N and C; the positions may differ.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.

    Returns:
        One value for the whole batch, at most 4 / C, shape ``()``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the examples or channels differ, or a feature has no positions.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
        >>> inter_channel_correlation(student, torch.tensor([[[[3.0]], [[4.0]]]]))
        tensor(0.3000)

    References:
        Liu et al. 2021, equations 2 to 4, arXiv:2202.03680; deviations: rows of length one, as in the authors' code,
        and the mean over examples and pairs of channels, as in equation 4, where that code divides by N C.
    """
    student, teacher = prepare(student, teacher)
    if student.ndim < 3 or teacher.ndim < 3 or channel_maps(student).shape[:2] != channel_maps(teacher).shape[:2]:
        expected = "`student` and `teacher` to have the same numbers of examples and channels, and to have positions"
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(checks.message(expected, got, "Map the student's channels with an adapter."))
    if mask is not None:  # zeros change no product, and examples of zeros do not differ
        student, teacher = (without(feature, positions_mask(mask, feature)) for feature in (student, teacher))
    maps = [channel_maps(feature) for feature in (student, teacher)]
    count, channels = maps[0].shape[:2]
    total = summed(_channel_differences, maps, row_size=channels**2, inputs=student.numel())
    return total / ((count if mask is None else examples_of(mask).sum().clamp(min=1)) * channels**2)


def _similarity_differences(student: Tensor, teacher: Tensor) -> Tensor:
    rows = [unit(relative_gram(feature), dim=1) for feature in (student, teacher)]
    return F.mse_loss(rows[0], rows[1])


def _distance_part(student: Tensor, teacher: Tensor) -> Tensor:
    return _distance_differences([_distances(feature)[1] for feature in (student, teacher)])


def _angle_part(student: Tensor, teacher: Tensor) -> Tensor:
    return _angle_differences([_distances(feature) for feature in (student, teacher)], student.numel())


def _neighbour_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    probabilities = []
    for feature in (student, teacher):
        kernel = (_cosines(feature, eps=_TRANSFER_EPS) + 1).clamp(min=0) / 2  # rounding may take a cosine below -1
        probabilities.append(kernel / kernel.sum(dim=1, keepdim=True))
    logarithms = [(probability + _TRANSFER_EPS).log() for probability in probabilities]
    return (probabilities[1] * (logarithms[1] - logarithms[0])).mean()


def _neighbours_in_common(student: Tensor, teacher: Tensor) -> Tensor:
    errors = (student - teacher).abs()
    return (errors[1:] * errors[:-1]).sum() / max(len(errors) - 1, 1)


def _kernel_differences(factors: Sequence[float], student: Tensor, teacher: Tensor) -> Tensor:
    kernels = []
    for feature in (student, teacher):
        cosines = _cosines(feature)
        value = torch.full_like(cosines, factors[-1])
        for factor in reversed(factors[:-1]):
            value = value * cosines + factor
        kernels.append(value)
    return F.mse_loss(kernels[0], kernels[1])


def _distances(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the centred examples, and the distances between them: 0 where they coincide up to rounding."""
    # Centred first: distances do not change, and their differences lose fewer digits.
    products = gram(centred(feature, 0))
    sizes = products.diagonal()
    sums = sizes[:, None] + sizes
    squares = sums - 2 * products
    apart = squares > 4 * torch.finfo(products.dtype).eps * sums
    # The root has no gradient at zero: it is taken of 1 there, and the result dropped.
    return products, torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def _cosines(feature: Tensor, *, eps: float = 0.0) -> Tensor:
    """Cosines between the examples, ``eps`` added to their lengths; 0 where one of the two is a vector of zeros."""
    products = gram(feature)
    # The lengths are divided out of the N^2 products instead of the N D numbers, which would take copies of them.
    inverse = 1 / (or_one(products.diagonal()).sqrt() + eps)
    return products * inverse[:, None] * inverse


def _distance_differences(distances: Sequence[Tensor]) -> Tensor:
    ratios = [distance / or_one(distance.sum() / or_one((distance > 0).sum())) for distance in distances]
    return F.smooth_l1_loss(ratios[0], ratios[1])


def _angle_differences(seen: Sequence[tuple[Tensor, Tensor]], inputs: int) -> Tensor:
    rows, count = [], len(seen[0][0])
    for products, distances in seen:
        # One row for each anchor, an example that others are seen from: the products with it less half its square, and
        # the inverse distances to it.
        rows += [
            (products - products.diagonal() / 2).mT,
            torch.where(distances > 0, 1 / or_one(distances), 0.0),
        ]
    differences = partial(_differences_from_anchors, *(products for products, _ in seen))
    return summed(differences, rows, row_size=count**2, inputs=inputs) / count**3


def _differences_from_anchors(student: Tensor, teacher: Tensor, *rows: Tensor) -> Tensor:
    cosines = []
    for between, to_anchor, inverse in ((student, *rows[:2]), (teacher, *rows[2:])):
        # (f_j - f_i) . (f_k - f_i) from the products alone: the differences themselves would take N^2 D numbers.
        products = between - to_anchor[:, :, None] - to_anchor[:, None, :]
        cosines.append(products * inverse[:, :, None] * inverse[:, None, :])
    return F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")


def _channel_differences(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(_channel_products(student), _channel_products(teacher), reduction="sum")


def _channel_products(maps: Tensor) -> Tensor:
    """Products of all pairs of channels, each row of length one; a row of zeros stays zero."""
    # In units of the largest channel's square, so that the products can be squared; divided out of the C P numbers,
    # which are fewer than the C^2 products.
    largest = or_one(maps.detach().square().sum(dim=2).amax(dim=1))
    products = gram(maps * largest.rsqrt()[:, None, None])
    return unit(products, 2)
