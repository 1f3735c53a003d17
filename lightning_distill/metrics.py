"""Metrics that compare the student with its teacher; they know no trainer and work in a MetricCollection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill import checks
from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.logits import soft_target_kl

_NAMES = ("student_logits", "teacher_logits")


class _MeanOverRows(Metric):
    """Mean over all rows of logits seen, whatever the sizes of the batches and however many processes."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, class_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checks.inner_dim("class_dim", class_dim)
        self.class_dim = class_dim
        # Both are float64 sums: exact up to 2^53 rows, and an average over processes does not round a count.
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Mean over the rows seen since the last reset, a float32 scalar; nan where there were none."""
        return (self.total / self.count).float()

    def _add(self, rows: Tensor) -> None:
        self.total += rows.double().sum()
        self.count += rows.numel()

    def _pair(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = prepare(student_logits, teacher_logits, _NAMES)
        checks.same_shape(student, teacher, names=_NAMES, remedy="Both models must score the same classes.")
        if student.ndim == 1:
            student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
        checks.inner_dim("class_dim", self.class_dim, student.ndim)
        return student.detach(), teacher


class TeacherAgreement(_MeanOverRows):
    """Share of the rows of logits where student and teacher give the highest score to the same class.

    It says how faithfully the student decides as its teacher does, right or wrong. With a single score per example,
    ``(N, 1)`` or ``(N,)``, the two agree where both scores lie on the same side of zero, zero counting as negative.

    Args:
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.
        **kwargs: Settings of every torchmetrics metric, such as ``sync_on_compute``.

    Returns:
        From 0 to 1, higher is better. ``update`` takes logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If the logits are no floating point tensors or ``class_dim`` is no int.
        ValueError: If the shapes differ or ``class_dim`` is the batch dimension.

    Example:
        >>> metric = TeacherAgreement()
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 5.0], [1.0, 2.0, 3.0]])
        >>> metric.update(student, teacher)
        >>> metric.compute()
        tensor(0.6667)

    References:
        Stanton et al. 2021 (average top-1 agreement), arXiv:2106.05945.
    """

    higher_is_better = True

    def __init__(self, class_dim: int = -1, **kwargs: Any) -> None:
        super().__init__(class_dim, **kwargs)

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Count of the agreeing rows of one batch, added to the state."""
        student, teacher = self._pair(student_logits, teacher_logits)
        if student.shape[self.class_dim] == 1:
            self._add((student > 0) == (teacher > 0))
        else:
            self._add(student.argmax(dim=self.class_dim) == teacher.argmax(dim=self.class_dim))


class TeacherDivergence(_MeanOverRows):
    r"""Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.

    .. math:: \frac{1}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc}), \qquad p = \mathrm{softmax}(z / T)

    Unlike SoftTargetLoss it has no factor :math:`T^2`: it is a divergence of two distributions at any temperature.
    A single score per example, ``(N, 1)`` or ``(N,)``, is read as the logit of one of two classes, as by the sigmoid.

    Args:
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.
        **kwargs: Settings of every torchmetrics metric, such as ``sync_on_compute``.

    Returns:
        From 0 up, in nats, lower is better. ``update`` takes logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If the logits are no floating point tensors or a setting has the wrong type.
        ValueError: If the shapes differ, ``class_dim`` is the batch dimension or the temperature is not greater than 0.

    Example:
        >>> metric = TeacherDivergence(temperature=2.0)
        >>> metric.update(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.1424)

    References:
        Stanton et al. 2021 (average predictive KL), arXiv:2106.05945.
    """

    higher_is_better = False

    def __init__(self, temperature: float = 1.0, class_dim: int = -1, **kwargs: Any) -> None:
        super().__init__(class_dim, **kwargs)
        checks.positive("temperature", temperature)
        self.temperature = float(temperature)

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Sum of the divergences of one batch, added to the state."""
        student, teacher = self._pair(student_logits, teacher_logits)
        dim = self.class_dim
        if student.shape[dim] == 1:
            # The sigmoid of z is the softmax of (0, z).
            student, teacher = (torch.cat([torch.zeros_like(z), z], dim=dim) for z in (student, teacher))
        divergence = soft_target_kl(student, teacher, temperature=self.temperature, class_dim=dim)
        self._add(divergence / self.temperature**2)
