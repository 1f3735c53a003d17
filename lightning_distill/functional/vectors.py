"""What the formulas on features share: shapes, means over an example, vectors of length one, centred numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_distill import checks
from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.primitives import gram, sum_of_squares

# Numbers of a chunk's largest tensor: fewer gain no memory worth speaking of.
_SMALLEST_CHUNK = 2**20
_MOST_CHUNKS = 8  # where each is kept for the backward pass, more of them would save little
_REMEDY = "Map the student's feature to the teacher's shape with an adapter."


def prepare_equal(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two features of equal shape in one precision, the teacher's detached.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, same shape.

    Returns:
        Both features, in float32 or better.

    Raises:
        TypeError: If a feature is no floating point tensor.
        ValueError: If the shapes differ or there is no batch dimension.
    """
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy=_REMEDY)
    if student.ndim < 1:
        raise ValueError(checks.message("`student` to have a batch dimension", "shape ()"))
    return student, teacher


def prepare_examples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the same examples as one row per example, whatever else their shapes are.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        Matrices ``(N, D_s)`` and ``(N, D_t)`` in float32 or better, the teacher's detached.

    Raises:
        TypeError: If a feature is no floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.
    """
    student, teacher = prepare(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        expected = "`student` and `teacher` to have equally many examples and one inner dimension or more"
        raise ValueError(checks.message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}"))
    return student.flatten(1), teacher.flatten(1)


def per_example(values: Tensor) -> Tensor:
    """Mean over all but the first dimension.

    Args:
        values: Any shape ``(N, ...)``.

    Returns:
        The means, shape ``(N,)``.
    """
    return values.mean(dim=tuple(range(1, values.ndim))) if values.ndim > 1 else values


def channels_at(feature: Tensor, channel_dim: int | None = None) -> int:
    """Dimension of the channels: 1 for maps of four or more dimensions, else the last.

    Args:
        feature: Shape ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        channel_dim: The user's own choice, which wins.

    Returns:
        The dimension.

    Raises:
        TypeError: If ``channel_dim`` is no int.
        ValueError: If it is no inner dimension of the feature.
    """
    dim = channel_dim if channel_dim is not None else (1 if feature.ndim >= 4 else -1)
    checks.inner_dim("channel_dim", dim, feature.ndim)
    return dim


def check_positions(student: Tensor, teacher: Tensor) -> None:
    """Check that two features have the same examples and positions, whatever their channels.

    Args:
        student: The student's feature, shape ``(N, C_s, H, W)`` or ``(N, L, C_s)``.
        teacher: The teacher's feature, same shape up to the number of channels.

    Raises:
        ValueError: If they differ or there is only one position.
    """
    if student.ndim == teacher.ndim and student.ndim >= 3:
        dim = channels_at(student)
        positions = [tuple(size for i, size in enumerate(f.shape) if i != dim % f.ndim) for f in (student, teacher)]
        if positions[0] == positions[1] and student[0:1].select(dim, 0).numel() > 1:
            return
    expected = "`student` and `teacher` to have the same examples and positions, more than one, whatever their channels"
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


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors divided by their length; vectors of zeros stay zero.

    Args:
        vectors: Any shape.
        dim: Dimension along which the vectors lie.

    Returns:
        Vectors of length 1, same shape; in float32 their lengths may be from 1e-18 to 1e18.
    """
    # A vector of zeros is divided by 1: dividing by a tiny constant instead would give it a gradient that overflows
    # half precision. The product with the inverse has a cheaper gradient than the quotient.
    return vectors * (1 / or_one(sum_of_squares(vectors, dim)).sqrt())


def relative_gram(rows: Tensor) -> Tensor:
    """Products of all pairs of rows in units of the largest row's square: at most 1, so that they can be squared.

    Args:
        rows: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., A, A)``; the gradient takes the unit for a constant.
    """
    products = gram(rows)
    return products / or_one(products.detach().diagonal(dim1=-2, dim2=-1).amax(dim=-1))[..., None, None]


def or_one(values: Tensor) -> Tensor:
    """Values that are safe to divide by: those greater than 0, and 1 for the others.

    Args:
        values: Any shape.

    Returns:
        Same shape.
    """
    return torch.where(values > 0, values, 1.0)


def centred(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Values minus their mean, and exactly zero without gradient where they are constant up to rounding.

    Without the second half, what rounding leaves of a constant would be blown up by any later division.

    Args:
        values: Any shape.
        dim: Dimensions of the mean.

    Returns:
        Same shape.
    """
    mean = values.mean(dim=dim, keepdim=True)
    return (values - mean) * _varies(values.detach(), mean.detach(), dim)


def spread_or_one(difference: Tensor, dim: int | tuple[int, ...], *, count: int, eps: float = 0.0) -> Tensor:
    """Standard deviation of centred values, and 1 where they are all zero.

    Args:
        difference: Centred values, any shape.
        dim: Dimensions of the mean.
        count: What the sum of squares is divided by.
        eps: Added to the variance.

    Returns:
        The deviations, with ``dim`` kept at size 1.
    """
    squares = sum_of_squares(difference, dim)
    # The root of a zero variance has no gradient, and the root of a tiny eps is a divisor out of reach of float16.
    return torch.where(squares > 0, squares / count + eps, 1.0).sqrt()


def summed(function: Callable[..., Tensor], rows: Sequence[Tensor], *, row_size: int, inputs: int) -> Tensor:
    """Sum of a function over chunks of rows, so small that what it holds does not outgrow the loss's inputs.

    The backward pass computes a chunk anew instead of having kept it.

    Args:
        function: Called with a chunk of each tensor; returns a scalar that is a sum over the rows.
        rows: Tensors with equally many rows.
        row_size: How many numbers the largest tensor that ``function`` makes has for each row.
        inputs: Numbers in one model's feature.

    Returns:
        A scalar.
    """
    size = max(max(_SMALLEST_CHUNK, inputs // 8) // row_size, 1)
    if len(rows[0]) <= size:
        return function(*rows)
    # Not slices: each of them would have a gradient of the whole tensor's size.
    chunks = zip(*(tensor.chunk(-(-len(tensor) // size)) for tensor in rows), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum()


def by_examples(function: Callable[..., Tensor], examples: Sequence[Tensor], *, example_size: int) -> Tensor:
    """What a function gives for each example, from a few chunks of the batch: most of what it needs it needs for one.

    Args:
        function: Called with a chunk of each tensor; returns one value for each example.
        examples: Tensors with equally many examples.
        example_size: How many numbers the largest tensor that ``function`` makes has for each example.

    Returns:
        The values, shape ``(N,)``.
    """
    count = len(examples[0])
    chunks = min(_MOST_CHUNKS, count * example_size // _SMALLEST_CHUNK, count)
    if chunks < 2:
        return function(*examples)
    parts = zip(*(tensor.chunk(chunks) for tensor in examples), strict=True)
    return torch.cat([function(*part) for part in parts])


def _varies(values: Tensor, mean: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """1 where values differ from their mean by more than rounding, else 0; from their extremes, without copies."""
    low, high = values.amin(dim=dim, keepdim=True), values.amax(dim=dim, keepdim=True)
    rounding = 4 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (torch.maximum(high - mean, mean - low) > rounding).to(values.dtype)
