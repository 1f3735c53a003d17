"""Tokens of a whole optimizer step: counted over its micro-batches, ahead of time, and over all processes."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_distill import compat
from lightning_distill.terms import DistillationTerm
from lightning_distill.terms.counting import TokenShare, count_tokens, divisors, takes_decoder_inputs
from lightning_distill.waiting import AT_ONCE, later

# a function of the user may read what a hook of the module adds to the batch later
_CANNOT_COUNT = (ValueError, LookupError, TypeError, AttributeError)


class _Ahead:
    """The iterator of a training loader, which can look at batches before it returns them.

    Args:
        iterator: Returns tuples that begin with the batch.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._held: deque[Any] = deque()

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Any:
        return self._held.popleft() if self._held else next(self._iterator)

    def peek(self, number: int) -> list[Any]:
        """The next batches, fewer at the end."""
        while len(self._held) < number:
            fetched = next(self._iterator, None)  # not a for loop: its `iter()` would start Lightning's loader again
            if fetched is None:
                break
            self._held.append(fetched)
        return [fetched[0] for fetched in list(self._held)[:number]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class TokenWindow:
    """The tokens of the current optimizer step under a Trainer.

    At the first micro-batch of an optimizer step the coming ones are taken out of the loader and held, their tokens are
    counted, and the numbers are added over all processes. The sums stay on the device, so nothing waits for it.

    Args:
        trainer: The Trainer, in a fit.
        terms: The owner's terms, at least one of which counts tokens.
        unpack: From a loader's batch, and how many steps it is ahead, to the batch as the user's code gets it.
        label_place: Where the owner says that a batch keeps its labels.

    Attributes:
        divisors: By term, what it divides the sum over its tokens by: NaN if a process could not count them. A term
            that is not in it divides by its own number of tokens.
    """

    def __init__(
        self,
        trainer: Trainer,
        terms: Sequence[DistillationTerm],
        unpack: Callable[[Any, int], Any],
        label_place: Any,
    ) -> None:
        self._trainer, self._unpack, self._label_place = trainer, unpack, label_place
        self._terms = [term for term in terms if term.counts_tokens]
        self._on = True
        self._failed = False  # the tokens of a batch could not be counted in this process
        self._size = 0
        self._expected: dict[str, Tensor] = {}  # of this micro-batch
        self._ahead: deque[Tensor] = deque()  # of the coming ones of the optimizer step
        self._compared: deque[tuple[str, Callable[[], Tensor | None]]] = deque()  # on their way from the device
        self._waits = AT_ONCE
        self.divisors: dict[str, Tensor] = {}
        self._seq2seq = takes_decoder_inputs(trainer.lightning_module)

    @property
    def share(self) -> TokenShare:
        """The tokens of the optimizer step, as this micro-batch sees them."""
        return TokenShare(self.divisors, self._expected)

    def begin(self, batch: Any) -> None:
        """Count the tokens of an optimizer step, at its first micro-batch. Every process calls it in every step.

        Args:
            batch: The micro-batch of this training step.
        """
        self._expected = {}
        if not self._on:
            return
        trainer, place = self._trainer, self._trainer.fit_loop.batch_idx
        size = trainer.accumulate_grad_batches
        if not trainer.lightning_module.automatic_optimization:
            self.fail("optimization is manual, so the micro-batches of an optimizer step are not known")
        elif size == trainer.world_size == 1:
            self.divisors = {}  # the tokens of the batch are those of the optimizer step
        elif place % size == 0 or size != self._size or not self.divisors:
            self._size = size
            self._count(batch, self._coming(size - place % size - 1))
        elif self._ahead:
            self._expect(self._ahead.popleft())

    def _count(self, batch: Any, coming: list[Any]) -> None:
        device = self._trainer.strategy.root_device
        self._ahead.clear()
        try:
            own = self._numbers(batch, device)
            self._expect(own)
            for steps, batch in enumerate(coming, 1):
                self._ahead.append(self._numbers(self._unpack(batch, steps), device))
            numbers = torch.stack([own, *self._ahead]).sum(0)
        except _CANNOT_COUNT as error:
            self._ahead.clear()
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            self.fail(f"the tokens of a batch could not be counted before the training step ({reason})")
            if not self._on:
                return
            numbers = torch.zeros(len(self._terms), dtype=torch.float64, device=device)
        failed = numbers.new_full((1,), float(self._failed))
        if self._trainer.world_size > 1:
            totals: Tensor = self._trainer.strategy.reduce(torch.cat([numbers, failed]), reduce_op="sum")
            numbers, failed = totals[:-1], totals[-1:]
        numbers = torch.where(failed > 0, math.nan, numbers)
        self.divisors = divisors(numbers, self._terms, self._size, self._trainer.world_size)

    def _expect(self, numbers: Tensor) -> None:
        self._expected = {term.name: number for term, number in zip(self._terms, numbers.unbind(), strict=True)}

    def _numbers(self, batch: Any, device: torch.device) -> Tensor:
        return count_tokens(self._terms, batch, self._label_place, self._seq2seq, device)

    def _coming(self, number: int) -> list[Any]:
        """The micro-batches that follow in this optimizer step, as the loader returns them."""
        trainer = self._trainer
        number = int(min(number, trainer.num_training_batches - trainer.fit_loop.batch_idx - 1))
        fetcher = compat.data_fetcher(trainer)
        fetched = [entry[0] for entry in getattr(fetcher, "batches", [])][: max(number, 0)]  # read ahead by Lightning
        if len(fetched) < number:
            if not isinstance(fetcher.iterator, _Ahead):
                fetcher.iterator = _Ahead(fetcher.iterator)
            fetched += fetcher.iterator.peek(number - len(fetched))
        return fetched

    def compare(self, counted: Mapping[str, Tensor]) -> None:
        """Compare the numbers that the terms have seen in this step with those counted ahead.

        Nothing waits for a GPU after the first steps: a difference is then noticed one or a few steps later.

        Args:
            counted: Number of tokens that counted, by term.
        """
        for name, number in counted.items():
            expected = self._expected.get(name)
            if expected is not None:
                both = torch.stack([number.detach().to(expected), expected])
                self._compared.append((name, later(both, wait=self._waits > 0)))
                self._waits -= 1
        while self._compared:
            name, arrived = self._compared[0]
            numbers = arrived()
            if numbers is None:
                return
            self._compared.popleft()
            seen, expected_number = numbers.tolist()
            if seen != expected_number:
                self._compared.clear()
                self.fail(
                    f"term {name!r} counts {seen:.10g} tokens in the training step, but {expected_number:.10g} in the"
                    " batch that the step gets"
                )

    def fail(self, reason: str) -> None:
        """Go over to the mean by micro-batch, with one warning.

        Args:
            reason: Why the tokens cannot be counted, for the warning.
        """
        if not self._failed:
            warnings.warn(  # in the process that cannot count, whichever it is
                f"The loss on tokens is the mean over each micro-batch, and not over the tokens of the whole optimizer"
                f" step, since {reason}. This differs where micro-batches have unequal numbers of tokens.",
                stacklevel=2,
            )
        self._failed = True
        if self._trainer.world_size == 1 or not self._trainer.lightning_module.automatic_optimization:
            self._on, self.divisors = False, {}
