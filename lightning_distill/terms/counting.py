"""The number of tokens in the batches of an optimizer step, for terms whose mean is over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill import compat
from lightning_distill.terms.base import DistillationTerm


def count_tokens(
    terms: Sequence[DistillationTerm], batch: Any, label_place: Any, seq2seq: bool, device: torch.device | None
) -> Tensor:
    """The number of tokens of a batch that count for each term, float64, shape ``(terms,)``.

    Args:
        terms: Terms that count tokens.
        batch: The batch.
        label_place: Where the owner of the terms says that a batch keeps its labels.
        seq2seq: Whether the student has an encoder and a decoder.
        device: Device of the result.

    Raises:
        ValueError: If they cannot be counted before a model is called with the batch.
    """
    numbers = [term.counted(batch, label_place, seq2seq) for term in terms]
    return torch.stack([number.to(device, torch.float64, non_blocking=True) for number in numbers])


def divisors(
    numbers: Tensor, terms: Sequence[DistillationTerm], micro_batches: int, processes: int
) -> dict[str, Tensor]:
    """The number that each micro-batch divides its sum by, by the name of the term.

    The mean over the micro-batches and the processes of an optimizer step is then the mean over all its tokens.

    Args:
        numbers: Tokens of the optimizer step over all processes, shape ``(terms,)``.
        terms: The terms.
        micro_batches: Number of micro-batches that the gradients of an optimizer step are averaged over.
        processes: Number of processes that they are averaged over.
    """
    each = numbers.clamp(min=1.0) / (micro_batches * processes)
    return {term.name: number for term, number in zip(terms, each.unbind(), strict=True)}


def takes_decoder_inputs(module: nn.Module) -> bool:
    """Whether a module has a network with an encoder and a decoder in it."""
    kinds = {type(inner) for inner in module.modules()}
    return any("decoder_input_ids" in compat.parameter_names(kind) for kind in kinds)
