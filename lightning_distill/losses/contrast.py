"""The loss that tells an example's own remembered embedding from those of other examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.contrast import contrast_scores, log_partition, noise_contrast
from lightning_distill.functional.inputs import prepare, reduced
from lightning_distill.functional.primitives import precise, unit
from lightning_distill.functional.vectors import averaged, examples_of, positions_mask, without
from lightning_distill.losses.base import DistillationLoss
from lightning_distill.losses.networks import built, channel_dim
from lightning_distill.schedules import Schedule

__all__ = ["ContrastiveRepresentationLoss"]


class ContrastiveRepresentationLoss(DistillationLoss):
    r"""Binary cross entropy of telling an example's own remembered embedding from those of other examples.

    .. math:: \frac{1}{N} \sum_n \sum_{(u, v)} \left( - \log h(u_n, v_n)
        - \sum_{k=1}^{K} \log (1 - h(u_n, v_{j_k})) \right), \qquad
        h(u, v) = \frac{p}{p + K / M}, \quad p = \frac{1}{Z} \exp \left( \frac{u \cdot v}{T} \right)

    Take the last feature of each model before its classifier. Two linear maps to embeddings of length one are learned,
    and two memories hold an embedding of each example of the data set: u is the student's embedding and v an entry of
    the teacher's memory, then the other way round. In each step the K negatives are drawn from the examples other than
    n; where the data set has no more, each of them is one. After a step the entries of the batch move to the new
    embeddings. Maps and tokens are averaged over their positions. No adapter is needed.

    The third argument is the row of each example in the data set. In a FeatureDistillation a TeacherCache knows it, and
    the ``size`` too; without a cache say where a batch keeps it: ``FeatureDistillation(..., index="index")``.
    Validation leaves the term out, since the rows are those of the training data. Inside a FeatureDistillation the maps
    and the memories are made, trained, saved and resumed as adapters are. See
    :func:`lightning_distill.functional.contrastive_representation`.

    In a distributed training each process has memories of its own, which learn from its own examples: processes meet in
    the optimizer's step alone. A checkpoint has those of the first process, with which all of them resume.

    Args:
        temperature: The temperature T, greater than 0; a number or a schedule.
        size: Number M of examples in the data set, at least 2; ``None`` takes it from the cache.
        negatives: Number K of negatives of an example, at least 1. A step needs memory for 2 N K ``width`` numbers.
        width: Width of the embeddings, at least 1.
        momentum: Share of an entry that stays, at least 0 and less than 1.
        normalizer: The constant Z, greater than 0; ``None`` takes it from the first batch, as the mean of the
            exponentials times M, and keeps it.

    Returns:
        A scalar in nats when called with features ``(N, C_s, ...)`` of the student, ``(N, C_t, ...)`` of the teacher,
        and rows ``(N,)``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = ContrastiveRepresentationLoss(size=6, width=4)
        >>> loss.build(torch.Size((2, 8)), torch.Size((2, 16)))
        >>> {name: tuple(values.shape) for name, values in loss.named_buffers()}
        {'student_memory': (6, 4), 'teacher_memory': (6, 4), 'log_normalizers': (2,)}

    References:
        Tian et al. 2020 (CRD), equations 18 and 19, arXiv:1910.10699, with 16,384 negatives and a weight of 0.8 (R);
        deviations: Z, which is 1 in the paper, is that of the authors' code; negatives are other examples of any class,
        drawn with replacement; the authors' code adds 1e-7 to the denominators, and flattens maps.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    needs_index: ClassVar[bool] = True
    size: int | None
    negatives: int
    width: int
    momentum: float
    normalizer: float | None

    def __init__(
        self,
        temperature: float | Schedule = 0.07,
        *,
        size: int | None = None,
        negatives: int = 16384,
        width: int = 128,
        momentum: float = 0.5,
        normalizer: float | None = None,
    ) -> None:
        super().__init__()
        for name, number, least in (("size", size, 2), ("negatives", negatives, 1), ("width", width, 1)):
            if number is not None:
                checks.integer(name, number)
                checks.at_least(name, number, least)
        checks.fraction("momentum", momentum)
        if normalizer is not None:
            checks.positive("normalizer", normalizer)
        self._fix(size=None if size is None else int(size), negatives=int(negatives), width=int(width))
        self.temperature = self._setting("temperature", temperature)
        self._fix(momentum=float(momentum), normalizer=None if normalizer is None else float(normalizer))
        self.student_embedding: nn.Linear | None = None
        self.teacher_embedding: nn.Linear | None = None
        self.student_memory: Tensor
        self.teacher_memory: Tensor
        self.log_normalizers: Tensor
        for name in ("student_memory", "teacher_memory", "log_normalizers"):
            self.register_buffer(name, None)

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the maps, and memories of random vectors, for features of these shapes, replacing earlier ones."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        if self.size is None:
            expected = "`size` to be the number of examples in the data set"
            remedy = "Pass ContrastiveRepresentationLoss(size=len(dataset)), or train from a TeacherCache."
            raise ValueError(checks.message(expected, "size=None", remedy))
        self.student_embedding = nn.Linear(student[channel_dim(student)], self.width)
        self.teacher_embedding = nn.Linear(teacher[channel_dim(teacher)], self.width)
        self.student_memory = unit(torch.randn(self.size, self.width), 1)
        self.teacher_memory = unit(torch.randn(self.size, self.width), 1)
        if self.normalizer is None:
            self.log_normalizers = torch.full((2,), -torch.inf)  # Z is 0 until a batch has given it

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar; in training the batch's entries of the memories move to its embeddings."""
        maps = built(self.student_embedding), built(self.teacher_embedding)
        positions = [positions_mask(mask, feature) for feature in (student, teacher)]
        features = [
            averaged(without(feature, counted), counted)
            for feature, counted in zip(prepare(student, teacher), positions, strict=True)
        ]
        counts = None if mask is None else examples_of(mask)
        embeddings = [precise(layer, feature) for layer, feature in zip(maps, features, strict=True)]
        memories = self.student_memory, self.teacher_memory
        # copies of the entries: a backward pass needs them after the memories have changed
        chosen = self._chosen(index)
        entries = [memory.index_select(0, chosen.flatten()).view(*chosen.shape, -1) for memory in memories]
        scores = [
            contrast_scores(embedding, others, self.temperature, counts)
            for embedding, others in zip(embeddings, reversed(entries), strict=True)
        ]
        updates = self.training and torch.is_grad_enabled()
        values = [
            noise_contrast(each, log, len(memories[0]))
            for each, log in zip(scores, self._log_normalizers(scores, counts, updates), strict=True)
        ]
        if updates:
            for memory, embedding in zip(memories, embeddings, strict=True):
                self._move(memory, index, embedding.detach(), counts)
        return reduced(values[0] + values[1], counts, "mean")

    def _chosen(self, index: Tensor) -> Tensor:
        """The row of each example, then the rows of its negatives, shape ``(N, K + 1)``."""
        size, index = len(self.student_memory), index.long()[:, None]
        if self.negatives < size - 1:
            steps = torch.randint(1, size, (len(index), self.negatives), device=index.device)
        else:
            steps = torch.arange(1, size, device=index.device)[None]
        return torch.cat([index, (index + steps) % size], dim=1)

    def _log_normalizers(self, scores: list[Tensor], counts: Tensor | None, updates: bool) -> Sequence[Tensor | float]:
        """The logarithms of both constants; those of the first batch are kept."""
        if self.normalizer is not None:
            return [math.log(self.normalizer)] * 2
        estimates = torch.stack([log_partition(each, len(self.student_memory), counts) for each in scores])
        known = self.log_normalizers
        # not a condition on the host, which would wait for the device in every step
        used = torch.where(known.isinf(), estimates.to(known.dtype), known)
        if updates:
            self.log_normalizers = used
        return [used[0], used[1]]

    def _move(self, memory: Tensor, index: Tensor, embedding: Tensor, counts: Tensor | None) -> None:
        if counts is not None:
            index, embedding = index[counts], embedding[counts]
        fresh = unit(embedding.to(memory.dtype), 1)
        memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * fresh, 1)
