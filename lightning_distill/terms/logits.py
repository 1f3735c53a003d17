"""The term on the two networks' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill_core.requires import Requires
from lightning_distill.functional.inputs import resolve_class_dim
from lightning_distill.functional.top_k import Sampled, TopK, merge_classes
from lightning_distill.losses import DistillationLoss, SoftTargetLoss
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.recording import Call
from lightning_distill.recording.outputs import Output
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import DistillationTerm, LossCallable
from lightning_distill.terms.losses import (
    Mask,
    check_held,
    check_takes_mask,
    checked_loss,
    counted_positions,
    value_of,
)
from lightning_distill.terms.maps import reads_maps, resized, resized_mask


class LogitsDistillation(DistillationTerm):
    """A loss between the logits of the two networks.

    Logits may be maps (N, C, H, W), as in segmentation. A teacher's map of another height or width than the student's
    is resized to it: averaged down, interpolated up.

    If a network's output has several tensors and none of them is named ``"logits"``, ``output`` must name one. For
    several outputs use one term each, with distinct names.

    Args:
        loss: A loss on ``(student_logits, teacher_logits)``; ``None`` is :class:`SoftTargetLoss` at temperature 4. A
            loss with ``needs_labels = True`` is called with the labels too.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and checkpoints.
        output: Which tensor of the networks' outputs: an index, a key or field name, or a function of the output; a
            pair of the student's and the teacher's where they differ. ``None`` takes the logits.
        mask: Where a batch keeps the mask of the positions that count: a key such as ``"attention_mask"``, an index, or
            a function of the batch. Shape ``(N,)``, ``(N, L)`` or ``(N, H, W)``; a position of a smaller map counts if
            at least half of its pixels do.
        ignore_index: Positions with this label do not count, as in ``torch.nn.CrossEntropyLoss``; ``None`` reads no
            labels. The labels may have more pixels than the logits.

    Raises:
        TypeError: If ``loss`` cannot be called, or is a class.
        ValueError: If ``weight`` is negative, or the loss cannot leave out positions where a mask is given.

    Example:
        >>> import torch
        >>> term = LogitsDistillation(SoftTargetLoss(temperature=1.0), weight=0.5)
        >>> term(Call((), {}, output=torch.tensor([[2.0, 0.0]])), Call((), {}, output=torch.tensor([[0.0, 1.0]])))
        tensor(1.0068)

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        loss: DistillationLoss | LossCallable | None = None,
        *,
        weight: Weight = 1.0,
        name: str = "logits",
        output: Output | tuple[Output, Output] = None,
        mask: Mask | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.loss = checked_loss(SoftTargetLoss() if loss is None else loss)
        self.requires = Requires.of(self.loss)
        if self.requires.learned:
            raise TypeError(
                f"Expected `loss` to have no parameters of its own, but got {type(loss).__name__}. Use it in a"
                ' FeatureDistillation; the layers "" and "" are the outputs of the two networks.'
            )
        if mask is not None or ignore_index is not None:
            check_takes_mask(self.loss)
        self.output, self.mask, self.ignore_index = output, mask, ignore_index
        self.needs_labels = self.requires.needs_labels or ignore_index is not None
        self.compares_class_scores = self.requires.class_scores

    @property
    def curriculum(self) -> CurriculumTemperature | None:
        """The temperature of the loss, if it is learned."""
        temperature = getattr(self.loss, "temperature", None)
        return temperature if isinstance(temperature, CurriculumTemperature) else None

    @property
    def makes_parts(self) -> bool:
        """Whether the term learns the temperature of its loss."""
        return self.curriculum is not None or type(self).build is not LogitsDistillation.build

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Move a learned temperature to the device of the logits."""
        if self.curriculum is not None:
            self.curriculum.to(student.output_at(self._output(0)).device)

    def reset(self) -> None:
        """Start a learned temperature again."""
        if self.curriculum is not None:
            self.curriculum.reset()

    def learned_numbers(self) -> dict[str, Tensor]:
        """The learned temperature, to log."""
        curriculum = self.curriculum
        return {} if curriculum is None else {f"{self.name}_temperature": curriculum.value.detach()}

    @property
    def class_dim(self) -> int | None:
        """Dimension of the logits that counts the classes; ``None`` leaves it to their shape."""
        dim: int | None = getattr(self.loss, "class_dim", None)
        return dim

    def pair(self, student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        """The logits of the two calls, the teacher's maps at the height and width of the student's.

        Raises:
            ValueError: If an output has no logits at the place that ``output`` names.
        """
        student_logits, teacher_logits = student.output_at(self._output(0)), teacher.output_at(self._output(1))
        if student_logits.ndim == teacher_logits.ndim == 4 and reads_maps(self.loss):
            teacher_logits = resized(teacher_logits, student_logits)
        return student_logits, teacher_logits

    def positions(self, student: Call, labels: Tensor | None) -> Tensor | None:
        """The positions that count, a bool tensor, or ``None`` for all."""
        mask = counted_positions(student, self.mask, self.ignore_index, labels)
        if mask is None or mask.ndim != 3 or not reads_maps(self.loss):
            return mask
        return resized_mask(mask, student.output_at(self._output(0)), self.loss)

    def check_scores(self, student: Call, teacher: Call) -> None:
        """Raise if an output holds probabilities, which a loss on logits would soften once more.

        Rows of logits that are all positive and sum to 1 do not occur by chance. The check waits for the device, so it
        is called only once.

        Raises:
            ValueError: If one of them does.
        """
        if not self.compares_class_scores or teacher.top_k is not None:
            return
        for side, scores in zip(("student", "teacher"), self.pair(student, teacher), strict=True):
            check_not_probabilities(side, scores, resolve_class_dim(scores, self.class_dim))

    def scores(self, student: Call, classes: int) -> Tensor:
        """The student's logits for a cache of the likeliest of so many classes."""
        return student.output_at(self._output(0))

    def extra_repr(self) -> str:
        """Settings."""
        return f"weight={self.weight}, output={self.output!r}, name={self.name!r}"

    def _output(self, side: int) -> Any:
        # a tuple of two is a pair of outputs: nested outputs are named as ((outer, inner), (outer, inner))
        return self.output[side] if isinstance(self.output, tuple) else self.output

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        mask = self.positions(student, labels)
        check_held(teacher.held.get("output"), mask, self.name)
        return value_of(self.loss, self.requires, *self.compared(student, teacher), labels, mask)

    def compared(self, student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        """The logits that the loss compares: those of :meth:`pair`, or of merged classes for a cache of the likeliest.

        Raises:
            ValueError: If the cache holds the likeliest classes alone, and the loss needs all.
        """
        top_k: TopK | None = teacher.top_k
        if top_k is None:
            return self.pair(student, teacher)
        logits = self.scores(student, top_k.classes)
        temperature = getattr(self.loss, "temperature", 1.0)
        if self.curriculum is not None:
            raise ValueError(
                f"Expected a cache of full outputs for term {self.name!r}, whose temperature is learned, but it holds a"
                " part of the classes. Build it without top_k and sampled, or pass a number as the temperature."
            )
        plain = self.requires.merges_classes and not getattr(self.loss, "standardize", False)
        if isinstance(top_k, Sampled) and not (plain and self.requires.linear_in_teacher and temperature == 1.0):
            raise ValueError(
                "Expected SoftTargetLoss or SoftCrossEntropyLoss at temperature 1 for a cache of classes drawn at"
                f" random, but got {self.loss}. Other losses and temperatures would be biased: build the cache with"
                " top_k, or without."
            )
        if not plain or resolve_class_dim(logits, self.class_dim) not in (-1, logits.ndim - 1):
            raise ValueError(
                f"Expected a cache of full outputs for {self.loss}, but it holds the likeliest"
                f" {top_k.indices.shape[-1]} classes alone. Build it without top_k, or use a divergence such as"
                " SoftTargetLoss."
            )
        return merge_classes(logits, top_k, temperature)


def check_not_probabilities(side: str, scores: Tensor, class_dim: int) -> None:
    """Raise if scores are probabilities. It waits for the device.

    Args:
        side: ``"student"`` or ``"teacher"``.
        scores: The output.
        class_dim: Dimension of the classes.

    Raises:
        ValueError: If all rows are positive and sum to 1.
    """
    rows = scores.detach().movedim(class_dim, -1).float()
    close = 1e-2 if scores.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if rows.shape[-1] > 1 and bool(((rows >= 0).all() & ((rows.sum(-1) - 1).abs() < close).all()).item()):
        raise ValueError(
            f"Expected the {side}'s output to be logits, but got probabilities: every row sums to 1. Leave out"
            " the last softmax, or override `logits` and return their logarithms: output.clamp(min=1e-8).log()."
        )
