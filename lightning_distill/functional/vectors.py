"""Helpers of the formulas on features: shapes, means over an example, vectors of length one, centred numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare, reduced, rows_mask
from lightning_distill.functional.primitives import gram, or_one

_REMEDY = "Map the student's feature to the teacher's shape with an adapter."


def prepare_equal(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, channel_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two features of equal shape in one precision, the teacher's detached.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts; None where all count.
        channel_dim: The user's own dimension of the channels.

    Returns:
        Both features in float32 or better, zeros where they do not count, and the mask of the positions.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ or the batch dimension is missing.
    """
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy=_REMEDY)
    if student.ndim < 1:
        raise ValueError(checks.message("`student` to have a batch dimension", "shape ()"))
    positions = positions_mask(mask, student, channel_dim)
    return without(student, positions, channel_dim), without(teacher, positions, channel_dim), positions


def prepare_examples(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features of the same examples as one row per example; their other dimensions may differ.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.
        mask: True where an example counts, shape ``(N,)``; None where all count. The rows are selected, for which the
            host waits for the device. With the positions of both features too: zeros where they do not count.

    Returns:
        Matrices ``(N, D_s)`` and ``(N, D_t)`` in float32 or better, the teacher's detached.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.
    """
    student, teacher = prepare(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        expected = "`student` and `teacher` to have the same number of examples and one inner dimension or more"
        raise ValueError(checks.message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}"))
    if mask is None:
        return student.flatten(1), teacher.flatten(1)
    student, teacher = (without(feature, positions_mask(mask, feature)) for feature in (student, teacher))
    counts = mask.flatten(1).any(dim=1) if mask.ndim > 1 else mask
    return student[counts].flatten(1), teacher[counts].flatten(1)


def prepare_vectors(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The channel vectors at the positions that count, as one row per position.

    The rows are selected, for which the host waits for the device.

    Args:
        student: The student's feature, shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature, same shape.
        mask: True where an example or a position counts.

    Returns:
        Matrices ``(M, C)`` in float32 or better, the teacher's detached.
    """
    student, teacher, positions = prepare_equal(student, teacher, mask)
    dim = channels_at(student)
    return student.movedim(dim, -1)[positions], teacher.movedim(dim, -1)[positions]


def of_counted(formula: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """A formula of rows; 0 with a gradient of zeros if no row is left, because nothing counts.

    Args:
        formula: Called with the rows of both models; returns a scalar.
        student: The student's rows.
        teacher: The teacher's rows.

    Returns:
        A scalar.
    """
    return formula(student, teacher) if len(student) else student.sum()


def positions_mask(mask: Tensor | None, feature: Tensor, channel_dim: int | None = None) -> Tensor | None:
    """A mask of the examples or of the positions, as a mask of a feature's positions.

    Args:
        mask: True where an example or a position counts, bool; or None.
        feature: Shape ``(N,)``, ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        channel_dim: The user's own dimension of the channels.

    Returns:
        The feature's shape without its channels, or None.

    Raises:
        TypeError: If the mask is not a bool tensor.
        ValueError: If its shape does not fit.
    """
    if mask is None:
        return None
    channels = channels_at(feature, channel_dim) % feature.ndim if feature.ndim > 1 else None
    return rows_mask(mask, tuple(size for dim, size in enumerate(feature.shape) if dim != channels))


def without(feature: Tensor, positions: Tensor | None, channel_dim: int | None = None) -> Tensor:
    """A feature with zeros at the positions that do not count.

    Args:
        feature: Shape ``(N,)``, ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        positions: The result of :func:`positions_mask`.
        channel_dim: The user's own dimension of the channels.

    Returns:
        Same shape.
    """
    if positions is None:
        return feature
    mask = positions.unsqueeze(channels_at(feature, channel_dim)) if feature.ndim > 1 else positions
    return torch.where(mask, feature, 0.0)


def over_positions(values: Tensor, positions: Tensor | None, reduction: Reduction) -> Tensor:
    """Means over the positions that count: of each example, or of the batch.

    Args:
        values: One value per position, shape ``(N, ...)``.
        positions: True where a position counts, same shape; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over all positions that count.

    Returns:
        Shape ``(N,)`` or ``()``; 0 where no position counts.
    """
    if positions is None or reduction == "mean" or values.ndim == 1:
        return reduced(
            values if positions is not None or reduction == "mean" else per_example(values), positions, reduction
        )
    return mean_of_counted(values, positions)


def over_numbers(values: Tensor, dim: int | None, positions: Tensor | None, reduction: Reduction) -> Tensor:
    """Means over the numbers of the positions that count: of each example, or of the batch.

    Args:
        values: One value per number of a feature, shape ``(N, ...)``.
        dim: Dimension of the channels, or None.
        positions: True where a position counts, the shape without ``dim``; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over all positions that count.

    Returns:
        Shape ``(N,)`` or ``()``; 0 where no position counts.
    """
    if positions is not None and dim is not None:
        values = values.mean(dim=dim)
    return over_positions(values, positions, reduction)


def over_examples(values: Tensor, positions: Tensor | None, reduction: Reduction) -> Tensor:
    """Values of the examples, or their mean over the examples with a position that counts.

    Args:
        values: One value per example, shape ``(N,)``.
        positions: True where a position counts, shape ``(N, ...)``; None where all count.
        reduction: ``"none"`` or ``"mean"``.

    Returns:
        Shape ``(N,)`` or ``()``; 0 where no position counts.
    """
    return reduced(values, positions if positions is None else examples_of(positions), reduction)


def examples_of(positions: Tensor) -> Tensor:
    """Examples with a position that counts.

    Args:
        positions: True where a position counts, shape ``(N, ...)``.

    Returns:
        Shape ``(N,)``.
    """
    return positions.flatten(1).any(dim=1) if positions.ndim > 1 else positions


def mean_of_counted(values: Tensor, positions: Tensor) -> Tensor:
    """Mean of each example over its positions that count.

    Args:
        values: Shape ``(N, ...)``.
        positions: True where a position counts, same shape.

    Returns:
        Shape ``(N,)``; 0 where no position counts.
    """
    return torch.where(positions, values, 0.0).flatten(1).sum(dim=1) / positions.flatten(1).sum(dim=1).clamp(min=1)


def per_example(values: Tensor) -> Tensor:
    """Mean over all but the first dimension.

    Args:
        values: Any shape ``(N, ...)``.

    Returns:
        The means, shape ``(N,)``.
    """
    return values.mean(dim=tuple(range(1, values.ndim))) if values.ndim > 1 else values


def averaged(feature: Tensor, positions: Tensor | None) -> Tensor:
    """Channel vectors averaged over the positions that count.

    Args:
        feature: Shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        positions: True where a position counts, the shape without the channels; None where all count.

    Returns:
        Shape ``(N, C)``; zeros where no position counts.
    """
    if feature.ndim == 2:
        return feature
    vectors = feature.movedim(channels_at(feature), -1).flatten(1, -2)
    if positions is None:
        return vectors.mean(dim=1)
    counts = positions.flatten(1).unsqueeze(-1)
    return torch.where(counts, vectors, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def channels_at(feature: Tensor, channel_dim: int | None = None) -> int:
    """Dimension of the channels: 1 for maps of four or more dimensions, else the last.

    Args:
        feature: Shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        channel_dim: The user's own choice, which takes precedence.

    Returns:
        The dimension.

    Raises:
        TypeError: If ``channel_dim`` is not an int.
        ValueError: If it is not an inner dimension of the feature.
    """
    dim = channel_dim if channel_dim is not None else (1 if feature.ndim >= 4 else -1)
    checks.inner_dim("channel_dim", dim, feature.ndim)
    return dim


def check_positions(student: Tensor, teacher: Tensor) -> None:
    """Check that two features have the same examples and positions; their channels may differ.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``.
        teacher: The teacher's feature, same shape up to the number of channels.

    Raises:
        ValueError: If they differ or there is only one position.
    """
    if student.ndim == teacher.ndim and student.ndim >= 3:
        dim = channels_at(student)
        positions = [tuple(size for i, size in enumerate(f.shape) if i != dim % f.ndim) for f in (student, teacher)]
        if positions[0] == positions[1] and math.prod(positions[0][1:]) > 1:
            return
    expected = "`student` and `teacher` to have the same examples and positions, with more than one position"
    got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    raise ValueError(checks.message(expected, got, "Resize the teacher's feature to the student's positions."))


def channel_maps(feature: Tensor) -> Tensor:
    """A feature as one row of positions for each channel.

    Args:
        feature: Shape ``(N, C, H, W)`` or ``(N, L, C)``.

    Returns:
        Shape ``(N, C, P)``, P the number of positions.
    """
    return feature.movedim(channels_at(feature), 1).flatten(2)


def relative_gram(rows: Tensor) -> Tensor:
    """Products of all pairs of rows in units of the largest row's square: at most 1, so that they can be squared.

    Args:
        rows: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., A, A)``; the gradient takes the unit for a constant.
    """
    products = gram(rows)
    return products / or_one(products.detach().diagonal(dim1=-2, dim2=-1).amax(dim=-1))[..., None, None]
