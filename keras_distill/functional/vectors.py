"""Helpers of the formulas on features: shapes, means over an example, vectors of length one, centred numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import epsilon_of, prepare

# Numbers in a chunk's largest tensor; smaller chunks would hardly save memory.
_CHUNK = 2**20


def prepare_examples(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Features of the same examples as one row per example; their other dimensions may differ.

    Args:
        student: The student's feature, shape ``(N, ...)``.
        teacher: The teacher's feature, shape ``(N, ...)``; only N must be the student's.

    Returns:
        Matrices ``(N, D_s)`` and ``(N, D_t)`` in float32 or better, the teacher's without gradient.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the numbers of examples differ, or a feature has no inner dimension.
    """
    student, teacher = prepare(student, teacher)
    student_shape, teacher_shape = tuple(student.shape), tuple(teacher.shape)
    if len(student_shape) < 2 or len(teacher_shape) < 2 or checks.shapes_differ(student_shape[:1], teacher_shape[:1]):
        expected = "`student` and `teacher` to have the same number of examples and one inner dimension or more"
        raise ValueError(checks.message(expected, f"{student_shape} and {teacher_shape}"))
    return flattened(student, 1), flattened(teacher, 1)


def flattened(values: Any, start: int, stop: int | None = None) -> Any:
    """Neighbouring dimensions made one, whether or not their sizes are known yet.

    Args:
        values: Any shape.
        start: The first of them.
        stop: The one after the last of them, None for all that follow.

    Returns:
        The same numbers, with ``stop - start - 1`` dimensions less.
    """
    shape, stop = ops.shape(values), len(values.shape) if stop is None else stop
    sizes = values.shape[start:stop]
    merged = -1 if None in sizes else math.prod(sizes)
    return ops.reshape(values, (*shape[:start], merged, *shape[stop:]))


def per_example(values: Any) -> Any:
    """Mean over all but the first dimension.

    Args:
        values: Any shape ``(N, ...)``.

    Returns:
        The means, shape ``(N,)``.
    """
    return ops.mean(values, axis=tuple(range(1, len(values.shape)))) if len(values.shape) > 1 else values


def averaged(feature: Any) -> Any:
    """Channel vectors averaged over the positions.

    Args:
        feature: Shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.

    Returns:
        Shape ``(N, C)``.
    """
    return feature if len(feature.shape) == 2 else ops.mean(feature, axis=tuple(range(1, len(feature.shape) - 1)))


def check_positions(student: Any, teacher: Any) -> None:
    """Check that two features have the same examples and positions; their channels may differ.

    Args:
        student: The student's feature, shape ``(N, H, W, C_s)`` or ``(N, L, C_s)``.
        teacher: The teacher's feature, same shape up to the number of channels.

    Raises:
        ValueError: If they differ or there is only one position.
    """
    student_shape, teacher_shape = tuple(student.shape)[:-1], tuple(teacher.shape)[:-1]
    if (
        len(student_shape) >= 2
        and not checks.shapes_differ(student_shape, teacher_shape)
        and any(size != 1 for size in student_shape[1:])
    ):
        return
    expected = "`student` and `teacher` to have the same examples and positions, with more than one position"
    received = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    raise ValueError(checks.message(expected, received, "Resize the teacher's feature to the student's positions."))


def unit(vectors: Any, axis: int) -> Any:
    """Vectors divided by their length; vectors of zeros stay zero.

    Args:
        vectors: Any shape.
        axis: Dimension along which the vectors lie.

    Returns:
        Vectors of length 1, same shape.
    """
    # Scaled first so that the squares neither overflow nor vanish. A vector of zeros is divided by 1: dividing by a
    # tiny constant instead would give it a gradient that overflows half precision.
    vectors = vectors / or_one(ops.max(ops.abs(ops.stop_gradient(vectors)), axis=axis, keepdims=True))
    # The product with the inverse has a cheaper gradient than the quotient.
    return vectors * (1 / ops.sqrt(or_one(ops.sum(ops.square(vectors), axis=axis, keepdims=True))))


def relative_gram(rows: Any) -> Any:
    """Products of all pairs of rows in units of the largest row's square: at most 1, so that they can be squared.

    Args:
        rows: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., A, A)``; the gradient takes the unit for a constant.
    """
    products = gram(rows)
    squares = ops.diagonal(ops.stop_gradient(products), axis1=-2, axis2=-1)
    return products / or_one(ops.max(squares, axis=-1))[..., None, None]


def gram(rows: Any) -> Any:
    """Products of all pairs of rows.

    Args:
        rows: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., A, A)``.
    """
    return ops.matmul(rows, transposed(rows))


def or_one(values: Any) -> Any:
    """Values that are safe to divide by: those greater than 0, and 1 for the others.

    Args:
        values: Any shape.

    Returns:
        Same shape.
    """
    return ops.where(values > 0, values, ops.ones_like(values))


def centred(values: Any, axis: int | tuple[int, ...]) -> Any:
    """Values minus their mean, and exactly zero without gradient where they are constant up to rounding.

    Without the second half, what rounding leaves of a constant would be blown up by any later division.

    Args:
        values: Any shape.
        axis: Dimensions of the mean.

    Returns:
        Same shape.
    """
    mean, fixed = ops.mean(values, axis=axis, keepdims=True), ops.stop_gradient(values)
    # Determined from the extremes, without copies of all values.
    low, high = ops.min(fixed, axis=axis, keepdims=True), ops.max(fixed, axis=axis, keepdims=True)
    middle = ops.stop_gradient(mean)
    rounding = 4 * epsilon_of(values) * ops.maximum(ops.abs(low), ops.abs(high))
    varies = ops.maximum(high - middle, middle - low) > rounding
    return (values - mean) * ops.cast(varies, values.dtype)


def spread_or_one(difference: Any, axis: int | tuple[int, ...], *, count: Any, eps: float = 0.0) -> Any:
    """Standard deviation of centred values, and 1 where they are all zero.

    Args:
        difference: Centred values, any shape.
        axis: Dimensions of the mean.
        count: Divisor of the sum of squares, a number or a scalar tensor.
        eps: Added to the variance.

    Returns:
        The deviations, with ``axis`` kept at size 1.
    """
    squares = ops.sum(ops.square(difference), axis=axis, keepdims=True)
    # The root of a zero variance has no gradient, and the root of a tiny eps is a divisor out of reach of float16.
    return ops.sqrt(ops.where(squares > 0, squares / count + eps, ops.ones_like(squares)))


def transposed(matrices: Any) -> Any:
    """The last two dimensions exchanged.

    Args:
        matrices: Shape ``(..., A, B)``.

    Returns:
        Shape ``(..., B, A)``.
    """
    return ops.swapaxes(matrices, -1, -2)


def by_rows(function: Callable[..., Any], rows: Sequence[Any], shared: Sequence[Any] = (), *, row_size: Any) -> Any:
    """Values of a function for each row, computed over chunks of rows to save memory.

    The backward pass computes each chunk again instead of keeping it.

    Args:
        function: Called with the shared tensors and a chunk of each of the others; returns one value for each row.
        rows: Tensors with the same number of rows.
        shared: Tensors that are handed over whole. A tensor that ``function`` took from elsewhere would get no
            gradient on TensorFlow.
        row_size: How many numbers the largest tensor that ``function`` makes has for each row: an int, or an integer
            tensor where the sizes are not known yet.

    Returns:
        The values, shape ``(N,)``.
    """
    count = ops.shape(rows[0])[0]
    known = isinstance(row_size, int)
    if known and isinstance(count, int) and count * row_size <= _CHUNK:
        return function(*shared, *rows)
    size = max(_CHUNK // row_size, 1) if known else ops.maximum(_CHUNK // row_size, 1)
    chunks = -(-count // size)
    if known and isinstance(count, int):
        # equal chunks need no padding, which would copy all rows
        chunks = next((number for number in range(chunks, 2 * chunks) if count % number == 0), chunks)
        size = -(-count // chunks)
    stacked = []
    for tensor in rows:
        missing = chunks * size - count
        if not isinstance(missing, int) or missing:
            tensor = ops.pad(tensor, [(0, missing)] + [(0, 0)] * (len(tensor.shape) - 1))
        stacked.append(ops.reshape(tensor, (chunks, size, *ops.shape(tensor)[1:])))
    repeated = keras.remat(function)
    return ops.reshape(ops.map(lambda chunk: repeated(*shared, *chunk), stacked), (-1,))[:count]


def resized(teacher: Any, student: Sequence[int | None]) -> Any:
    """Resize the teacher's map to the student's height and width, by averaging or by interpolation.

    Args:
        teacher: The teacher's feature map, shape ``(N, H_t, W_t, C)``.
        student: Sequence[int | None] of the student's map, ``(N, H_s, W_s, ...)``.

    Returns:
        The map, shape ``(N, H_s, W_s, C)``; unchanged if the sizes agree or are unknown.

    Example:
        >>> resized(ops.reshape(ops.arange(4.0), (1, 4, 1, 1)), (1, 2, 1, 1))[0, :, 0, 0].numpy()
        array([0.5, 2.5], dtype=float32)
    """
    for axis in (1, 2):
        target_size = student[axis]
        if teacher.shape[axis] is not None and target_size is not None:
            teacher = resized_along(teacher, axis, target_size)
    return teacher


def resized_along(feature: Any, axis: int, target_size: int) -> Any:
    """Resize one dimension to a size, by averaging to a smaller one or by interpolation to a larger one.

    Args:
        feature: Any shape, whose size along the axis is known.
        axis: The dimension.
        target_size: Its new size.

    Returns:
        The feature; unchanged if it has this size.
    """
    size = feature.shape[axis]
    if size == target_size:
        return feature
    return multiplied(_resizing(size, target_size), feature, axis)


def multiplied(matrix: np.ndarray[Any, Any], feature: Any, axis: int) -> Any:
    """A matrix times every line of a feature along one of its dimensions.

    Args:
        matrix: Shape ``(M, L)``.
        feature: Any shape, of size L at ``axis``.
        axis: The dimension.

    Returns:
        The feature, of size M at ``axis``.
    """
    # not tensordot, whose symbolic form cannot leave the number of examples open
    product = ops.matmul(ops.moveaxis(feature, axis, -1), ops.cast(matrix.T, feature.dtype))
    return ops.moveaxis(product, -1, axis)


def _resizing(size: int, target_size: int) -> np.ndarray[Any, Any]:
    """The matrix that resizes one dimension; height and width can be resized one after the other."""
    matrix = np.zeros((target_size, size))
    for row in range(target_size):
        if target_size < size:  # the mean of all pixels that the new pixel overlaps
            first, last = row * size // target_size, -(-(row + 1) * size // target_size)
            matrix[row, first:last] = 1 / (last - first)
        else:  # linear interpolation between the centres of the pixels, which lie at one half
            centre = max((row + 0.5) * size / target_size - 0.5, 0.0)
            low = min(int(centre), size - 1)
            matrix[row, low] += 1 - (centre - low)
            matrix[row, min(low + 1, size - 1)] += centre - low
    return matrix
