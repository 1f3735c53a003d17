"""Formulas on embeddings and a queue of earlier ones: student first, one value per example."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare, reduced, rows_mask
from lightning_distill.functional.primitives import precise, unit

__all__ = ["queue_similarity"]


def queue_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    queue: Tensor,
    student_temperature: float = 0.2,
    teacher_temperature: float = 0.01,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Cross entropy between the two models' softmaxes over an embedding's similarities to a queue.

    .. math:: - \sum_{j=0}^{K} p^t_j \log p^s_j, \qquad p^s = \mathrm{softmax}_j(z^s \cdot d_j / T_s), \quad
        p^t = \mathrm{softmax}_j(z^t \cdot d_j / T_t), \quad d_0 = z^t

    Embeddings z and the entries d of the queue are divided by their lengths. The teacher's own embedding of the example
    is an entry too.

    Args:
        student: The student's embeddings, shape ``(N, D)``.
        teacher: The teacher's embeddings of the same examples, same shape.
        queue: K embeddings of the teacher, of other examples, shape ``(K, D)``.
        student_temperature: Softening of the student's distribution, greater than 0.
        teacher_temperature: Softening of the teacher's distribution, greater than 0.
        mask: True where an example counts, shape ``(N,)``; None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats, shape ``(N,)``.

    Raises:
        TypeError: If an embedding is not a floating point tensor, or a temperature not a number.
        ValueError: If the shapes do not fit, or a temperature is not greater than 0.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> settings = {"student_temperature": 1.0, "teacher_temperature": 1.0}
        >>> queue_similarity(student, teacher, queue=torch.tensor([[3.0, 0.0]]), **settings)
        tensor([1.0443])

    References:
        Fang et al. 2021 (SEED), equations 4 and 5, arXiv:2101.04731.
    """
    checks.positive("student_temperature", student_temperature)
    checks.positive("teacher_temperature", teacher_temperature)
    student, teacher = prepare(student, teacher)
    checks.same_shape(student, teacher, remedy="Map the student's embedding to the teacher's width with an adapter.")
    checks.floating("queue", queue)
    if student.ndim != 2:
        remedy = 'Pass adapter="pool", or name a pooling layer.'
        raise ValueError(checks.message("embeddings of shape (N, D)", f"shape {tuple(student.shape)}", remedy))
    if queue.ndim != 2 or queue.shape[1] != student.shape[1]:
        expected = f"`queue` to hold embeddings of width {student.shape[1]}, shape (K, {student.shape[1]})"
        raise ValueError(checks.message(expected, f"shape {tuple(queue.shape)}"))
    counts = None if mask is None else rows_mask(mask, tuple(student.shape[:1]))
    if counts is not None:
        student, teacher = (torch.where(counts[:, None], vectors, 0.0) for vectors in (student, teacher))
    student, teacher = unit(student, 1), unit(teacher, 1)
    entries = unit(queue.detach().to(student.dtype), 1)

    def similarities(vectors: Tensor) -> Tensor:
        return vectors @ entries.T

    student_scores, teacher_scores = (
        torch.cat([(vectors * teacher).sum(dim=1, keepdim=True), precise(similarities, vectors)], dim=1) / temperature
        for vectors, temperature in ((student, student_temperature), (teacher, teacher_temperature))
    )
    values = -(teacher_scores.softmax(dim=1) * student_scores.log_softmax(dim=1)).sum(dim=1)
    return reduced(values, counts, reduction)
