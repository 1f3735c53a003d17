"""The base of the losses that remember the examples of earlier steps."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_distill.losses.base import DistillationLoss


class RememberingLoss(DistillationLoss):
    """Base of the losses that remember examples: in a training in several processes those of all of them.

    In a training step ``forward`` passes its examples to :meth:`remember`. In one process they enter the memory at
    once. In several the loss collects them until the optimizer's step, where the processes exchange them: before that
    step a process cannot know whether the others have called the loss too. A loss that is called by itself, outside of
    a term, has no optimizer to wait for, and remembers the examples of its own process.

    Attributes:
        collected: The examples of each call since the last optimizer step; ``None`` if they enter the memory at once.
    """

    learned: ClassVar[bool] = True
    collected: list[tuple[Tensor, ...]] | None = None

    def collect(self, collects: bool) -> None:
        """Choose whether examples are collected until the optimizer's step.

        Args:
            collects: Whether they are.
        """
        if collects != (self.collected is not None):
            self.collected = [] if collects else None

    def remember(self, *columns: Tensor) -> None:
        """Let examples enter the memory, at once or with the optimizer's step.

        Args:
            columns: Tensors with one row for each example of a call, without gradients.
        """
        if self.collected is None:
            self.update(*columns)
        else:
            self.collected.append(columns)

    def update(self, *columns: Tensor) -> None:
        """Change the memory. It depends on the arguments and the loss's state alone, so that processes stay alike.

        Args:
            columns: As for :meth:`remember`, of the examples of all processes in the order of their numbers.
        """
        raise NotImplementedError

    def no_examples(self) -> tuple[Tensor, ...]:
        """The arguments of :meth:`remember` for no example, once the loss is built."""
        raise NotImplementedError
