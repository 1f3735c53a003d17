"""Formulas on embeddings and a queue of earlier ones: student first, one value per example."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_number
from keras_distill.functional.vectors import unit

__all__ = ["queue_similarity"]


def queue_similarity(
    student: Any, teacher: Any, *, queue: Any, student_temperature: Any = 0.2, teacher_temperature: Any = 0.01
) -> Any:
    r"""Cross entropy between the two models' softmaxes over an embedding's similarities to a queue.

    .. math:: - \sum_{j=0}^{K} p^t_j \log p^s_j, \qquad p^s = \mathrm{softmax}_j(z^s \cdot d_j / T_s), \quad
        p^t = \mathrm{softmax}_j(z^t \cdot d_j / T_t), \quad d_0 = z^t

    Embeddings z and the entries d of the queue are divided by their lengths. The teacher's own embedding of the example
    is an entry too.

    Args:
        student: The student's embeddings, shape ``(N, D)``.
        teacher: The teacher's embeddings of the same examples, same shape.
        queue: K embeddings of the teacher, of other examples, shape ``(K, D)``.
        student_temperature: Softening of the student's distribution, greater than 0; a scalar variable may be changed
            while training.
        teacher_temperature: Softening of the teacher's distribution, likewise.

    Returns:
        Cross entropy in nats, shape ``(N,)``.

    Raises:
        TypeError: If an embedding is not a floating point tensor, or a temperature not a number.
        ValueError: If the shapes do not fit, or a temperature is not greater than 0.

    Example:
        >>> settings = {"student_temperature": 1.0, "teacher_temperature": 1.0}
        >>> value = queue_similarity([[1.0, 0.0]], [[0.0, 2.0]], queue=[[3.0, 0.0]], **settings)
        >>> round(float(value[0]), 4)
        1.0443

    References:
        Fang et al. 2021 (SEED), equations 4 and 5, arXiv:2101.04731.
    """
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy="Map the student's embedding to the teacher's width with an adapter.")
    queue = ops.stop_gradient(ops.convert_to_tensor(queue))
    checks.floating("queue", queue)
    shape = tuple(student.shape)
    if len(shape) != 2:
        remedy = 'Pass adapter="pool", or name a pooling layer.'
        raise ValueError(checks.message("embeddings of shape (N, D)", f"shape {shape}", remedy))
    if len(queue.shape) != 2 or checks.shapes_differ(tuple(queue.shape)[1:], shape[1:]):
        expected = f"`queue` to hold embeddings of width {shape[1]}, shape (K, {shape[1]})"
        raise ValueError(checks.message(expected, f"shape {tuple(queue.shape)}"))
    student_temperature = prepare_number("student_temperature", student_temperature, student, checks.positive)
    teacher_temperature = prepare_number("teacher_temperature", teacher_temperature, student, checks.positive)
    student, teacher = unit(student, 1), unit(teacher, 1)
    entries = ops.transpose(unit(ops.cast(queue, student.dtype), 1))

    def scores(vectors: Any) -> Any:
        own = ops.sum(vectors * teacher, axis=1, keepdims=True)
        return ops.concatenate([own, ops.matmul(vectors, entries)], axis=1)

    soft_targets = ops.softmax(scores(teacher) / teacher_temperature, axis=1)
    return -ops.sum(soft_targets * ops.log_softmax(scores(student) / student_temperature, axis=1), axis=1)
