"""Formulas for dense prediction, on the edges of boxes and the pixels of a batch: no gradient into the teacher."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_temperature
from keras_distill.functional.primitives import softmax_divergence
from keras_distill.functional.vectors import by_rows, check_positions, flattened, transposed, unit

__all__ = ["localization", "pixel_relation"]

_BINS = ("student_bins", "teacher_bins")


def localization(student_bins: Any, teacher_bins: Any, *, temperature: Any = 10.0, bins: int | None = None) -> Any:
    r"""Kullback-Leibler divergence between the two models' distributions over the bins of each edge of a box.

    .. math:: T^2 \sum_b p^t_b (\log p^t_b - \log p^s_b), \qquad p = \mathrm{softmax}(z / T)

    For detectors that predict the distance to each edge of a box as a distribution over bins: the shape of the
    distribution tells how certain the teacher is of the edge.

    Args:
        student_bins: Unnormalised scores of the bins of each box's left, top, right and bottom edge, shape
            ``(N, ..., 4, B)`` with B of 2 or more.
        teacher_bins: The teacher's scores for the same boxes, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        bins: Number of bins B where edges and bins share the last dimension, as in the output of a head:
            ``(N, H, W, 4 B)`` or ``(N, ..., 4 B)``. None where they have a dimension each.

    Returns:
        Divergence in nats times :math:`T^2`, one value per edge: shape ``(N, ..., 4)``.

    Raises:
        TypeError: If the scores are not floating point tensors, or the temperature is not a number.
        ValueError: If the shapes differ, are not ``(N, ..., 4, B)``, or the temperature is not greater than 0.

    Example:
        >>> values = localization([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]], ops.zeros((1, 4, 2)))
        >>> [round(float(value), 4) for value in values[0]]
        [0.4992, 0.1249, 1.1208, 0.0]

    References:
        Zheng et al. 2022 (LD), section 3, arXiv:2102.12252; deviation: a value for each edge, where the paper adds the
        four. The authors' code takes the mean over the bins as well, which divides by their number.
    """
    student, teacher = prepare(student_bins, teacher_bins, _BINS)
    if bins is not None:
        student, teacher = (_split_bins(scores, bins) for scores in (student, teacher))
    checks.same_shape(student, teacher, names=_BINS, remedy="Both models must have the same boxes and bins.")
    shape = tuple(student.shape)
    if len(shape) < 3 or shape[-2] != 4 or (shape[-1] is not None and shape[-1] < 2):
        expected = "`student_bins` to have 2 bins or more for each of 4 edges, shape (N, ..., 4, B)"
        remedy = "Pass bins=<number of bins> for the output of a head, (N, H, W, 4 B) or (N, ..., 4 B)."
        raise ValueError(checks.message(expected, f"shape {shape}", remedy))
    temperature = prepare_temperature(temperature, student)
    return softmax_divergence(student / temperature, teacher / temperature) * temperature**2


def _split_bins(scores: Any, bins: int) -> Any:
    """Scores with a dimension for the edges and one for the bins, last."""
    if len(scores.shape) < 2 or scores.shape[-1] != 4 * bins:
        expected = f"`student_bins` and `teacher_bins` to have {bins} bins for each of 4 edges in the last dimension"
        raise ValueError(checks.message(expected, f"shape {tuple(scores.shape)}"))
    return ops.reshape(scores, (*ops.shape(scores)[:-1], 4, bins))


def pixel_relation(student: Any, teacher: Any, *, temperature: Any = 0.1) -> Any:
    r"""Divergence between the two models' similarities of each pixel to all pixels of an image, over pairs of images.

    .. math:: \frac{1}{N^2 P} \sum_{i,j} \sum_{p} \sum_{q} a^t_{ij,pq} (\log a^t_{ij,pq} - \log a^s_{ij,pq}), \qquad
        a_{ij,p} = \mathrm{softmax}_q \left( \frac{f_{ip} \cdot f_{jq}}{T \, \|f_{ip}\| \, \|f_{jq}\|} \right)

    It compares how the pixels of different images, and of the same, relate to each other; the channels need not match.
    Memory and time grow with the square of N P: take features of low resolution.

    Args:
        student: The student's feature, shape ``(N, H, W, C_s)`` or ``(N, L, C_s)``, with P > 1 positions.
        teacher: The teacher's feature, same shape up to the number of channels.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.

    Returns:
        Divergence in nats, a scalar: the mean over the pixels and images.

    Raises:
        TypeError: If a feature is not a floating point tensor, or the temperature is not a number.
        ValueError: If the positions differ, there is only one, or the temperature is not greater than 0.

    Example:
        >>> value = pixel_relation([[[1.0, 0.0], [0.0, 2.0]]], [[[3.0], [4.0]]], temperature=1.0)
        >>> round(float(value), 4)
        0.1201

    References:
        Yang et al. 2022 (CIRKD), arXiv:2204.06986, the term of the mini-batch; deviation: features are not
        averaged down first, which the authors' code does from 256 x 256 pixels on. It has no factor :math:`T^2`.
    """
    student, teacher = prepare(student, teacher)
    check_positions(student, teacher)
    temperature = prepare_temperature(temperature, student)
    maps = [unit(flattened(feature, 1, len(feature.shape) - 1), -1) for feature in (student, teacher)]
    columns = [transposed(directions) for directions in maps]
    rows = [flattened(directions, 0, 2) / temperature for directions in maps]
    images, pixels = ops.shape(maps[0])[:2]
    return ops.mean(by_rows(_pixel_divergences, rows, columns, row_size=images * pixels))


def _pixel_divergences(student_maps: Any, teacher_maps: Any, student_rows: Any, teacher_rows: Any) -> Any:
    """For each pixel the mean divergence of its similarities to the pixels of every image."""
    scores = (ops.matmul(rows, maps) for rows, maps in ((student_rows, student_maps), (teacher_rows, teacher_maps)))
    return ops.mean(softmax_divergence(*scores), axis=0)
