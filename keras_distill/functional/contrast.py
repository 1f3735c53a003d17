"""Noise contrastive estimation between embeddings and remembered ones: student first, one value per example."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_number
from keras_distill.functional.vectors import unit

__all__ = ["contrastive_representation"]


def contrastive_representation(
    student: Any,
    teacher: Any,
    *,
    student_entries: Any,
    teacher_entries: Any,
    size: int,
    normalizers: tuple[float, float] = (1.0, 1.0),
    temperature: float = 0.07,
) -> Any:
    r"""Binary cross entropy of telling an example's own remembered embedding from those of other examples.

    .. math:: \sum_{(u, v)} \left( - \log h(u, v_0) - \sum_{k=1}^{K} \log (1 - h(u, v_k)) \right), \qquad
        h(u, v) = \frac{p}{p + K / M}, \quad p = \frac{1}{Z} \exp \left( \frac{u \cdot v}{T} \right)

    The sum is over two pairs: the student's embedding u with entries v of the teacher's memory, and the teacher's
    embedding with entries of the student's. The embeddings are divided by their lengths; the entries are used as they
    are. Both embeddings have a gradient, since the teacher's is the output of a learned map; the entries have none.

    Args:
        student: The student's embeddings, shape ``(N, D)``.
        teacher: The teacher's embeddings of the same examples, same shape.
        student_entries: For each example its own remembered embedding of the student, then those of K other examples,
            of length 1, shape ``(N, K + 1, D)``.
        teacher_entries: The same of the teacher, same shape.
        size: Number M of examples in the data set, at least 2.
        normalizers: The two constants Z, greater than 0: of the student's embedding, then of the teacher's.
        temperature: The temperature T, greater than 0; a scalar variable may be changed while training.

    Returns:
        Cross entropy in nats, shape ``(N,)``, summed over the K negatives.

    Raises:
        TypeError: If a tensor is not floating point, or a setting is not a number.
        ValueError: If the shapes do not fit, or a setting is out of its range.

    Example:
        >>> entries = [[[1.0, 0.0], [0.0, 1.0]]]
        >>> settings = {"student_entries": entries, "teacher_entries": entries, "size": 2, "temperature": 1.0}
        >>> value = contrastive_representation([[3.0, 0.0]], [[0.0, 1.0]], **settings)
        >>> round(float(value[0]), 4)
        3.5349

    References:
        Tian et al. 2020 (CRD), equations 18 and 19, arXiv:1910.10699, where Z is 1. The authors' code has the constant
        Z of Wu et al. 2018, arXiv:1805.01978, and adds 1e-7 to the denominators.
    """
    checks.integer("size", size)
    checks.at_least("size", size, 2)
    for number in normalizers:
        checks.positive("normalizers", number)
    student, teacher = (ops.convert_to_tensor(tensor) for tensor in (student, teacher))
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    checks.same_shape(student, teacher, remedy="Map both features to embeddings of one width.")
    shape = tuple(student.shape)
    if len(shape) != 2:
        raise ValueError(checks.message("embeddings of shape (N, D)", f"shape {shape}"))
    entries = {"student_entries": student_entries, "teacher_entries": teacher_entries}
    for name, tensor in entries.items():
        entries[name] = tensor = ops.convert_to_tensor(tensor)
        checks.floating(name, tensor)
        known = tuple(tensor.shape)
        if len(known) != 3 or checks.shapes_differ((known[0], known[2]), shape) or known[1] < 2:
            expected = f"`{name}` to hold an example's own entry and those of others, shape (N, K + 1, D)"
            raise ValueError(checks.message(expected, f"shape {known}"))
    of_student = contrast_scores(student, entries["teacher_entries"], temperature)
    of_teacher = contrast_scores(teacher, entries["student_entries"], temperature)
    logs = [math.log(number) for number in normalizers]
    return noise_contrast(of_student, logs[0], size) + noise_contrast(of_teacher, logs[1], size)


def contrast_scores(embedding: Any, entries: Any, temperature: Any) -> Any:
    """Products of embeddings of length 1 with remembered ones, divided by the temperature.

    Args:
        embedding: Shape ``(N, D)``.
        entries: Shape ``(N, K + 1, D)``; they get no gradient.
        temperature: Greater than 0, a number or a scalar variable.

    Returns:
        Shape ``(N, K + 1)``, in float32 or better.
    """
    dtype = keras.backend.result_type(embedding.dtype, entries.dtype, "float32")
    embedding, entries = unit(ops.cast(embedding, dtype), 1), ops.cast(ops.stop_gradient(entries), dtype)
    products = ops.squeeze(ops.matmul(entries, ops.expand_dims(embedding, 2)), axis=2)
    return products / prepare_number("temperature", temperature, products, checks.positive)


def noise_contrast(scores: Any, log_normalizer: Any, size: int) -> Any:
    """Binary cross entropy of the first score being the example's own and the others being noise.

    Args:
        scores: The result of :func:`contrast_scores`.
        log_normalizer: Logarithm of the constant Z, a scalar.
        size: Number of examples in the data set.

    Returns:
        Shape ``(N,)``.
    """
    # log p - log (K / M), the logits of h
    logits = scores - log_normalizer - math.log((scores.shape[1] - 1) / size)
    return ops.softplus(-logits[:, 0]) + ops.sum(ops.softplus(logits[:, 1:]), axis=1)


def log_partition(scores: Any, size: int) -> Any:
    """Logarithm of Z as a batch estimates it: the mean of the exponentials times the number of examples.

    Args:
        scores: The result of :func:`contrast_scores`.
        size: Number of examples in the data set.

    Returns:
        A scalar without a gradient.
    """
    scores = ops.stop_gradient(scores)
    number = ops.cast(ops.size(scores), scores.dtype)
    return ops.logsumexp(scores) - ops.log(number) + math.log(size)
