"""The positions of token sequences that count: labels, masks, the causal shift, packed documents."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_distill.recording.calls import Call
from lightning_distill.recording.documents import Documents
from lightning_distill.recording.labels import find_labels, find_tensor
from lightning_distill.recording.outputs import entries_of

_SEQ2SEQ = "encoder_last_hidden_state"  # a field of the outputs of models with an encoder and a decoder
_DECODER_INPUTS = "decoder_input_ids"


class Positions(NamedTuple):
    """The positions of the logits that count.

    Attributes:
        counts: True where a position counts, shape ``(B, T)``.
        labels: The label that each position predicts, ``ignore_index`` where it does not count, shape ``(B, T)``;
            ``None`` without labels.
    """

    counts: Tensor
    labels: Tensor | None


class TokenPositions:
    """Finds the positions that count, in a batch or in the call of a model with it.

    A position counts if the token that it predicts does: its label is not ``ignore_index``, or, without labels, its
    attention mask is not 0; and if ``mask`` marks it. With ``shift`` the token that position t predicts is number
    t + 1. A position that is padding itself never counts, and neither does the last token of one packed document, which
    cannot predict the first of the next: the documents are told apart by ``position_ids`` that begin again at 0, by
    ``seq_idx``, or by an attention mask: one with a number for each document, or one of pairs of tokens, ``(B, 1, T,
    T)`` or ``(B, T, T)``, in which a token does not see the one before it.

    Args:
        shift: Whether position t predicts token t + 1.
        ignore_index: The label of tokens that do not count.
        labels: Where a batch keeps the labels; ``None`` takes the owner's place, else ``labels`` in the call, else the
            usual places of the batch.
        mask: Where a batch keeps a mask of the tokens that count.
    """

    def __init__(self, *, shift: bool, ignore_index: int, labels: Any = None, mask: Any = None) -> None:
        self.shift, self.ignore_index, self.labels, self.mask = shift, ignore_index, labels, mask

    def of_call(self, call: Call, length: int) -> Positions:
        """The positions of a recorded call that count.

        Args:
            call: The call, with its batch.
            length: Number of positions T in its logits.

        Raises:
            ValueError: If neither labels nor a mask are found, or one has another length.
        """
        positions = self._of(call.batch, call.batch, call.arguments, is_seq2seq(call), call.label_place)
        return self._checked(positions, call, length)

    def of_teacher(self, call: Call, length: int) -> Positions:
        """The positions that count in a teacher's call with other tokens than the student's.

        Labels and attention masks are read from the teacher's own inputs, ``mask`` from the batch.

        Args:
            call: The teacher's call, with the batch.
            length: Number of positions in its logits.

        Raises:
            ValueError: As :meth:`of_call`.
        """
        return self._checked(self._of(None, call.batch, call.arguments, is_seq2seq(call), None), call, length)

    def _checked(self, positions: Positions, call: Call, length: int) -> Positions:
        if positions.counts.shape[1] != length:
            raise ValueError(
                f"Expected the {call.who}'s logits to have a position for each of the {positions.counts.shape[1]}"
                f" tokens of the labels or the mask, but got {length} positions. Pass labels and masks of that length,"
                " and leave out `logits_to_keep`."
            )
        return positions

    def of_batch(self, batch: Any, label_place: Any = None, seq2seq: bool = False) -> Positions:
        """The positions that count, from a batch alone, before a model is called with it.

        Args:
            batch: The batch.
            label_place: Where the owner of the term says that a batch keeps its labels.
            seq2seq: Whether the model has an encoder and a decoder, so that the attention mask is the encoder's.

        Raises:
            ValueError: As :meth:`of_call`.
        """
        return self._of(batch, batch, {}, seq2seq, label_place)

    def _of(
        self, batch: Any, mask_batch: Any, arguments: Mapping[str, Any], seq2seq: bool, label_place: Any
    ) -> Positions:
        labels = self._labels(batch, arguments, label_place)
        mask = None if self.mask is None else _two_dimensions("mask", find_tensor(mask_batch, self.mask))
        documents = Documents.of(batch, arguments, seq2seq)
        attention = documents.attention
        reference = next((rows for rows in (labels, mask, attention) if rows is not None), None)
        if reference is None:
            raise ValueError(
                "Expected labels, an attention mask or `mask=` to say which tokens count, but got a batch without them."
                " Put `labels` or `attention_mask` into the batch or the student's call, or pass mask=<key, index, or a"
                " function of the batch>; to count all: mask=lambda batch: torch.ones_like(batch['input_ids'])."
            )
        if labels is None and mask is None and arguments:
            _check_unused(batch, reference, arguments)
        if mask is not None and mask.shape != reference.shape:
            raise ValueError(
                f"Expected `mask` to have the shape of the labels, {tuple(reference.shape)}, but got shape"
                f" {tuple(mask.shape)}."
            )
        return self._combined(labels, mask, documents)

    def _labels(self, batch: Any, arguments: Mapping[str, Any], label_place: Any) -> Tensor | None:
        place = label_place if self.labels is None else self.labels
        if place is not None:
            return _two_dimensions("labels", find_labels(batch, place))
        labels = arguments.get("labels")
        if labels is None:
            with suppress(ValueError):
                labels = find_labels(batch, None)
        # a batch such as (dict, number of each example) has them in the dict; of two dicts it is not known which
        inside = batch if isinstance(batch, (tuple, list)) else []
        inner = [entry["labels"] for entry in inside if isinstance(entry, Mapping) and "labels" in entry]
        return next(filter(_are_token_labels, [labels, *(inner if len(inner) == 1 else [])]), None)

    def _combined(
        self,
        labels: Tensor | None,
        mask: Tensor | None,
        documents: Documents,
    ) -> Positions:
        attention = documents.attention
        labels = None if labels is None else labels.long()  # torch's cross entropy takes no int32
        predicted = [] if labels is None else [labels != self.ignore_index]
        predicted += [] if mask is None else [mask.bool()]
        if not predicted and attention is not None:
            predicted = [attention.bool()]
        counts = predicted[0] if len(predicted) == 1 else predicted[0] & predicted[1]
        if self.shift:
            counts = _moved(counts, False)
            labels = None if labels is None else _moved(labels, self.ignore_index)
            for ends in documents.ends(counts.shape):
                counts = counts & ~ends
        if attention is not None and attention.shape == counts.shape:
            counts = counts & attention.bool()  # padding predicts nothing
        return Positions(counts, None if labels is None else torch.where(counts, labels, self.ignore_index))


def is_seq2seq(call: Call) -> bool:
    """Whether a call was made of a model with an encoder and a decoder."""
    return _DECODER_INPUTS in call.arguments or _SEQ2SEQ in entries_of(call.output)


def check_alignment(call: Call, shift: bool, positions: Positions) -> None:
    """Raise if the labels can be seen to be aligned otherwise than ``shift`` says. It waits for the device.

    Args:
        call: The student's call.
        shift: Whether position t was taken to predict token t + 1.
        positions: The positions that count.

    Raises:
        ValueError: If the model predicts tokens in place, or the labels are shifted already, or not yet.
    """
    kind = type(call.output).__name__
    if shift and (is_seq2seq(call) or "MaskedLM" in kind):
        raise ValueError(
            f"Expected `shift` to be False for a model that returns {kind}, whose position t predicts the label at"
            " position t, but got shift=True. Pass shift=False."
        )
    tokens, labels, counts = called_tokens(call), positions.labels, positions.counts
    if labels is None or tokens is None or tokens.shape != labels.shape:
        return
    in_place, following = tokens, _moved(tokens, -1)
    twice = _moved(following, -1)
    if shift and _equal(labels, twice, counts) and not _equal(labels, following, counts):
        raise ValueError(
            "Expected labels that are the student's own tokens with shift=True, but got labels that are shifted"
            " already: the label at position t is token t + 1. Pass shift=False."
        )
    if not shift and "CausalLM" in kind and _equal(labels, in_place, counts) and not _equal(labels, following, counts):
        raise ValueError(
            "Expected labels that are shifted already with shift=False, but got the student's own tokens: a causal"
            " model predicts the token that follows. Pass shift=True."
        )


def check_ends(call: Call, positions: Positions) -> None:
    """Raise if labels that are shifted already let a document predict the next one of its row. It waits.

    Args:
        call: The student's call.
        positions: The positions that count, where position t was taken to predict the label at position t.

    Raises:
        ValueError: If the label of the last token of a document can be seen to be the first token of the next.
    """
    tokens, labels, counts = called_tokens(call), positions.labels, positions.counts
    if labels is None or tokens is None or tokens.shape != labels.shape:
        return
    if not _equal(labels, _moved(tokens, -1), counts) or _equal(labels, tokens, counts):
        return
    documents = Documents.of(call.batch, call.arguments)._replace(tokens=tokens)
    padding = documents.padding(counts.shape, 1) & ~counts
    counts = counts & ~_moved(padding, False)  # padding after the last token may be equal to its label
    for ends in documents.ends(counts.shape):
        if bool((counts & ends).any()):
            raise ValueError(
                "Expected labels that are shifted already to leave out the last token of each packed document, but got"
                " the first token of the next document there. Set these labels to `ignore_index`, or pass the tokens as"
                " labels, with shift=True."
            )


def check_not_mask(call: Call, positions: Positions) -> None:
    """Raise if the labels can be seen to be a mask, as in a batch ``(input_ids, attention_mask)``. It waits.

    Args:
        call: The student's call.
        positions: The positions that count, where position t predicts token t + 1.

    Raises:
        ValueError: If the labels are 0 and 1 alone, and the tokens are not.
    """
    tokens, labels, counts = called_tokens(call), positions.labels, positions.counts
    if labels is None or tokens is None or tokens.shape != labels.shape:
        return
    if bool((labels <= 1)[counts].all()) and bool((_moved(tokens, 0) > 1)[counts & (labels == 1)].any()):
        raise ValueError(
            "Expected the labels to be tokens, but got 0 and 1 alone where the student reads others, as in a batch"
            " (input_ids, attention_mask). Pass mask=<place of the mask> and labels=<function that returns the tokens>,"
            " or return dicts from the dataset."
        )


def check_same_tokens(student: Call, teacher: Call, positions: Positions) -> None:
    """Raise if the teacher can be seen to read other tokens than the student. It waits for the device.

    Args:
        student: The student's call.
        teacher: The teacher's.
        positions: The positions that count.

    Raises:
        ValueError: If the tokens differ at a position that counts.
    """
    student_tokens, teacher_tokens = called_tokens(student), called_tokens(teacher)
    if student_tokens is None or teacher_tokens is None or student_tokens is teacher_tokens:
        return
    if student_tokens.shape != teacher_tokens.shape or positions.counts.shape != student_tokens.shape:
        return  # the logits' shapes are compared
    if bool((student_tokens.to(teacher_tokens.device) != teacher_tokens)[positions.counts].any()):
        raise ValueError(
            "Expected the teacher to read the student's tokens, but got other tokens of the same length. Give the"
            " teacher's inputs labels of their own, or pass mask=(<the student's>, <the teacher's>), to match the"
            " tokens that count."
        )


def check_reads(network: nn.Module, classes: int, length: int) -> None:
    """Raise if a teacher has no embeddings or no positions for tokens of its own tokenizer.

    Args:
        network: The teacher.
        classes: Number of tokens of its tokenizer.
        length: Number of tokens of a row.

    Raises:
        ValueError: If so, where it can be seen.
    """
    known: Any = classes
    with suppress(AttributeError, NotImplementedError):  # not a model of Hugging Face, or one that does not say
        known = cast(Any, network).get_input_embeddings().num_embeddings
    if known < classes:
        raise ValueError(
            f"Expected the teacher to read the {classes} tokens of `teacher_tokenizer`, but got one with embeddings for"
            f" {known}. Pass the tokenizer that the teacher was trained with."
        )
    longest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ValueError(
            f"Expected the teacher to have a position for each token of a row, but got {length} tokens and {longest}"
            f" positions. Pass CrossTokenizerDistillation(max_length={longest}), or shorten the texts."
        )


def called_tokens(call: Call) -> Tensor | None:
    """The token numbers that a model was called with, or ``None``."""
    tokens = call.arguments.get("input_ids", call.args[0] if call.args else None)
    return tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.ndim == 2 else None


def _equal(labels: Tensor, tokens: Tensor, counts: Tensor) -> bool:
    inside = counts & (tokens >= 0)
    enough = int(inside.sum()) >= 4  # fewer may be equal by chance
    return enough and bool((labels == tokens)[inside].all())


def _moved(rows: Tensor, last: Any) -> Tensor:
    """The rows one position to the left, so that position t holds what was at t + 1."""
    return torch.cat([rows[:, 1:], rows.new_full((len(rows), 1), last)], 1)


def _check_unused(batch: Any, attention: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise if a tuple holds whole numbers for each token that the student does not get: they may be labels."""
    entries = batch if isinstance(batch, (tuple, list)) else []
    rest = [entry for entry in entries if _are_token_labels(entry) and entry.shape == attention.shape]
    if any(all(entry is not value for value in arguments.values()) for entry in rest[1:]):
        raise ValueError(
            "Expected to know whether a batch has labels, but got a tuple with whole numbers for each token that are"
            " not among the student's arguments. Pass labels=<index>, or mask=<index> for the mask."
        )


def _are_token_labels(value: Any) -> bool:
    # else one label for each sequence, or a mask
    rows = isinstance(value, Tensor) and value.ndim == 2
    return rows and not value.is_floating_point() and value.dtype != torch.bool


def _two_dimensions(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise ValueError(
            f"Expected `{name}` to have the shape (batch, tokens), but got shape {tuple(value.shape)}. Pass"
            f" {name}=<key, index, or a function of the batch> that holds one value for each token."
        )
    return value
