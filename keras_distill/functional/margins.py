"""The distance that leaves alone what a ReLU cuts off: student first, channels last, one value per example."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_equal
from keras_distill.functional.vectors import per_example

__all__ = ["margin_relu_distance"]


def margin_relu_distance(student: Any, teacher: Any, *, margins: Any, per_position: bool = False) -> Any:
    r"""Mean squared difference from the teacher's response, except where both are cut off by a ReLU.

    .. math:: \frac{1}{D} \sum_d \begin{cases} 0 & f^s_d \le t_d \le 0 \\ (f^s_d - t_d)^2 & \text{else} \end{cases},
        \qquad t_d = \max(f^t_d, m_{c(d)})

    Both features are taken before the ReLU. Positive responses are matched. A negative response of the teacher only
    asks for one that is at least as far below zero, and the margin :math:`m_c` of the channel is far enough.

    Args:
        student: The student's feature before its activation, shape ``(N, ..., C)`` with D numbers per example.
        teacher: The teacher's feature before its activation, same shape.
        margins: The margin of each channel, at most 0, shape ``(C,)``.
        per_position: Whether only the channels are averaged.

    Returns:
        Mean squared difference, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the shapes differ, or ``margins`` does not have one number for each channel.

    Example:
        >>> values = margin_relu_distance([[0.5, -3.0, 2.0]], [[1.5, -1.0, -4.0]], margins=[-1.0, -1.0, -1.0])
        >>> round(float(values[0]), 4)
        3.3333

    References:
        Heo et al. 2019, equations 1 to 3, arXiv:1904.01866; deviation: the mean instead of the sum over the numbers.
        Published code has a factor of 0.001 and halves it for each layer before the last.
    """
    student, teacher = prepare_equal(student, teacher)
    shape, margins = tuple(student.shape), ops.cast(ops.convert_to_tensor(margins), student.dtype)
    if len(shape) < 2:
        raise ValueError(checks.message("features to have channels", f"shape {shape}"))
    if tuple(margins.shape) != (shape[-1],):
        expected = f"`margins` to have one number for each of the {shape[-1]} channels"
        raise ValueError(checks.message(expected, f"shape {tuple(margins.shape)}"))
    teacher = ops.maximum(teacher, ops.stop_gradient(margins))
    counts = ops.logical_or(student > teacher, teacher > 0)
    values = ops.square(ops.where(counts, student - teacher, ops.zeros_like(student)))
    return ops.mean(values, axis=-1) if per_position else per_example(values)
