"""Balanced weights: settings, and the number that follows from measured gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

from distill_core.checks import Checks, message
from distill_core.schedules import Linear, Progress, Schedule, Setting  # noqa: F401 - the example uses them

_CHECKS = Checks()
# A gradient that is so many times smaller than the other one is rounding: it counts as 0.
LIMIT = 1e12
_LARGE = 1e6

Weight = float | Schedule | Literal["balanced"]


class Balanced(Schedule):
    r"""A weight that is chosen so that the term's gradient has a given share of the task loss's gradient.

    .. math::
        w = share \cdot \operatorname{median}_{t = 1 \dots steps} \;
            \frac{\lVert \partial L_{task} / \partial z \rVert_t}{\lVert \partial D / \partial z \rVert_t}

    Losses differ by factors of 10,000 in their values and gradients, so that a weight which is right for one is wrong
    for another. The share means the same for each of them.

    * :math:`z` is what the term reads of the student, as one vector: the student's output; for a term on layers the
      outputs (or inputs) of those layers. Of several tensors there, those that the term's gradient reaches.
    * :math:`D` is the term's value without its weight, and :math:`L_{task}` the task loss without ``task_weight``. If
      ``task_weight`` is 0, without a schedule, the first term whose weight is a number takes the task loss's place,
      with its weight.
    * A ratio belongs to one optimizer step. The squared norms of its micro-batches, of all calls of the student and of
      all processes are added first, so the ratio is that of the large batch if both losses are means over examples and
      the parts are equally large.
    * The median is taken over the logarithms: of an even number of ratios, it is the geometric mean of the two in the
      middle. A median, because a single odd batch of the first ones must not decide for the whole training.
    * In the first ``steps`` optimizer steps the weight is the median of those so far, the current one included. The
      weight then stays fixed: nothing is measured any more. A step in which a gradient is 0, not finite, or
      10\ :sup:`12` times smaller than the other one is left out; if all are, an error says so.

    Only what lies behind :math:`z` is differentiated for this: for a term on the output no layer of the student at all.

    Args:
        share: The term's share, greater than 0: at 1 both gradients have the same norm. A schedule changes the share
            during the training, and the measured ratio stays.
        steps: Number of optimizer steps in which the gradients are measured. A step in which the term rests, since its
            share is 0, does not count.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``share`` is not greater than 0, or ``steps`` is below 1.

    Example:
        >>> Balanced()
        Balanced(share=1.0, steps=10)
        >>> Balanced(share=Linear(1.0, 0.0)).at(Progress(fraction=0.25))  # the share
        0.75

    References:
        Chen et al. (2018). GradNorm. arXiv:1711.02257. It measures at the weights of the last shared layer, in every
        step, and trains the weights; here they are measured once, at the activations.
    """

    measured = True

    def __init__(self, share: float | Schedule = 1.0, steps: int = 10) -> None:
        if isinstance(share, Balanced):
            raise TypeError(message("`share` to be a number or a schedule", f"share={share!r}"))
        if not isinstance(share, Schedule):
            _CHECKS.positive("share", share)
            share = float(share)
        _CHECKS.integer("steps", steps)
        _CHECKS.positive("steps", steps)
        self.share, self.steps = share, steps
        super().__init__(self._value, over=share.over if isinstance(share, Schedule) else "steps")

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {"share": self.share, "steps": self.steps}

    def _value(self, position: float) -> float:
        return self.share._value(position) if isinstance(self.share, Schedule) else self.share


class TermWeight(Setting):
    """The weight of a term: a number, a schedule, a :class:`Balanced`, or the word ``"balanced"``."""

    balances = True

    def __set__(self, owner: Any, value: Any) -> None:
        super().__set__(owner, as_weight(value))


def as_weight(value: Any, message: Callable[[str, str, str], str] = message) -> Any:
    """The weight of a term, with a :class:`Balanced` in the place of the word.

    Args:
        value: The user's value.
        message: Makes the message of an error, as the framework's users know it.

    Raises:
        TypeError: If it is another word.

    Example:
        >>> as_weight("balanced"), as_weight(0.5)
        (Balanced(share=1.0, steps=10), 0.5)
    """
    if isinstance(value, str) and value != "balanced":
        remedy = "The only word is 'balanced'."
        raise TypeError(message("`weight` to be an int or a float", f"weight={value!r}", remedy))
    return Balanced() if isinstance(value, str) else value


def counts(row: Sequence[float]) -> bool:
    """Whether a measured step counts: both squared norms are finite, and neither is 0 beside the other."""
    return all(math.isfinite(square) for square in row) and 0 < max(row) <= min(row) * LIMIT**2


def median_ratio(squares: Sequence[Sequence[float]]) -> float | None:
    """The median of the ratios of two norms.

    Args:
        squares: For each step the squared norms of the task loss's and of the term's gradient.

    Returns:
        The median over the steps that count; ``None`` if no step counts.

    Example:
        >>> round(median_ratio([(16.0, 4.0), (0.0, 4.0), (64.0, 4.0)]), 4)
        2.8284
    """
    logarithms = [math.log(task) - math.log(term) for task, term in filter(counts, squares)]
    return math.exp(statistics.median(logarithms) / 2) if logarithms else None


def unmeasured(name: str, squares: Sequence[Sequence[float]]) -> str:
    """The error message for a term of which no step counts.

    Args:
        name: Name of the term.
        squares: For each step the squared norms of the task loss's and of the term's gradient.
    """
    finite = [math.isfinite(square) for row in squares for square in row]
    at_task = sum(not math.isfinite(task) or task < term for task, term in squares)  # else the term's loss is at fault
    return message(
        f"the gradient of {'the task loss' if 2 * at_task > len(squares) else f'term {name!r}'} to be finite and not 0"
        f" in the first steps, since the weight of term {name!r} is balanced",
        f"a gradient that is {'0' if all(finite) else 'not finite'} in all {len(squares)} of them",
        "Look at this loss, or pass a number as the weight.",
    )


def large(name: str, factor: float) -> str | None:
    """The warning about a gradient that is tiny beside the task loss's, or ``None``.

    Args:
        name: Name of the term.
        factor: The median ratio.
    """
    if factor <= _LARGE:
        return None
    return (
        f"The gradient of term {name!r} is {factor:.1e} times smaller than that of the task loss, and the balanced"
        " weight makes up for it. If student and teacher are equal at first, the gradient is rounding: pass a number"
        " as the weight."
    )
