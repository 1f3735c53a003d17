"""The number of tokens in the batches of an optimizer step, for terms whose mean is over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_distill import compat
from lightning_distill.processes import world_size
from lightning_distill.recording import Call
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


def count_window(
    terms: Sequence[DistillationTerm], batches: Sequence[Any], label_place: Any, student: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The divisors of an optimizer step, and the tokens of each of its batches, by the name of the term.

    Every process must call it.

    Args:
        terms: Terms that count tokens.
        batches: The micro-batches of this process.
        label_place: Where the owner of the terms says that a batch keeps its labels.
        student: The student.

    Raises:
        ValueError: As :func:`count_tokens`.
    """
    seq2seq, device = takes_decoder_inputs(student), next(student.parameters()).device
    counted = [count_tokens(terms, batch, label_place, seq2seq, device) for batch in batches]
    numbers = torch.stack(counted).sum(0)
    if world_size() > 1:
        torch.distributed.all_reduce(numbers)
    names = [term.name for term in terms]
    each = [dict(zip(names, number.unbind(), strict=True)) for number in counted]
    return divisors(numbers, terms, len(batches), world_size()), each


class TokenShare(NamedTuple):
    """The tokens of an optimizer step, as a micro-batch sees them, by the name of the term.

    Attributes:
        divisors: As :func:`divisors` returns them, NaN if a process could not count; empty if nothing is counted ahead.
        counted: Number of tokens of the micro-batch, if it was counted ahead.
        in_loop: Whether a loop of the user's own names the micro-batches.
    """

    divisors: Mapping[str, Tensor] = MappingProxyType({})
    counted: Mapping[str, Tensor] = MappingProxyType({})
    in_loop: bool = False


NOT_AHEAD = TokenShare()  # no tokens are counted ahead


class LoopWindow:
    """The tokens of an optimizer step in a hand-written loop."""

    def __init__(self) -> None:
        self._divisors: dict[str, Tensor] = {}
        self._counted: dict[int, dict[str, Tensor]] = {}  # by the ids of the batches

    def share(self, batch: Any) -> TokenShare:
        """The tokens, as a batch sees them."""
        return TokenShare(self._divisors, self._counted.get(id(batch), {}), in_loop=True)

    @contextmanager
    def opened(
        self, terms: Sequence[DistillationTerm], batches: Sequence[Any], label_place: Any, student: nn.Module
    ) -> Iterator[None]:
        """A context for the micro-batches of one optimizer step; see :meth:`Distiller.window`.

        Args:
            terms: The terms.
            batches: The micro-batches of this process.
            label_place: Where the owner of the terms says that a batch keeps its labels.
            student: The student.

        Raises:
            ValueError: If ``batches`` is empty, or as :func:`count_tokens`.
        """
        if not batches:
            raise ValueError("Expected `batches` to hold the micro-batches of an optimizer step, but got none.")
        counting = [term for term in terms if term.counts_tokens]
        if counting:
            self._divisors, counted = count_window(counting, batches, label_place, student)
            self._counted = {id(batch): numbers for batch, numbers in zip(batches, counted, strict=True)}
        try:
            yield
        finally:
            self._divisors, self._counted = {}, {}


def over_calls(
    name: str, calls: Sequence[Call], values: Sequence[Tensor], share: TokenShare = NOT_AHEAD
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean over the tokens of all calls of a step, from the means over those of each call.

    Args:
        name: Name of the term.
        calls: The student's calls: views of the same tokens, or parts of the batch.
        values: The mean of each call, or of each teacher for each call.
        share: The tokens of the optimizer step.

    Returns:
        The mean; the number of tokens; and the factor that makes it the micro-batch's part of the optimizer step's
        mean, ``None`` if nothing is counted ahead.

    Raises:
        ValueError: If the calls may be views or parts of a batch that was not counted ahead.
    """
    own = [call.counted[name] for call in calls]
    number, mean = own[0], values[0]
    if len(values) > 1:
        weights = torch.stack([number for number in own for _ in range(len(values) // len(calls))]).to(mean.dtype)
        mean = (torch.stack(list(values)) * weights).sum() / weights.sum().clamp(min=1)
    if len(calls) > 1:  # views of the batch, or parts that make up the batch
        total = torch.stack(own).sum()
        number = total / len(calls)
        if name in share.counted:
            number = torch.where(total == share.counted[name], total, number)
        elif share.in_loop and share.divisors:
            raise ValueError(
                "Expected `total` to get one of the batches that `window` got, since the student was called several"
                " times, but got another object. Move the batches to the device before `window`, and pass the same to"
                " both."
            )
    divisor = share.divisors.get(name)
    if divisor is None:
        return mean, number, None
    return mean, number, torch.where(divisor.isnan(), 1.0, number / divisor).to(mean.dtype)


def token_sizes(terms: Sequence[DistillationTerm], counted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The number of tokens that logged values of a step are means of, by their names.

    Args:
        terms: The terms.
        counted: Number of tokens of the step, by term.
    """
    of_tokens = [term for term in terms if term.name in counted]
    sizes = {name: counted[term.name] for term in of_tokens for name in term.logged_names}
    if len(of_tokens) == len([term for term in terms if term.active]) == 1:
        sizes["distillation_loss"] = counted[of_tokens[0].name]
    return sizes


def takes_decoder_inputs(module: nn.Module) -> bool:
    """Whether a module has a network with an encoder and a decoder in it."""
    kinds = {type(inner) for inner in module.modules()}
    return any("decoder_input_ids" in compat.parameter_names(kind) for kind in kinds)
