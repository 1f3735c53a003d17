"""The total loss of a training step, to which several callbacks may add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

_PARTS = "_distill_parts"  # attribute of a total


class Total(NamedTuple):
    """The parts of a total loss.

    A callback gets the total of another callback as the loss of the step. It knows it again by this note on the tensor,
    so that its own task weight does not scale the distillation losses of the other.

    Attributes:
        task_loss: The module's own loss; ``None`` if it returned none.
        weight: Product of the task weights so far.
        distillation: Sum of the weighted distillation losses so far; ``None`` before the first.
        unlogged: The total, a share of the optimizer step, less what is logged of it; ``None`` if the two are the same.
    """

    task_loss: Tensor | None
    weight: float = 1.0
    distillation: Tensor | None = None
    unlogged: Tensor | None = None

    @classmethod
    def of(cls, loss: Any) -> Total:
        """The parts of the loss of a step; any other value than a callback's total is the module's own loss."""
        if not isinstance(loss, Tensor):
            return cls(None)
        parts: Total | None = loss.__dict__.get(_PARTS)
        return cls(loss) if parts is None else parts

    def plus(self, distillation: Tensor, task_weight: float, unlogged: Tensor | None) -> Tensor:
        """The total with another callback's distillation loss and task weight, which knows its parts.

        Args:
            distillation: The weighted distillation loss.
            task_weight: The task weight.
            unlogged: As the attribute, of this callback alone.
        """
        if self.distillation is not None:
            distillation = self.distillation + distillation
        if self.unlogged is not None:
            unlogged = self.unlogged if unlogged is None else self.unlogged + unlogged
        weight = self.weight * task_weight
        total = summed(self.task_loss, weight, distillation)
        if total is distillation:
            total = distillation.view_as(distillation)  # a note on a tensor must not hold the tensor itself
        total.__dict__[_PARTS] = Total(self.task_loss, weight, distillation, unlogged)
        return total


def summed(task_loss: Tensor | None, weight: float, distillation: Tensor) -> Tensor:
    """``weight * task_loss + distillation``.

    Args:
        task_loss: The task loss; ``None`` leaves it out.
        weight: Its weight.
        distillation: The weighted distillation loss.
    """
    # if all weights are 0 the task loss stays, because a total without a graph could not be differentiated
    if task_loss is None or (weight == 0 and distillation.requires_grad):
        return distillation
    # a product is an operation forward and one backward
    return (task_loss if weight == 1 else weight * task_loss) + distillation


def loss_in(output: Any) -> Any:
    """The loss in the result of a step, which may be a dict with it."""
    return output.get("loss") if isinstance(output, Mapping) else output


def with_loss(output: Any, loss: Tensor) -> Any:
    """The result of a step with another loss."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def logged_value(loss: Tensor) -> Tensor:
    """The number that is logged for the loss of a step."""
    unlogged = Total.of(loss).unlogged
    return loss.detach() if unlogged is None else loss.detach() - unlogged
