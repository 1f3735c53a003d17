"""The loss that tells an example's own remembered embedding from those of other examples."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.contrast import (
    contrast_scores,
    log_mean,
    log_partitions,
    noise_contrast,
    other_rows,
    scattered,
)
from lightning_distill.functional.inputs import prepare, reduced
from lightning_distill.functional.primitives import precise, unit
from lightning_distill.functional.vectors import averaged, examples_of, positions_mask, without
from lightning_distill.losses.memories import RememberingLoss
from lightning_distill.losses.networks import built, channel_dim
from lightning_distill.processes import process_number
from lightning_distill.schedules import Schedule

__all__ = ["ContrastiveRepresentationLoss"]


class ContrastiveRepresentationLoss(RememberingLoss):
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

    In a training in several processes the memories are the same in all of them, and learn from the examples of all.
    The processes exchange their embeddings with the optimizer's step, so that one of them may leave out a batch; with
    gradient accumulation the batches of a step are compared with the memories before it. Until the first exchange each
    process has its own estimate of Z. Where a row occurs several times, as in a last batch that was filled up, its
    entry moves once, to the last of its embeddings. Called by itself, outside of a term, the loss has memories in each
    process. The negatives of a step follow from a number in the loss's state, from the count of steps and from the
    process's number, so that a resumed training draws the same.

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
        {'student_memory': (6, 4), 'teacher_memory': (6, 4), 'draws': (2,), 'log_normalizers': (2,)}

    References:
        Tian et al. 2020 (CRD), equations 18 and 19, arXiv:1910.10699, with 16,384 negatives and a weight of 0.8 (R);
        deviations: Z, which is 1 in the paper, is that of the authors' code; negatives are other examples of any class,
        drawn with replacement; the authors' code adds 1e-7 to the denominators, and flattens maps.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
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
        self.draws: Tensor  # the number that all draws follow from, and how many steps have drawn
        self.log_normalizers: Tensor
        for name in ("student_memory", "teacher_memory", "draws", "log_normalizers"):
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
        self.draws = torch.cat([torch.randint(2**62, (1,)), torch.zeros(1, dtype=torch.int64)])
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
        size = len(memories[0])
        partitions = None
        if self.normalizer is None:
            partitions = torch.stack([log_partitions(each, size) for each in scores], dim=1)
        logs = self._log_normalizers(partitions, counts)
        values = [noise_contrast(each, logs[side], size) for side, each in enumerate(scores)]
        if self.training and torch.is_grad_enabled():
            columns = [index.long(), *(embedding.detach() for embedding in embeddings)]
            columns += [] if partitions is None else [partitions]
            self.remember(*(column if counts is None else column[counts] for column in columns))
        return reduced(values[0] + values[1], counts, "mean")

    def update(self, index: Tensor, *columns: Tensor) -> None:  # type: ignore[override]
        """Move the entries of these rows to new embeddings of the two models, and count the step."""
        embeddings, partitions = columns[:2], columns[2:]
        if partitions:
            self.log_normalizers = torch.stack(self._log_normalizers(partitions[0]))
        # of a row that occurs several times the last embedding counts, whichever entry is written last
        order = index.argsort(stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]
        for memory, embedding in zip((self.student_memory, self.teacher_memory), embeddings, strict=True):
            fresh = unit(embedding[last].to(memory.dtype), 1)
            memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * fresh, 1)
        self.draws[1] += 1

    def no_examples(self) -> tuple[Tensor, ...]:
        """The arguments of :meth:`update` for no example."""
        entries = self.student_memory[:0]
        partitions = () if self.normalizer is not None else (entries.new_zeros(0, 2),)
        return entries.new_zeros(0, dtype=torch.int64), entries, entries, *partitions

    def _chosen(self, index: Tensor) -> Tensor:
        """The row of each example, then the rows of its negatives, shape ``(N, K + 1)``."""
        size, index = len(self.student_memory), index.long()
        if self.negatives < size - 1:
            step = self.draws[1] + len(self.collected or ())
            key = scattered(scattered(self.draws[0] + process_number()) + step)
            others = other_rows(index, self.negatives, size, key)
        else:
            others = (index[:, None] + torch.arange(1, size, device=index.device)) % size
        return torch.cat([index[:, None], others], dim=1)

    def _log_normalizers(self, partitions: Tensor | None, counts: Tensor | None = None) -> list[Any]:
        """The logarithms of both constants; those of the first batch are kept."""
        if partitions is None:
            return [math.log(built(self.normalizer))] * 2
        known = self.log_normalizers
        # not a condition on the host, which would wait for the device in every step
        return list(torch.where(known.isinf(), log_mean(partitions, counts).to(known.dtype), known))
