"""Balanced weights: the gradients of single terms and of the task loss, measured in the first steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from distill_core.guidance.balance import Balanced, large, median_ratio, unmeasured
from distill_core.schedules import Progress, set_scheduled
from lightning_distill.compat import backward_of_fabric
from lightning_distill.processes import world_size
from lightning_distill.recording import Call
from lightning_distill.recording.outputs import tensors_in
from lightning_distill.teachers import EMATeacher, members
from lightning_distill.terms import DistillationTerm

_HALF_SCALES = (2.0**16, 2.0**8, 1.0)  # like a gradient scaler: small gradients of float16 would be 0


@dataclass
class Measured:
    """The measurements of one balanced weight.

    Attributes:
        rows: For each measured optimizer step the squared norms of the two gradients.
        step: The last of these steps.
        fixed: Whether the measurement is over.
        factor: The factor of the share that follows from them.
        setting: The weight that is measured; ``None`` after a state was loaded.
    """

    rows: list[list[float]] = field(default_factory=list)
    step: int | None = None
    fixed: bool = False
    factor: float | None = None
    setting: Balanced | None = None


class Balance:
    """The balanced weights of one owner's terms.

    The terms' settings are shared between their owners, so each owner writes its own weights before it reads them.

    Args:
        terms: The owner's terms.
        settings: The object with the task weight.
        teacher: The teacher.
    """

    def __init__(self, terms: Sequence[DistillationTerm], settings: Any, teacher: Any) -> None:
        self._terms, self._settings, self._teacher = terms, settings, teacher
        self._sharding: Sequence[str] = ()
        self._measured: dict[str, Measured] = {}
        self._progress = Progress(0, 0, 0.0)

    def _balanced(self) -> Iterator[tuple[DistillationTerm, Balanced, Measured]]:
        for term in self._terms:
            setting = term.schedules.get("weight")
            if not isinstance(setting, Balanced):
                continue
            measured = self._measured.get(term.name)
            if measured is None or measured.setting not in (None, setting):  # a new weight was assigned
                self._check(term, setting)
                measured = self._measured[term.name] = Measured()
            measured.setting = setting
            yield term, setting, measured

    @property
    def _alone(self) -> bool:
        return bool(self._settings.task_weight == 0 and "task_weight" not in self._settings.schedules)

    def check(self, sharding: Sequence[str] = ()) -> None:
        """Raise if a weight is balanced where it cannot be measured.

        Args:
            sharding: The strategy, if it shards the student.

        Raises:
            ValueError: If so.
        """
        self._sharding = sharding
        for term in self._terms:
            setting = term.schedules.get("weight")
            if isinstance(setting, Balanced):
                self._check(term, setting)

    def _check(self, term: DistillationTerm, setting: Balanced) -> None:
        reason = None
        if term.skips_heads:
            reason = "which makes its loss before the task loss is known"
        elif self._sharding:
            reason = f"since {self._sharding[0]} does not let single losses be differentiated"
        elif any(isinstance(each, EMATeacher) for each in members(self._teacher)):
            reason = "since the student and its average are equal at first, and the gradient is 0"
        elif getattr(self._settings, "on_policy", None) is not None and not self._alone:
            reason = "since text of the student has no task loss (or pass task_weight=0 and a term with a number)"
        elif self._alone and not any("weight" not in other.schedules for other in self._terms):
            reason = "since task_weight=0 leaves it nothing to refer to (or pass a term with a number)"
        if reason is not None:
            raise ValueError(
                f"Expected the weight of term {term.name!r} to be a number or a schedule, {reason}, but got"
                f" {setting!r}. Pass a number."
            )

    def start(self) -> None:
        """Begin a new fit, whose steps are other ones than those of the fit before."""
        for measured in self._measured.values():
            measured.step = None

    def advance(self, progress: Progress) -> None:
        """Set the weights for a step; a measurement that is over is closed here.

        Args:
            progress: The point of the training.

        Raises:
            ValueError: If no gradient could be measured in the first steps.
        """
        self._progress = progress
        for term, setting, measured in self._balanced():
            if not measured.fixed and len(measured.rows) >= setting.steps and measured.step != progress.step:
                self._close(term, measured)
        self._write(waiting=1.0)

    def _close(self, term: DistillationTerm, measured: Measured) -> None:
        if measured.factor is None:
            raise ValueError(unmeasured(term.name, measured.rows))
        measured.fixed = True
        if words := large(term.name, measured.factor):
            warnings.warn(words, stacklevel=2)

    def _write(self, waiting: float | None = None) -> None:
        """Write the weights into the terms.

        Args:
            waiting: Factor of the share of a term that is not measured yet; ``None`` leaves its weight alone.
        """
        for term, setting, measured in self._balanced():
            factor = waiting if measured.factor is None else measured.factor
            if factor is not None:
                set_scheduled(term, "weight", factor * setting.at(self._progress))

    def measure(
        self,
        calls: Sequence[Call],
        task_loss: Tensor | None,
        parts: Mapping[str, tuple[Tensor, Tensor | None]],
        device: Callable[[], torch.device | None],
    ) -> None:
        """Measure the gradients of a step, if its weights are not fixed yet, and set the weights.

        All processes take part, also one in which no term works.

        Args:
            calls: The student's calls in the step.
            task_loss: The task loss, a scalar; ``None`` where it is not known.
            parts: The value of each working term without its weight, by name, with the factor that makes it a part of
                the optimizer step's value, or ``None``.
            device: Returns the student's device.

        Raises:
            ValueError: If a loss does not depend on what a balanced term reads of the student.
        """
        balanced = list(self._balanced())
        if not balanced:
            return
        waiting = [(term, measured) for term, _, measured in balanced if not measured.fixed]
        working = any(term.name in parts for term, _ in waiting)
        if working or (waiting and world_size() > 1):
            values = {name: as_share(*part) for name, part in parts.items()}
            rows = [[0.0, 0.0, 0.0] for _ in waiting]  # two squared norms, and whether the term works
            for row, (term, _) in zip(rows, waiting, strict=True):
                if term.name in values:
                    reference = self._reference(term, task_loss, values)
                    row[:] = (*_squared_norms(term, calls, reference, values[term.name]), 1.0)
            for (_, measured), row in zip(waiting, _over_processes(rows, device), strict=True):
                if row.pop():
                    self._add(measured, row)
        self._write(waiting=0.0 if working else None)

    def _add(self, measured: Measured, row: list[float]) -> None:
        if measured.rows and measured.step == self._progress.step:  # a further micro-batch
            row = [before + now for before, now in zip(measured.rows.pop(), row, strict=True)]
        measured.rows.append(row)
        measured.step, measured.factor = self._progress.step, median_ratio(measured.rows)

    def _reference(self, term: DistillationTerm, task_loss: Tensor | None, values: Mapping[str, Tensor]) -> Tensor:
        if self._alone:
            for other in self._terms:
                if other.name in values and "weight" not in other.schedules:
                    reference: Tensor = other.weight * values[other.name]
                    return reference
            raise ValueError(
                f"Expected a term with a number as its weight to work in each of the first steps, since the weight of"
                f" term {term.name!r} refers to it, but got none. Pass a number as the weight."
            )
        if task_loss is None:
            raise ValueError(
                f"Expected `task_loss` to be given in the first steps, since the weight of term {term.name!r} is"
                " balanced, but got none. Pass loss(task_loss=...), or a number as the weight."
            )
        return task_loss

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The measurements by term; empty if nothing is measured."""
        return {
            name: {"rows": [[*row] for row in measured.rows], "step": measured.step, "fixed": measured.fixed}
            for name, measured in self._measured.items()
            if measured.rows
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved measurements; a term without any is measured again."""
        self._measured = {
            name: Measured(
                [[*row] for row in saved["rows"]], saved["step"], saved["fixed"], median_ratio(saved["rows"])
            )
            for name, saved in state.items()
        }
        for measured in self._measured.values():
            measured.factor = median_ratio(measured.rows)
        self._write()  # for a validation, which does not advance


def as_share(value: Tensor, factor: Tensor | None) -> Tensor:
    """A value of a micro-batch as its part of the optimizer step's.

    Args:
        value: The value.
        factor: The factor; ``None`` leaves the value as it is.
    """
    return value if factor is None else factor * value


def _squared_norms(
    term: DistillationTerm, calls: Sequence[Call], reference: Tensor, value: Tensor
) -> tuple[float, float]:
    """The squared norms of the gradients of the reference and of the term, at what the term reads of the student.

    Raises:
        ValueError: If one of them does not depend on it.
    """
    place = "the student's output"
    if term.student_taps:
        place = f"the student's {', '.join(repr(tap.layer) for tap in term.student_taps)}"
    read = {id(tensor): tensor for call in calls for tensor in _read(term, call) if tensor.requires_grad}
    tensors = list(read.values())
    own = _gradients(value, tensors)
    reached = [tensor for tensor, gradient in zip(tensors, own, strict=True) if gradient is not None]
    of_task = _gradients(reference, reached)
    for loss, gradients in ((f"term {term.name!r}", own), ("the task loss", of_task)):
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"Expected {loss} to depend on {place}, where the gradients are compared since the weight of term"
                f" {term.name!r} is balanced, but it does not. Pass a number as the weight."
            )
    return _squares(of_task), _squares(own)


def _read(term: DistillationTerm, call: Call) -> Iterator[Tensor]:
    """The tensors that a term may read of the student."""
    if not term.student_taps:
        return tensors_in(call.output)
    return tensors_in([call.recorded(tap) for tap in term.student_taps])


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient at each tensor, ``None`` where the loss does not depend on it."""
    if not tensors or not loss.requires_grad:
        return [None] * len(tensors)
    half = any(tensor.dtype == torch.float16 for tensor in tensors)
    for scale in _HALF_SCALES if half else (1.0,):
        scaled = scale * loss.float().sum() if half else loss.sum()
        with backward_of_fabric():
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                scaled, tensors, retain_graph=True, allow_unused=True
            )
        if half:  # wider before the scale is taken away again
            gradients = [None if gradient is None else gradient.float() / scale for gradient in gradients]
        if not half or all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
            break
    return list(gradients)


def _squares(gradients: Sequence[Tensor | None]) -> float:
    """The squared norm of all gradients as one vector."""
    present = [gradient for gradient in gradients if gradient is not None]
    wide = [torch.float32 if gradient.device.type == "mps" else torch.float64 for gradient in present]
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(present, wide, strict=True)]
    return float(sum(norm.item() ** 2 for norm in norms))


def _over_processes(rows: list[list[float]], device: Callable[[], torch.device | None]) -> list[list[float]]:
    """The sums over all processes."""
    if world_size() == 1:
        return rows
    sums = torch.tensor(rows, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(sums)
    summed: list[list[float]] = sums.tolist()
    return summed
