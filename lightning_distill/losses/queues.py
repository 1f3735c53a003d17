"""Losses on embeddings and a queue of the teacher's earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.primitives import unit
from lightning_distill.functional.queues import queue_similarity
from lightning_distill.losses.memories import RememberingLoss
from lightning_distill.losses.networks import built
from lightning_distill.schedules import Schedule

__all__ = ["QueueSimilarityLoss"]


class QueueSimilarityLoss(RememberingLoss):
    r"""Cross entropy between the two models' softmaxes over an embedding's similarities to a queue of the teacher's.

    .. math:: - \frac{1}{N} \sum_n \sum_{j=0}^{K} p^t_{nj} \log p^s_{nj}, \qquad
        p^s_n = \mathrm{softmax}_j(z^s_n \cdot d_j / T_s), \quad p^t_n = \mathrm{softmax}_j(z^t_n \cdot d_j / T_t)

    For embeddings of whole images, without labels. The queue holds the teacher's embeddings d of the last ``size``
    examples, and for each example its own. Inside a FeatureDistillation it is made, saved and resumed as adapters are.
    A training step adds the batch to the queue after it was compared, and the oldest entries leave it; validation
    changes nothing. At first it holds random vectors, as in the authors' code. See
    :func:`lightning_distill.functional.queue_similarity`.

    In a training in several processes the queue is the same in all of them, as if one process had their batches in the
    order of the processes' numbers. They exchange their embeddings with the optimizer's step, so that a process may
    leave out a batch; with gradient accumulation the batches of a step are compared with the queue before it. Called by
    itself, outside of a term, the loss has a queue in each process.

    Args:
        size: Number of entries of the queue, at least 1.
        student_temperature: Softening of the student's distribution, greater than 0; a number or a schedule.
        teacher_temperature: Softening of the teacher's distribution, greater than 0; a number or a schedule.

    Returns:
        A scalar in nats when called with embeddings ``(N, D)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = QueueSimilarityLoss(size=2)
        >>> loss.build(torch.Size((1, 3)), torch.Size((1, 3)))
        >>> value = loss(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]]))
        >>> loss.queue[0]
        tensor([0., 1., 0.])

    References:
        Fang et al. 2021 (SEED), equations 4 and 5, arXiv:2101.04731, with temperatures of 0.2 and 0.01 and 65,536
        entries.
    """

    size: int
    student_temperature: float
    teacher_temperature: float

    def __init__(
        self,
        *,
        size: int = 65536,
        student_temperature: float | Schedule = 0.2,
        teacher_temperature: float | Schedule = 0.01,
    ) -> None:
        super().__init__()
        checks.integer("size", size)
        checks.at_least("size", size, 1)
        self._fix(size=int(size))
        self.student_temperature = self._setting("student_temperature", student_temperature)
        self.teacher_temperature = self._setting("teacher_temperature", teacher_temperature)
        self.queue: Tensor | None
        self.register_buffer("queue", None)

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make a queue of random vectors for features of these shapes, replacing an earlier one."""
        if len(student) != 2 or len(teacher) != 2 or student[1] != teacher[1]:
            expected = "`student` and `teacher` to be embeddings (N, D) of equal width"
            remedy = 'Pass adapter="pool", or name the pooling layers.'
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}", remedy))
        self.queue = unit(torch.randn(self.size, teacher[1]), 1)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar; in training the batch joins the queue."""
        queue = built(self.queue)
        temperatures = {
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature,
        }
        value = queue_similarity(student, teacher, queue=queue, **temperatures, mask=mask, reduction="mean")
        if self.training and torch.is_grad_enabled():
            counted = teacher.detach() if mask is None else teacher.detach()[mask]
            self.remember(unit(counted.to(queue.dtype), 1))
        return value

    def update(self, entries: Tensor) -> None:  # type: ignore[override]
        """Put new entries, of length one, at the front of the queue; the oldest leave it."""
        # a new tensor, since the backward pass still needs the old one
        self.queue = torch.cat([entries, built(self.queue)])[: self.size]

    def no_examples(self) -> tuple[Tensor, ...]:
        """The argument of :meth:`update` for no example."""
        return (built(self.queue)[:0],)
