"""Formulas for dense prediction, on the edges of boxes and the pixels of a batch: no gradient into the teacher."""

from __future__ import annotations

from functools import partial

import torch  # noqa: F401 - for the examples
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.chunks import summed
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.kernels import softmax_divergence
from lightning_distill.functional.logits import soft_target_kl
from lightning_distill.functional.primitives import LEAST_SCORE, product, unit
from lightning_distill.functional.vectors import channel_maps, check_positions, positions_mask, without

__all__ = ["localization", "pixel_relation"]

_BINS = ("student_bins", "teacher_bins")


def localization(
    student_bins: Tensor,
    teacher_bins: Tensor,
    *,
    temperature: float = 10.0,
    bins: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence between the two models' distributions over the bins of each edge of a box.

    .. math:: T^2 \sum_b p^t_b (\log p^t_b - \log p^s_b), \qquad p = \mathrm{softmax}(z / T)

    For detectors that predict the distance to each edge of a box as a distribution over bins: the shape of the
    distribution tells how certain the teacher is of the edge.

    Args:
        student_bins: Unnormalised scores of the bins of each box's left, top, right and bottom edge, shape
            ``(N, ..., 4, B)`` with B of 2 or more.
        teacher_bins: The teacher's scores for the same boxes, same shape.
        temperature: Softening of both distributions, greater than 0.
        bins: Number of bins B where edges and bins share a dimension, as in the output of a head: dimension 1 of maps
            ``(N, 4 B, H, W)``, else the last, ``(N, ..., 4 B)``. None where they have a dimension each.
        mask: True where a box or an edge counts, shape ``(N,)``, ``(N, ...)`` or ``(N, ..., 4)``; None where all count.
        reduction: ``"none"`` for one value per edge, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T^2`, one value per edge: shape ``(N, ..., 4)``.

    Raises:
        TypeError: If the scores are not floating point tensors, or the temperature is not a number.
        ValueError: If the shapes differ, are not ``(N, ..., 4, B)``, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]])
        >>> localization(student, torch.zeros(1, 4, 2))
        tensor([[0.4992, 0.1249, 1.1208, 0.0000]])

    References:
        Zheng et al. 2022 (LD), section 3, arXiv:2102.12252; deviation: a value for each edge, where the paper adds the
        four. The authors' code takes the mean over the bins as well, which divides by their number.
    """
    for name, scores in zip(_BINS, (student_bins, teacher_bins), strict=True):
        checks.floating(name, scores)
    if bins is not None:
        student_bins, teacher_bins = (_split_bins(scores, bins) for scores in (student_bins, teacher_bins))
    checks.same_shape(student_bins, teacher_bins, names=_BINS, remedy="Both models must have the same boxes and bins.")
    shape = tuple(student_bins.shape)
    if len(shape) < 3 or shape[-2] != 4 or shape[-1] < 2:
        expected = "`student_bins` to have 2 bins or more for each of 4 edges, shape (N, ..., 4, B)"
        remedy = "Pass bins=<number of bins> for the output of a head, (N, 4 B, H, W) or (N, ..., 4 B)."
        raise ValueError(checks.message(expected, f"shape {shape}", remedy))
    return soft_target_kl(
        student_bins, teacher_bins, temperature=temperature, class_dim=-1, mask=mask, reduction=reduction
    )


def _split_bins(scores: Tensor, bins: int) -> Tensor:
    """Scores with a dimension for the edges and one for the bins, last."""
    dim = 1 if scores.ndim == 4 else scores.ndim - 1
    if scores.ndim < 2 or scores.shape[dim] != 4 * bins:
        expected = f"`student_bins` and `teacher_bins` to have {bins} bins for each of 4 edges in dimension {dim}"
        raise ValueError(checks.message(expected, f"shape {tuple(scores.shape)}"))
    each = scores.reshape(*scores.shape[:dim], 4, bins, *scores.shape[dim + 1 :])
    return each.movedim((dim, dim + 1), (-2, -1))


def pixel_relation(student: Tensor, teacher: Tensor, *, temperature: float = 0.1, mask: Tensor | None = None) -> Tensor:
    r"""Divergence between the two models' similarities of each pixel to all pixels of an image, over pairs of images.

    .. math:: \frac{1}{N^2 P} \sum_{i,j} \sum_{p} \sum_{q} a^t_{ij,pq} (\log a^t_{ij,pq} - \log a^s_{ij,pq}), \qquad
        a_{ij,p} = \mathrm{softmax}_q \left( \frac{f_{ip} \cdot f_{jq}}{T \, \|f_{ip}\| \, \|f_{jq}\|} \right)

    It compares how the pixels of different images, and of the same, relate to each other; the channels need not match.
    Memory and time grow with the square of N P: take features of low resolution.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        temperature: Softening of both distributions, greater than 0.
        mask: True where an example or a position counts, shape ``(N,)`` or with the positions; None where all count.

    Returns:
        Divergence in nats, a scalar: the mean over the pixels and images that count.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the temperature is not a number.
        ValueError: If the positions differ, there is only one, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> teacher = torch.tensor([[[3.0], [4.0]]])
        >>> pixel_relation(student, teacher, temperature=1.0)
        tensor(0.1201)

    References:
        Yang et al. 2022 (CIRKD), arXiv:2204.06986, the term of the mini-batch; deviation: features are not
        averaged down first, which the authors' code does from 256 x 256 pixels on. It has no factor :math:`T^2`.
    """
    checks.positive("temperature", temperature)
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    positions = positions_mask(mask, student)
    maps = [unit(channel_maps(without(feature, positions)), dim=1) for feature in (student, teacher)]
    counts = None if positions is None else positions.flatten(1)
    # One row for each pixel of the batch: its direction in both models, zeros where it does not count.
    rows = [channels.mT.flatten(0, 1) for channels in maps]
    images, _, pixels = maps[0].shape
    total = summed(
        partial(_pixel_divergences, maps[0], maps[1], counts, temperature),
        rows,
        row_size=images * pixels,
        inputs=student.numel(),
    )
    if counts is None:
        return total / (images**2 * pixels)
    return total / (counts.sum() * counts.any(dim=1).sum()).clamp(min=1)


def _pixel_divergences(
    student_maps: Tensor,
    teacher_maps: Tensor,
    counts: Tensor | None,
    temperature: float,
    student_rows: Tensor,
    teacher_rows: Tensor,
) -> Tensor:
    """Sum of the divergences of some pixels' similarities to the pixels of every image; 0 for a row of zeros."""
    scores = []
    for maps, rows in ((student_maps, student_rows), (teacher_maps, teacher_rows)):
        similarities = product(rows / temperature, maps)  # image, row, pixel of the image
        scores.append(similarities if counts is None else similarities.masked_fill(~counts[:, None], LEAST_SCORE))
    return softmax_divergence(scores[0], scores[1], dim=2).sum()
