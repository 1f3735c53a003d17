"""Metrics that compare the student with its teacher; they know no trainer and work in a MetricCollection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill import checks
from lightning_distill.functional.inputs import prepare, resolve_class_dim, rows_mask
from lightning_distill.functional.logits import soft_target_kl

_NAMES = ("student_logits", "teacher_logits")


class _OverRows(Metric):
    """A mean over all rows of logits, for any sizes of batches and any number of processes.

    The states have types that every device supports: MPS has no float64.

    Args:
        class_dim: Dimension of the classes, or None.
        **kwargs: Settings of every torchmetrics metric.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, class_dim: int | None, total_dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if class_dim is not None:
            checks.inner_dim("class_dim", class_dim)
        self.class_dim = class_dim
        self.add_state("total", default=torch.zeros((), dtype=total_dtype), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _pair(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """Both models' logits with at least two dimensions, the dimension of the classes and the mask of the rows."""
        student, teacher = prepare(student_logits, teacher_logits, _NAMES)
        checks.same_shape(student, teacher, names=_NAMES, remedy="Both models must score the same classes.")
        if student.ndim == 1:
            student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
        dim = resolve_class_dim(student, self.class_dim) % student.ndim
        shape = tuple(student.shape)
        rows = None if mask is None else rows_mask(mask, shape[:dim] + shape[dim + 1 :])
        self.count += student.numel() // student.shape[dim] if rows is None else rows.sum()
        return student.detach(), teacher, dim, rows


class TeacherAgreement(_OverRows):
    """Share of the rows of logits where student and teacher give the highest score to the same class.

    It measures how often the student decides as its teacher does, right or wrong. With a single score per example,
    ``(N, 1)`` or ``(N,)``, the two agree if both scores lie on the same side of zero; zero counts as negative.

    Args:
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        **kwargs: Settings of every torchmetrics metric, such as ``sync_on_compute``.

    Returns:
        From 0 to 1, higher is better. ``update`` takes logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If the logits are not floating point tensors or ``class_dim`` is not an int.
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

    def __init__(self, *, class_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(class_dim, torch.int64, **kwargs)

    def update(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> None:
        """Count the agreeing rows of one batch.

        Args:
            student_logits: Shape ``(N, ..., C)``.
            teacher_logits: Same shape.
            mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        """
        student, teacher, dim, counts = self._pair(student_logits, teacher_logits, mask)
        if student.shape[dim] == 1:
            agrees = ((student > 0) == (teacher > 0)).squeeze(dim)
        else:
            agrees = student.argmax(dim=dim) == teacher.argmax(dim=dim)
        self.total += agrees.sum() if counts is None else (agrees & counts).sum()

    def compute(self) -> Tensor:
        """Share of the rows seen since the last reset, a float32 scalar; NaN before the first row."""
        return self.total.float() / self.count.float()


class TeacherDivergence(_OverRows):
    r"""Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.

    .. math:: \frac{1}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc}), \qquad p = \mathrm{softmax}(z / T)

    Unlike SoftTargetLoss it has no factor :math:`T^2`: it is a divergence of two distributions at any temperature.
    A single score per example, ``(N, 1)`` or ``(N,)``, is read as the logit of one of two classes, as by the sigmoid.

    Args:
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        **kwargs: Settings of every torchmetrics metric, such as ``sync_on_compute``.

    Returns:
        From 0 up, in nats, lower is better. ``update`` takes logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If the logits are not floating point tensors or a setting has the wrong type.
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
    rest: Tensor

    def __init__(self, temperature: float = 1.0, *, class_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(class_dim, torch.float32, **kwargs)
        checks.positive("temperature", temperature)
        self.temperature = float(temperature)
        self.add_state("rest", default=torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> None:
        """Add the divergences of one batch.

        Args:
            student_logits: Shape ``(N, ..., C)``.
            teacher_logits: Same shape.
            mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        """
        student, teacher, dim, counts = self._pair(student_logits, teacher_logits, mask)
        if student.shape[dim] == 1:
            # The sigmoid of z is the softmax of (0, z).
            student, teacher = (torch.cat([torch.zeros_like(z), z], dim=dim) for z in (student, teacher))
        values = soft_target_kl(student, teacher, temperature=self.temperature, class_dim=dim, mask=counts)
        exact = values.sum() / self.temperature**2
        added = exact.float()
        # The rounding error of the float32 sum is kept beside it (Knuth's two-sum): many small batches lose nothing.
        total = self.total + added
        part = total - self.total
        self.rest += (self.total - (total - part)) + (added - part) + (exact - added).float()
        self.total = total

    def compute(self) -> Tensor:
        """Mean over the rows seen since the last reset, a float32 scalar; NaN before the first row."""
        return (self.total + self.rest) / self.count.float()
