"""The term on the next-token distributions of two language models."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.losses import DistillationLoss, SoftTargetLoss
from lightning_distill.recording import Call
from lightning_distill.recording.outputs import Output
from lightning_distill.recording.tokens import (
    Positions,
    TokenPositions,
    check_alignment,
    check_ends,
    check_not_mask,
    check_same_tokens,
)
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import LossCallable
from lightning_distill.terms.logits import LogitsDistillation
from lightning_distill.terms.losses import Mask, check_held, check_takes_mask, value_of

Normalization = Literal["tokens", "sequences"]
_MOST_PADDING = 512  # vocabularies are padded to a multiple of at most this number


class SequenceDistillation(LogitsDistillation):
    """A loss between the token distributions of two causal, masked or sequence-to-sequence language models.

    The logits of both models have the shape ``(B, T, V)``. A position counts if the token that it predicts does: its
    label is not ``ignore_index``, or, without labels, its ``attention_mask`` is not 0. Padding itself predicts nothing,
    and the last token of a packed document does not predict the first of the next: ``position_ids`` that begin again at
    0, ``seq_idx``, or an attention mask (with a number for each document, or of pairs of tokens) tell them apart.
    Labels and masks are found in the student's call and in the batch.

    The loss is the mean over the tokens that count in the whole optimizer step: over all accumulated micro-batches and
    all processes. Under a Trainer the tokens of the coming micro-batches are counted ahead; in a loop of your own see
    :meth:`Distiller.window`. Where this cannot be, as in manual optimization, it is the mean over each micro-batch, and
    a warning says so.

    Vocabularies that differ by padding are compared over the columns that both have. The teacher's cache of keys and
    values is off.

    Args:
        loss: A loss on ``(student_logits, teacher_logits)`` that takes ``mask=``; ``None`` is :class:`SoftTargetLoss`
            at temperature 1.
        weight: Factor of the term in the total loss, a number or a schedule.
        shift: Whether position t predicts token t + 1, and the labels are the tokens themselves, as in causal models.
            False for masked and sequence-to-sequence models, and for labels that are shifted already.
        ignore_index: Tokens with this label do not count.
        normalize: ``"tokens"`` is the mean over all tokens that count; ``"sequences"`` the mean over the sequences of
            their own mean.
        labels: Where a batch keeps the labels, shape ``(B, T)``: a key, an index, or a function of the batch. ``None``
            takes the owner's ``labels``, else ``labels`` in the student's call, else the usual places of a batch.
        mask: Where a batch keeps a mask of the tokens that count, such as an answer's, shape ``(B, T)``. A pair names
            the student's and the teacher's, where the teacher reads another prompt: the tokens that count are matched
            one by one.
        output: Which tensor of the networks' outputs, as in :class:`LogitsDistillation`.
        vocabulary: Number of columns to compare, from the first; ``None`` takes those that both models have, if their
            vocabularies differ by no more than padding.
        name: Name in logs and checkpoints.

    Raises:
        TypeError: If ``loss`` cannot be called, or is a class.
        ValueError: If a setting is not as above, or the loss takes no mask or has its classes elsewhere than last.

    Example:
        >>> term = SequenceDistillation(weight=0.5)
        >>> tokens = torch.tensor([[1, 0, 2]])
        >>> student = Call((), {"labels": tokens}, output=torch.tensor([[[2.0, 0, 0], [0, 1, 0], [9, 0, 0]]]))
        >>> teacher = Call((), {}, output=torch.tensor([[[1.0, 0, 0], [0, 3, 0], [0, 9, 0]]]))
        >>> term(student, teacher)  # the last position predicts nothing
        tensor(0.1937)

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
        Kim, Rush (2016). Sequence-Level Knowledge Distillation, section 3.1 (word level). arXiv:1606.07947.
    """

    counts_tokens = True
    token_entries: tuple[str, ...] = ()  # of a batch, made of its tokens alone: a batch with other tokens drops them
    teacher_arguments = MappingProxyType({"use_cache": False})

    def __init__(
        self,
        loss: DistillationLoss | LossCallable | None = None,
        *,
        weight: Weight = 1.0,
        shift: bool = True,
        ignore_index: int = -100,
        normalize: Normalization = "tokens",
        labels: Mask | None = None,
        mask: Mask | tuple[Mask | None, Mask] | None = None,
        output: Output | tuple[Output, Output] = None,
        vocabulary: int | None = None,
        name: str = "tokens",
    ) -> None:
        super().__init__(SoftTargetLoss(temperature=1.0) if loss is None else loss, weight=weight, name=name)
        check_takes_mask(self.loss)
        checks.boolean("shift", shift)
        checks.integer("ignore_index", ignore_index)
        checks.one_of("normalize", normalize, ("tokens", "sequences"))
        if vocabulary is not None:
            checks.integer("vocabulary", vocabulary)
            checks.positive("vocabulary", vocabulary)
        if self.class_dim not in (None, -1, 2):
            raise ValueError(
                f"Expected `loss` to have the classes last, but got class_dim={self.class_dim}. Leave it out."
            )
        self.output, self.normalize, self.vocabulary = output, normalize, vocabulary
        self.ignore_index = int(ignore_index)
        self.needs_labels = False  # looked up together with the positions
        masks = mask if isinstance(mask, tuple) else (mask, None)
        self.tokens = TokenPositions(shift=shift, ignore_index=ignore_index, labels=labels, mask=masks[0])
        self.teacher_tokens: TokenPositions | None = None
        if masks[1] is not None:
            self.teacher_tokens = TokenPositions(shift=shift, ignore_index=ignore_index, mask=masks[1])

    @property
    def shift(self) -> bool:
        """Whether position t predicts token t + 1."""
        return self.tokens.shift

    # Positions -------------------------------------------------------------------------------------------------------

    def counted(self, batch: Any, label_place: Any = None, seq2seq: bool = False) -> Tensor:
        """How many tokens, or sequences, of a batch count, before a model is called with it.

        Args:
            batch: The batch.
            label_place: Where the owner of the term says that a batch keeps its labels.
            seq2seq: Whether the student has an encoder and a decoder.

        Raises:
            ValueError: If the batch alone does not say it.
        """
        return self._number(self.tokens.of_batch(batch, label_place, seq2seq).counts)

    def _number(self, counts: Tensor) -> Tensor:
        return counts.any(1).sum() if self.normalize == "sequences" else counts.sum()

    def positions(self, student: Call, labels: Tensor | None = None) -> Tensor:
        """The positions that count, a bool tensor ``(B, T)``."""
        return self._positions(student).counts

    def _positions(self, student: Call) -> Positions:
        return self.tokens.of_call(student, self._logits(student, 0).shape[1])

    def check_scores(self, student: Call, teacher: Call) -> None:
        """Raise if the outputs do not fit together: probabilities, other tokens, or labels in other places.

        It waits for the device, so it is called only once.

        Raises:
            ValueError: If so.
        """
        super().check_scores(student, teacher)
        positions = self._positions(student)
        check_held(teacher.held.get("output"), positions.counts, self.name, once=True)
        self.check_tokens(student, teacher, positions)

    def check_tokens(self, student: Call, teacher: Call, positions: Positions) -> None:
        """Raise if labels or tokens can be seen to be in other places than expected.

        Args:
            student: The student's call.
            teacher: The teacher's.
            positions: The positions that count.

        Raises:
            ValueError: If so.
        """
        check_alignment(student, self.shift, positions)
        if not self.shift:
            check_ends(student, positions)
        elif self.tokens.labels is None and student.label_place is None:
            check_not_mask(student, positions)
        if not self._has_own_prompt(student, teacher):
            check_same_tokens(student, teacher, positions)

    # Logits ----------------------------------------------------------------------------------------------------------

    def pair(self, student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        """The logits of the two calls over the columns that both have, shape ``(B, T, V)``.

        Where the teacher reads another prompt, its logits are moved to the student's positions.

        Raises:
            ValueError: If the sequences have other lengths, or the vocabularies differ by more than padding.
        """
        student_logits, teacher_logits = self._columns(self._logits(student, 0), self._logits(teacher, 1))
        if self._has_own_prompt(student, teacher):
            teacher_logits = self._matched(student, teacher, student_logits, teacher_logits)
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"Expected student and teacher to score the same tokens, but got logits of the shapes"
                f" {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. If the teacher reads another"
                " prompt, give its inputs labels of their own, or pass mask=(<the student's>, <the teacher's>)."
            )
        return student_logits, teacher_logits

    def scores(self, student: Call, classes: int) -> Tensor:
        """The student's logits for a cache of the likeliest of so many classes."""
        return self._narrowed(self._logits(student, 0), self._shared(self._logits(student, 0).shape[-1], classes))

    def _logits(self, call: Call, side: int) -> Tensor:
        logits = call.output_at(self._output(side))
        if logits.ndim != 3:
            raise ValueError(
                f"Expected the {call.who}'s logits to have the shape (batch, tokens, vocabulary), but got shape"
                f" {tuple(logits.shape)}. Pass output=<the logits of that shape>, or use LogitsDistillation."
            )
        return logits

    def _columns(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both models' logits over the shared part of their vocabularies, as views."""
        shared = self._shared(student.shape[-1], teacher.shape[-1])
        return self._narrowed(student, shared), self._narrowed(teacher, shared)

    def _narrowed(self, logits: Tensor, columns: int) -> Tensor:
        return logits if logits.shape[-1] == columns else logits[..., :columns]

    def _shared(self, student: int, teacher: int) -> int:
        smaller, larger = sorted((student, teacher))
        if self.vocabulary is not None:
            if self.vocabulary > smaller:
                raise ValueError(
                    f"Expected `vocabulary` to be at most {smaller}, which both models have, but got"
                    f" vocabulary={self.vocabulary}."
                )
            return self.vocabulary
        if larger - smaller >= _MOST_PADDING or larger - smaller > larger // 4:
            raise ValueError(
                f"Expected the vocabularies to differ by padding at most, but the student's has {student} entries and"
                f" the teacher's {teacher}. With the same tokenizer pass vocabulary=<number of tokens>; for two"
                " tokenizers use CrossTokenizerDistillation."
            )
        return smaller

    def _has_own_prompt(self, student: Call, teacher: Call) -> bool:
        if self.teacher_tokens is not None:
            return True
        labels = teacher.kwargs.get("labels")
        return labels is not None and labels is not student.kwargs.get("labels")

    def _matched(self, student: Call, teacher: Call, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The teacher's logits for the tokens that count, at the student's positions."""
        places = self._positions(student)
        tokens = self.teacher_tokens or self.tokens
        answers = tokens.of_teacher(replace(teacher, batch=student.batch), teacher_logits.shape[1])
        same = len(places.counts) == len(answers.counts) and torch.equal(places.counts.sum(1), answers.counts.sum(1))
        if same and places.labels is not None and answers.labels is not None:
            same = torch.equal(places.labels[places.counts], answers.labels[answers.counts])
        if not same:
            raise ValueError(
                "Expected the tokens that count to be the same for student and teacher, which read other prompts, but"
                f" got {places.counts.sum(1).tolist()} and {answers.counts.sum(1).tolist()} tokens in the sequences of"
                " the batch, or other labels. Pass labels or masks of the answers alone on both sides."
            )
        matched = teacher_logits.new_zeros(student_logits.shape)
        matched[places.counts] = teacher_logits[answers.counts]
        return matched

    # Loss ------------------------------------------------------------------------------------------------------------

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        compared, positions = self.compared(student, teacher), self._positions(student)
        if self.requires.needs_labels and positions.labels is None:
            raise ValueError(f"Expected a batch with labels for {self.loss}, but got none. Pass labels=<their place>.")
        number = self._number(positions.counts)
        student.counted[self.name] = number
        if self.normalize == "tokens":
            return value_of(self.loss, self.requires, *compared, positions.labels, positions.counts)
        values = [self._of_sequence(index, compared, positions) for index in range(len(positions.counts))]
        return torch.stack(values).sum() / number.clamp(min=1)

    def _of_sequence(self, index: int, compared: tuple[Tensor, Tensor], positions: Positions) -> Tensor:
        rows = slice(index, index + 1)
        student, teacher = (logits[rows] for logits in compared)
        labels = None if positions.labels is None else positions.labels[rows]
        return value_of(self.loss, self.requires, student, teacher, labels, positions.counts[rows])
