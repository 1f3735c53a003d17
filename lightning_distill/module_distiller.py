"""The distiller of a LightningModule under a Trainer."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill import checks
from lightning_distill.distiller import Distiller
from lightning_distill.schedules import Progress, Scheduler
from lightning_distill.student import StudentFinder
from lightning_distill.taps import Call, Recorder, find_layer


class ModuleDistiller(Distiller):
    """The distiller of a callback, for one LightningModule.

    It finds the student in the module, and the optimizer to follow among the trainer's.

    Args:
        callback: The callback, whose settings and overridden methods it uses.
        pl_module: The LightningModule.
    """

    student: LightningModule
    _checks_at_once = False

    def __init__(self, callback: Any, pl_module: LightningModule) -> None:
        self._callback = callback
        super().__init__(
            pl_module,
            callback.teacher,
            callback.terms,
            task_weight=callback.task_weight,
            labels=callback.labels,
            teacher_dtype=callback.teacher_dtype,
        )
        self.adapters.factory = callback.adapter_optimizer
        self.scheduler, self._counts = Scheduler(self.terms, callback), False
        self._steps = 0.0

    def teacher_forward(self, call: Call) -> Any:
        """The output that the callback gives for a call of the student."""
        return self._callback.teacher_forward(call)

    def logits(self, output: Any) -> Tensor:
        """The logits that the callback reads from an output."""
        logits: Tensor = self._callback.logits(output)
        return logits

    def loss(self, batch: Any = None) -> Tensor:
        """The weighted sum of the terms, after making sure that the adapters follow the student's optimizer."""
        leader = self.adapters.leader
        if leader not in self.student.trainer.optimizers and not self.idle:  # a new run, or the tuner's
            self._follow_the_students()
        return super().loss(batch)

    def begin(self) -> None:
        """Start a run of fit: with the adapters as they are, a fresh optimizer for them, and a length not yet known."""
        self.adapters.forget_optimizer()
        self._steps = 0.0

    def advance_with_trainer(self) -> None:
        """Set what schedules determine at this point of the training."""
        if not self.scheduler:
            return
        trainer = self.student.trainer
        step = trainer.global_step
        if not self._steps:
            # with several optimizers by hand every one of their steps counts
            each = 1 if self.student.automatic_optimization else max(len(trainer.optimizers), 1)
            self._steps = trainer.estimated_stepping_batches * each
        known = 0 < self._steps < math.inf
        self.scheduler.advance(Progress(step, trainer.current_epoch, min(step / self._steps, 1.0) if known else None))

    def _follow_the_students(self) -> None:
        if self._recorder is None or not self._recorder.calls:
            return  # nothing to distil: the loss says so
        mine = {id(parameter) for parameter in self._recorder.root.parameters()}
        wrapped = self.student.optimizers()
        for optimizer in wrapped if isinstance(wrapped, list) else [wrapped]:
            if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
                self.follow(cast(Optimizer, optimizer))
                return

    def _watch(self) -> Recorder | StudentFinder:
        taps = [tap for term in self.terms for tap in term.student_taps]
        name = self._callback.student
        if name is None:
            return StudentFinder(self.student, taps)
        root = find_layer(self.student, name)
        if root is None:
            names = [one for one, _ in self.student.named_modules() if one]
            raise ValueError(
                f"Expected `student` to name a module of the LightningModule, but got student={name!r}."
                f" {checks.closest(name, names)}"
            )
        return Recorder(root, taps, prefix=f"{name}.")

    def _never_called(self) -> str:
        name = self._callback.student
        what = (
            "the LightningModule or one child that has the tapped layers" if name is None else f"the student {name!r}"
        )
        return (
            f"Expected {what} to be called with gradients in `training_step`, but it was not. Call it as a module,"
            " self.model(x) and not self.model.forward(x), or name the submodule that is called: student=<its path>."
        )
