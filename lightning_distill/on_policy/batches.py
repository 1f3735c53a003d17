"""Batches whose prompts the student continues: the decision, the prompt, the new batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.functional.inputs import IGNORE_INDEX
from lightning_distill.on_policy.generation import Writer
from lightning_distill.on_policy.sequences import Continued, Prompts, prompts_of
from lightning_distill.on_policy.settings import OnPolicyDistillation
from lightning_distill.recording.arguments import takes
from lightning_distill.recording.labels import find_labels, find_tensor
from lightning_distill.recording.student import StudentFinder
from lightning_distill.terms import DistillationTerm, SequenceDistillation

_DECODER = ("decoder_input_ids", "decoder_attention_mask")


class OnPolicyBatches:
    """Continues some batches of a training.

    Args:
        settings: The settings.
        student: Finds the student.
        terms: The owner's terms.
        labels: Where the owner says that a batch keeps its labels.
        process: Number of this process among those that have other batches.

    Attributes:
        changed: Whether a batch had another prompt than when it was continued ahead of its step.
    """

    def __init__(
        self,
        settings: OnPolicyDistillation,
        student: StudentFinder,
        terms: Sequence[DistillationTerm],
        labels: Any,
        process: int = 0,
    ) -> None:
        if not isinstance(settings, OnPolicyDistillation):
            raise TypeError(
                f"Expected `on_policy` to be an OnPolicyDistillation, but got on_policy={settings!r}. Pass"
                " OnPolicyDistillation(0.5, max_new_tokens=64)."
            )
        self._settings, self._student, self._terms, self._process = settings, student, terms, process
        self._labels = labels
        self._ahead: dict[tuple[int, ...], Continued | None] = {}
        self.changed = False

    def check(self, stored: bool, teacher_inputs: Any = None) -> None:
        """Raise if the student cannot write, or the terms or the teacher cannot score new text.

        Args:
            stored: Whether the teacher is a cache.
            teacher_inputs: Where the owner says that the teacher's inputs are.

        Raises:
            ValueError: If so.
        """
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise ValueError(
                "Expected `teacher_inputs` to be a function with on_policy, since the batch holds the teacher's inputs"
                f" for the old text, but got teacher_inputs={teacher_inputs!r}. Pass a function of the student's"
                " inputs."
            )
        if stored:
            raise ValueError(
                "Expected `teacher` to be a network with on_policy, since it scores new text, but got a cache, which"
                " holds outputs for the data alone. Pass the network."
            )
        writer = self._writer()
        for term in self._terms:
            if term.needs_labels or getattr(getattr(term, "requires", None), "needs_labels", False):
                raise ValueError(
                    f"Expected losses without labels with on_policy, since text of the student has no reference, but"
                    f" term {term.name!r} needs them. Use ReverseKLLoss, GeneralizedJSDLoss or SoftTargetLoss."
                )
            shift = getattr(term, "shift", True)
            if not shift and not writer.decodes and self._settings.build is None:
                raise ValueError(
                    f"Expected `shift` to be True for a causal student with on_policy, since the new labels are the"
                    f" tokens themselves, but term {term.name!r} has shift=False. Pass shift=True, or"
                    " OnPolicyDistillation(build=<function>), which shifts the labels."
                )

    def _writer(self) -> Writer:
        return Writer(self._settings, self._student)

    def at(self, position: tuple[int, ...], batch: Any) -> tuple[Any, bool]:
        """The batch of a step, and whether the student has continued it.

        Args:
            position: The number of the batch in the training.
            batch: The batch.

        Raises:
            ValueError: If its prompts are not known, or the new batch cannot be made.
        """
        if position not in self._ahead:
            text = self._drawn(position, batch)
        else:
            text = self._ahead.pop(position)
            if text is not None and not text.prompts.equal(self._prompts(batch, self._writer())):
                self.changed, text = True, self._drawn(position, batch)
        return (batch, False) if text is None else (self._rewritten(batch, text), True)

    def ahead(self, position: tuple[int, ...], batch: Any) -> Any:
        """The batch of a coming step of the same optimizer step, which :meth:`at` will return too.

        Args:
            position: The number of the batch.
            batch: The batch, as the loader returned it, on the student's device.
        """
        text = self._ahead[position] = self._drawn(position, batch)
        return batch if text is None else self._rewritten(batch, text)

    def forget(self) -> None:
        """Drop the texts written ahead."""
        self._ahead = {}

    def _drawn(self, position: tuple[int, ...], batch: Any) -> Continued | None:
        works = any(term.weight != 0 for term in self._terms)
        if not works or not self._settings.draws(position):
            return None
        writer = self._writer()
        return writer.continued(self._prompts(batch, writer), self._settings.seed_of(position, self._process))

    # Prompts ---------------------------------------------------------------------------------------------------------

    def _prompts(self, batch: Any, writer: Writer) -> Prompts:
        tokens = tokens_of(batch)
        attended = _attended(batch, tokens)
        if writer.decodes:
            return Prompts(tokens, attended)
        if self._settings.prompt is None:
            return prompts_of(tokens, attended & ~self._answers(batch, tokens), writer.pad)
        marked = find_tensor(batch, self._settings.prompt, "prompt")
        if marked.shape not in (tokens.shape, tokens.shape[1:]):
            raise ValueError(
                f"Expected `prompt` to mark the tokens of the prompts, of the shape {tuple(tokens.shape)} or"
                f" {tuple(tokens.shape[1:])}, but got shape {tuple(marked.shape)}."
            )
        is_prompt = attended & marked.to(tokens.device).bool().expand_as(tokens)
        if bool((is_prompt & ((attended & ~is_prompt).cumsum(1) > 0)).any()):
            raise ValueError(
                "Expected `prompt` to mark the first tokens of each sequence, but it marks some after others that it"
                " does not mark. The student can only continue what stands before."
            )
        return prompts_of(tokens, is_prompt, writer.pad)

    def _answers(self, batch: Any, tokens: Tensor) -> Tensor:
        """True from the first label that counts."""
        try:
            labels = find_labels(batch, self._labels)
        except ValueError:
            raise ValueError(
                "Expected to know which tokens of a batch are the prompt, but it has no labels. Put `labels` into the"
                " batch, -100 for the prompt, or pass OnPolicyDistillation(prompt=<key of a mask, or a function of the"
                " batch>)."
            ) from None
        counts = labels != self._ignore_index
        if labels.shape != tokens.shape or bool((labels != tokens)[counts].any()):
            raise ValueError(
                "Expected labels that are the batch's tokens or -100, so that the first one that counts follows the"
                f" prompt, but got others, of the shape {tuple(labels.shape)} for tokens of {tuple(tokens.shape)}."
                " Pass OnPolicyDistillation(prompt=<key of a mask, or a function of the batch>)."
            )
        return counts.cumsum(1) > 0

    @property
    def _ignore_index(self) -> int:
        return next((term.tokens.ignore_index for term in self._token_terms), IGNORE_INDEX)

    # The new batch ---------------------------------------------------------------------------------------------------

    def _rewritten(self, batch: Any, text: Continued) -> Any:
        writer, batch = self._writer(), self._without_token_entries(batch)
        tokens, mask, labels = text.rows(self._ignore_index)
        if self._settings.build is not None:
            return self._settings.build(batch, tokens, mask, labels)
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Expected a batch to be a dict with `input_ids`, but got a {type(batch).__name__}. Pass"
                " OnPolicyDistillation(build=<function of batch, input_ids, attention_mask and labels>), which returns"
                " the new batch."
            )
        entries: dict[str, Any] = {"input_ids": tokens}
        if "attention_mask" in batch or takes(writer.network, "attention_mask"):
            entries["attention_mask"] = mask
        if batch.get("position_ids") is not None:
            entries["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        prompt = self._settings.prompt
        if isinstance(prompt, str) and isinstance(old := batch.get(prompt), Tensor) and old.ndim == 2:
            entries[prompt] = ((mask != 0) & (labels == self._ignore_index)).to(old.dtype)
        if writer.decodes:
            start = self._start(writer)
            inputs, inputs_mask, labels = text.decoder_rows(start, self._ignore_index)
            kept = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            decoder = dict(zip(_DECODER, (inputs, inputs_mask), strict=True))
            entries = {**kept, **{name: value for name, value in decoder.items() if name in batch}}
        places = [self._labels, *(term.tokens.labels for term in self._token_terms)]
        entries |= dict.fromkeys(["labels", *(place for place in places if isinstance(place, str))], labels)
        masks = [term.tokens.mask for term in self._token_terms]
        entries |= dict.fromkeys([place for place in masks if isinstance(place, str)], labels != self._ignore_index)
        self._check_rest(batch, entries, writer.network)
        changed = _copied(batch)
        for name, value in entries.items():
            changed[name] = value
        return changed

    def _without_token_entries(self, batch: Any) -> Any:
        """The batch without what a term's collate function has made of the old tokens."""
        stale = {name for term in self._token_terms for name in term.token_entries}
        if not isinstance(batch, Mapping) or not stale & set(batch):
            return batch
        changed = _copied(batch)
        for name in stale & set(batch):
            del changed[name]
        return changed

    @property
    def _token_terms(self) -> list[SequenceDistillation]:
        return [term for term in self._terms if isinstance(term, SequenceDistillation)]

    def _start(self, writer: Writer) -> int:
        start = getattr(getattr(writer.network, "config", None), "decoder_start_token_id", None)
        return start if isinstance(start, int) else writer.pad

    def _check_rest(self, batch: Mapping[str, Any], entries: Mapping[str, Any], network: nn.Module) -> None:
        """Raise if an entry describes the old tokens, or the student would have needed it to write."""
        tokens = tokens_of(batch)
        rest = {name: value for name, value in batch.items() if name not in entries and isinstance(value, Tensor)}
        for name, value in rest.items():
            if value.is_floating_point() and takes(network, name):
                raise ValueError(
                    f"Expected batches of text alone, but got the entry {name!r}, which the student takes too and would"
                    " not see while it writes. on_policy does not go together with images, sounds or embeddings."
                )
            if value.shape[:2] == tokens.shape:
                raise ValueError(
                    f"Expected to know how to change the entry {name!r} of a batch, which has a value for each token"
                    " that the student has replaced, but it is unknown. Leave it out of the batch, or pass"
                    " OnPolicyDistillation(build=<function of batch, input_ids, attention_mask and labels>)."
                )


def _copied(batch: Mapping[str, Any]) -> Any:
    return copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)


def tokens_of(batch: Any) -> Tensor:
    """The tokens of a batch, shape ``(B, T)``: ``input_ids``, the first entry of a tuple, or the batch itself.

    Raises:
        ValueError: If they are not there.
    """
    tokens: Any = batch
    if isinstance(batch, Mapping):
        tokens = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        tokens = batch[0]
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        names = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"Expected a batch with the tokens in `input_ids`, whole numbers of the shape (batch, tokens), but got a"
            f" batch of {names}. Return dicts with `input_ids` from the dataset."
        )
    return tokens


def _attended(batch: Any, tokens: Tensor) -> Tensor:
    """True where a token is not padding.

    Raises:
        ValueError: If several documents share a row.
    """
    entries = batch if isinstance(batch, Mapping) else {}
    mask, positions = entries.get("attention_mask"), entries.get("position_ids")
    attended = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    packed = attended.shape != tokens.shape or entries.get("seq_idx") is not None or bool((attended > 1).any())
    if isinstance(positions, Tensor) and positions.shape == tokens.shape and not packed:
        packed = bool((((positions == 0) & attended.bool()).sum(1) > 1).any())
    if packed:
        raise ValueError(
            "Expected one sequence in each row, so that the student can continue its prompt, but got packed documents."
            " Do not pack the batches, or pass fraction=0."
        )
    return attended.bool()
