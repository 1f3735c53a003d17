"""What the formulas on features share: means over an example, vectors of length one."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks


def per_example(values: Any) -> Any:
    """Mean over all but the first dimension.

    Args:
        values: Any shape ``(N, ...)``.

    Returns:
        The means, shape ``(N,)``.
    """
    return ops.mean(values, axis=tuple(range(1, len(values.shape)))) if len(values.shape) > 1 else values


def check_positions(student: Any, teacher: Any) -> None:
    """Check that two features have the same examples and positions, whatever their channels.

    Args:
        student: The student's feature, shape ``(N, H, W, C_s)`` or ``(N, L, C_s)``.
        teacher: The teacher's feature, same shape up to the number of channels.

    Raises:
        ValueError: If they differ or there is only one position.
    """
    mine, theirs = tuple(student.shape)[:-1], tuple(teacher.shape)[:-1]
    if len(mine) >= 2 and not checks.shapes_differ(mine, theirs) and any(size != 1 for size in mine[1:]):
        return
    expected = "`student` and `teacher` to have the same examples and positions, more than one, whatever their channels"
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
    return vectors / ops.sqrt(or_one(ops.sum(ops.square(vectors), axis=axis, keepdims=True)))


def or_one(values: Any) -> Any:
    """Values that are safe to divide by: those greater than 0, and 1 for the others.

    Args:
        values: Any shape.

    Returns:
        Same shape.
    """
    return ops.where(values > 0, values, ops.ones_like(values))
