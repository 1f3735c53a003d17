"""The term between two language models with tokenizers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from distill_core.alignment import NO_SPAN, TokenAligner
from distill_core.token_bytes import TokenBytes
from lightning_distill import checks
from lightning_distill.functional.spans import SpanRows, chunk_likelihood, universal_logit_of_spans
from lightning_distill.recording import Call
from lightning_distill.recording.batches import find_entry
from lightning_distill.recording.outputs import Output
from lightning_distill.recording.tokens import called_tokens, check_reads, is_seq2seq
from lightning_distill.schedules import Weight
from lightning_distill.terms.logits import check_not_probabilities
from lightning_distill.terms.losses import Mask
from lightning_distill.terms.tokens import Normalization, SequenceDistillation

Method = Literal["uld", "chunks"]
TEACHER_TOKENS = "teacher_tokens"  # the batch's entry, which the collate function adds
_DISTANCES = {"uld": universal_logit_of_spans, "chunks": chunk_likelihood}
_ENOUGH = 16  # tokens, of which hardly any may be in a span by chance
_TEMPERATURES = {"uld": 1.0, "chunks": 100.0}  # without one of the user's


class AlignedTokens(NamedTuple):
    """The teacher's tokens of a batch, and the spans, as tensors; see :class:`distill_core.alignment.Aligned`."""

    input_ids: Tensor
    attention_mask: Tensor
    student_spans: Tensor
    teacher_spans: Tensor

    def to(self, device: torch.device) -> AlignedTokens:
        """The same on a device."""
        return AlignedTokens(*(tensor.to(device, non_blocking=True) for tensor in self))


class Collate:
    """A collate function that adds the teacher's tokens and the spans to a batch, in the workers of a loader.

    Args:
        aligner: Aligns the student's tokens; ``None`` where the teacher reads the same tokens.
        collate: Makes a batch of the samples.
    """

    def __init__(self, aligner: TokenAligner | None, collate: Callable[[list[Any]], Any]) -> None:
        self._aligner, self._collate = aligner, collate

    def __call__(self, samples: list[Any]) -> Any:
        """The batch with one more entry, ``"teacher_tokens"``.

        Raises:
            ValueError: If the batch is not a dict with ``input_ids``.
        """
        batch = self._collate(samples)
        if self._aligner is None:
            return batch
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                "Expected a batch to be a dict with the student's `input_ids`, of the shape (batch, tokens), but got"
                f" {got}. Pass collate(<a function that makes such a batch>)."
            )
        return {**batch, TEACHER_TOKENS: _aligned(self._aligner, tokens, batch.get("attention_mask"))._asdict()}


class CrossTokenizerDistillation(SequenceDistillation):
    """A loss between causal language models whose tokenizers differ.

    The teacher reads the student's text in its own tokens, which the term gives it. Both models are compared on spans
    of text: the smallest groups of tokens of both sides that begin and end at the same byte. A span counts if all of
    its tokens of the student do, by the rules of :class:`SequenceDistillation`, and the loss is the mean over the spans
    that count in the whole optimizer step.

    - ``"uld"`` compares the sorted probabilities at the end of each span; see :class:`UniversalLogitLoss`. It sees how
      certain the teacher is, not of which token.
    - ``"chunks"`` compares the likelihoods of the spans themselves. Of the teacher's distribution it sees the
      probabilities of the tokens in the text.

    If both tokenizers have the same tokens with the same numbers, the method does not matter: the teacher reads the
    student's tokens, and the loss is that of :class:`SequenceDistillation` at temperature 1.

    The tokens are aligned in each step, from the student's ``input_ids``. To align them in the workers of a loader,
    pass ``collate_fn=term.collate()`` to it; the batch, a dict, then has one more entry, ``"teacher_tokens"``.

    Rows of several documents are one text to the teacher. Special tokens without a counterpart are left out of it.

    Args:
        student_tokenizer: The student's tokenizer: of transformers, or of the library tokenizers.
        teacher_tokenizer: The teacher's.
        method: ``"uld"`` or ``"chunks"``.
        temperature: For ``"uld"`` the softening of both distributions, for ``"chunks"`` the root of the likelihoods.
            ``None`` is 1 for the first, and 100, as in a configuration of its authors, for the second.
        weight: Factor of the term in the total loss, a number or a schedule. The values of ``"chunks"`` are small.
        ignore_index: As in :class:`SequenceDistillation`.
        normalize: ``"tokens"`` is the mean over the spans; ``"sequences"`` the mean over the sequences of their own
            mean.
        labels: As in :class:`SequenceDistillation`.
        mask: As in :class:`SequenceDistillation`, without a pair.
        output: As in :class:`SequenceDistillation`.
        special_tokens: Names of special tokens of the student and of their counterparts of the teacher, beside those of
            equal names and those that begin and end a text.
        max_length: The largest number of tokens that the teacher reads, the first of each row; ``None`` is the
            ``model_max_length`` of its tokenizer, if it has one.
        name: Name in logs and checkpoints.

    Raises:
        TypeError: If a tokenizer is not a fast one.
        ValueError: If a tokenizer changes the text, or a setting is not as above.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        >>> def tokenizer(*pairs):
        ...     tokens = [*letters, *(first + second for first, second in pairs)]
        ...     made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(pairs)))
        ...     made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        ...     made.decoder = decoders.ByteLevel()
        ...     return made
        >>> student_tokenizer, teacher_tokenizer = tokenizer(), tokenizer(("a", "b"))
        >>> term = CrossTokenizerDistillation(student_tokenizer, teacher_tokenizer, method="chunks")
        >>> call = Call((torch.tensor([student_tokenizer.encode("cab").ids]),), {})
        >>> term.teacher_call(call).args[0]
        tensor([[ 66, 256]])
        >>> call.aligned.student_spans  # the first token is not predicted
        tensor([[-1,  1,  1]])

    References:
        Boizard et al. 2024 (ULD), arXiv:2402.12030; deviation: the distributions are aligned by spans, merged by the
        chain rule, and not by their places in the sequences. Minixhofer, Vulić, Ponti 2025 (ALM), arXiv:2503.20083,
        with the Kullback-Leibler divergence and all spans, without the debiasing of their borders.
    """

    token_entries = (TEACHER_TOKENS,)

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        method: Method = "uld",
        *,
        temperature: float | None = None,
        weight: Weight = 1.0,
        ignore_index: int = -100,
        normalize: Normalization = "tokens",
        labels: Mask | None = None,
        mask: Mask | None = None,
        output: Output | tuple[Output, Output] = None,
        special_tokens: Mapping[str, str] | None = None,
        max_length: int | None = None,
        name: str = "tokens",
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            normalize=normalize,
            labels=labels,
            mask=mask,
            output=output,
            name=name,
        )
        checks.one_of("method", method, tuple(_DISTANCES))
        if temperature is not None:
            checks.positive("temperature", temperature)
        if max_length is not None:
            checks.integer("max_length", max_length)
            checks.positive("max_length", max_length)
        if self.teacher_tokens is not None:
            raise ValueError("Expected `mask` to be one place, but got a pair. The teacher's tokens are aligned.")
        student = TokenBytes("student_tokenizer", student_tokenizer)
        teacher = TokenBytes("teacher_tokenizer", teacher_tokenizer)
        self.method = method
        self.temperature = _TEMPERATURES[method] if temperature is None else temperature
        same = student.vocabulary == teacher.vocabulary
        self.aligner = None if same else TokenAligner(student, teacher, special_tokens, max_length)
        self.needs_network = not same  # a cache holds the outputs for the student's tokens
        self.compares_class_scores = same
        if not same:
            self.loss = None

    def extra_repr(self) -> str:
        """Settings."""
        settings = "" if self.aligner is None else f", method={self.method!r}, temperature={self.temperature}"
        return super().extra_repr() + settings

    def collate(self, collate: Callable[[list[Any]], Any] = default_collate) -> Collate:
        """A collate function for a ``DataLoader`` that also aligns the tokens.

        Args:
            collate: Makes a batch, a dict with ``input_ids``, of the samples.
        """
        return Collate(self.aligner, collate)

    # Tokens ----------------------------------------------------------------------------------------------------------

    def teacher_call(self, call: Call, networks: Sequence[nn.Module] = ()) -> Call | None:
        """The student's call with the teacher's tokens; ``None`` where the teacher reads the student's.

        Raises:
            ValueError: If the student's tokens are not known, or a teacher cannot read its own.
        """
        if self.aligner is None:
            return None
        aligned = self._aligned(call)
        for network in networks:
            check_reads(network, self.aligner.teacher.classes, aligned.input_ids.shape[1])
        return replace(call, args=(aligned.input_ids,), kwargs={"attention_mask": aligned.attention_mask})

    def _aligned(self, call: Call) -> AlignedTokens:
        if call.aligned is None:
            tokens = called_tokens(call)
            if tokens is None:
                raise ValueError(
                    "Expected the student to be called with the numbers of its tokens, `input_ids` of the shape (batch,"
                    " tokens), but it was not. They tell which text the teacher reads."
                )
            kind = type(call.output).__name__
            if is_seq2seq(call) or "MaskedLM" in kind:
                raise ValueError(f"Expected a causal model for two tokenizers, but got one that returns {kind}.")
            call.aligned = self._of_tokens(tokens, call.batch, call.arguments)
        aligned: AlignedTokens = call.aligned
        return aligned

    def _of_tokens(self, tokens: Tensor, batch: Any, arguments: Mapping[str, Any]) -> AlignedTokens:
        """The aligned tokens in a batch, or those of the student's tokens."""
        stored = find_entry(TEACHER_TOKENS, batch, {})
        if stored is None:
            attention = find_entry("attention_mask", batch, arguments, ndim=2)
            fits = isinstance(attention, Tensor) and attention.shape == tokens.shape
            return _aligned(self._aligner, tokens, attention if fits else None).to(tokens.device)
        try:
            aligned = AlignedTokens(**stored)
        except TypeError:
            raise ValueError(
                f"Expected `{TEACHER_TOKENS}` of the batch to be what term.collate() makes, but got"
                f" {type(stored).__name__}. Rename the entry."
            ) from None
        if aligned.student_spans.shape != tokens.shape:
            raise ValueError(
                "Expected the student to be called with the tokens of the batch, which are aligned with the teacher's,"
                f" but got the shapes {tuple(tokens.shape)} and {tuple(aligned.student_spans.shape)}. Cut and join the"
                " tokens before they are collated, or leave out term.collate(), to align them in the step."
            )
        return aligned.to(tokens.device)

    @property
    def _aligner(self) -> TokenAligner:
        if self.aligner is None:
            raise ValueError("Expected two tokenizers that differ, but got two with the same tokens.")
        return self.aligner

    # Spans that count ------------------------------------------------------------------------------------------------

    def counted(self, batch: Any, label_place: Any = None, seq2seq: bool = False) -> Tensor:
        """How many spans, or sequences, of a batch count, before a model is called with it.

        Raises:
            ValueError: If the batch alone does not say it.
        """
        if self.aligner is None:
            return super().counted(batch, label_place, seq2seq)
        tokens = find_entry("input_ids", batch, {})
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise ValueError(
                "Expected a batch with the student's `input_ids`, of the shape (batch, tokens), to count its spans, but"
                " got none."
            )
        counts = self.tokens.of_batch(batch, label_place, seq2seq).counts
        return self._number(_spans_that_count(self._of_tokens(tokens, batch, {}).student_spans, counts))

    def check_scores(self, student: Call, teacher: Call) -> None:
        """Raise if the outputs do not fit the tokenizers, hold probabilities, or hardly any token is in a span, once.

        Raises:
            ValueError: If so.
        """
        if self.aligner is None:
            super().check_scores(student, teacher)
            return
        tables = {"student": self.aligner.student, "teacher": self.aligner.teacher}
        for call, (side, table) in zip((student, teacher), tables.items(), strict=True):
            logits = self._logits(call, 0 if side == "student" else 1)
            check_not_probabilities(side, logits, -1)
            if logits.shape[-1] < table.classes:
                raise ValueError(
                    f"Expected the {side} to score the {table.classes} tokens of `{side}_tokenizer`, but got logits"
                    f" of {logits.shape[-1]} classes. Pass the student's tokenizer first, then the teacher's."
                )
        positions = self._positions(student)
        self.check_tokens(student, student, positions)
        self._check_collated(student)
        predicts = positions.counts[:, :-1]
        if student.own_text:  # which may still be random bytes; its prompt is of the data
            predicts = predicts.cumsum(1) == 0
        spans = self._aligned(student).student_spans[:, 1:]
        aligned, number = int((predicts & (spans != NO_SPAN)).sum()), int(predicts.sum())
        if number >= _ENOUGH and aligned < number // 2:
            raise ValueError(
                f"Expected the two tokenizers to share spans of the text, but only {aligned} of {number} tokens are in"
                " one. Pass the tokenizers that the models were trained with; `student_tokenizer` is the"
                " one that made `input_ids`."
            )

    def _check_collated(self, student: Call) -> None:
        """Raise if tokens were aligned by the loader, but the student reads others. It waits for the device."""
        collated, tokens = find_entry("input_ids", student.batch, {}), called_tokens(student)
        if find_entry(TEACHER_TOKENS, student.batch, {}) is not None and not _equal(collated, tokens):
            raise ValueError(
                "Expected the student to be called with the `input_ids` of the batch, which are aligned with the"
                " teacher's tokens, but got others. Leave out term.collate(), to align them in the step."
            )

    # Loss ------------------------------------------------------------------------------------------------------------

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar.

        Raises:
            ValueError: If the teacher was not called with its own tokens.
        """
        if self.aligner is None:
            return super().forward(student, teacher, labels)
        aligned, tokens = self._aligned(student), called_tokens(student)
        student_logits, teacher_logits = self._logits(student, 0), self._logits(teacher, 1)
        if teacher_logits.shape[:2] != aligned.input_ids.shape or tokens is None:
            raise ValueError(
                f"Expected the teacher to score its own tokens, of the shape {tuple(aligned.input_ids.shape)}, but got"
                f" logits of the shape {tuple(teacher_logits.shape)}. Call it with the arguments that `teacher_forward`"
                " gets, and leave out `logits_to_keep`."
            )
        counts = _spans_that_count(aligned.student_spans, self._positions(student).counts)
        number = self._number(counts)
        student.counted[self.name] = number
        order = counts.flatten().cumsum(0).view_as(counts) - 1
        student_rows = _rows(student_logits, tokens, aligned.student_spans, counts, order)
        teacher_rows = _rows(teacher_logits, aligned.input_ids, aligned.teacher_spans, counts, order)
        with torch.autocast(student_logits.device.type, enabled=False):
            values = _DISTANCES[self.method](
                student_rows, teacher_rows, int(counts.sum()), temperature=self.temperature
            )
        if self.normalize == "sequences":
            values = values / counts.sum(1, keepdim=True).expand_as(counts)[counts]
        return values.sum() / number.clamp(min=1)


def _aligned(aligner: TokenAligner, tokens: Tensor, attention: Tensor | None) -> AlignedTokens:
    mask = attention.cpu().numpy() if isinstance(attention, Tensor) else None
    return AlignedTokens(*map(torch.from_numpy, aligner.align(tokens.cpu().numpy(), mask)))


def _equal(collated: Any, tokens: Tensor | None) -> bool:
    if not isinstance(collated, Tensor) or tokens is None or collated.shape != tokens.shape:
        return False
    return bool((collated.to(tokens.device) == tokens).all())


def _spans_that_count(spans: Tensor, predicts: Tensor) -> Tensor:
    """Where a span exists and all of its tokens of the student count.

    Args:
        spans: The span of each token of the student, shape ``(B, T)``.
        predicts: Where position t predicts a token that counts, at t + 1, shape ``(B, T)``.

    Returns:
        A bool tensor, shape ``(B, T)``, since a row has at most as many spans as tokens.
    """
    counts = torch.cat([torch.zeros_like(predicts[:, :1]), predicts[:, :-1]], 1)
    inside = spans != NO_SPAN
    places = torch.where(inside, spans, 0)
    zeros = torch.zeros_like(spans)
    all_tokens = zeros.scatter_add(1, places, inside.long())
    return (all_tokens > 0) & (zeros.scatter_add(1, places, (inside & counts).long()) == all_tokens)


def _rows(logits: Tensor, tokens: Tensor, spans: Tensor, counts: Tensor, order: Tensor) -> SpanRows:
    """The tokens of the spans that count and the rows that predict them, which are one position before."""
    logits, tokens, spans = logits[:, :-1], tokens[:, 1:], spans[:, 1:]
    places = torch.where(spans == NO_SPAN, 0, spans)
    chosen = (spans != NO_SPAN) & counts.gather(1, places)
    return SpanRows(logits[chosen], tokens[chosen].long(), order.gather(1, places)[chosen])
