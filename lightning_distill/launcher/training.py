"""The launcher's built-in training, on Lightning's Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from distill_core.launcher import conf
from distill_core.launcher.scores import BestStudent
from lightning_distill.adapters import OptimizerCallable
from lightning_distill.functional.inputs import savable
from lightning_distill.launcher.conf import Training
from lightning_distill.module import DistillModule, check_task_loss
from lightning_distill.recording import Call, map_tensors, select
from lightning_distill.recording.batches import call_with, split_batch
from lightning_distill.terms import DistillationTerm


class LauncherModule(DistillModule):
    """A student in built-in training, of batches ``(inputs, labels)`` or dicts; inputs may be several tensors.

    Logs ``train_loss``, the student's own loss, where it counts: in the total, or in a user's criterion.
    """

    validation_step = LightningModule.validation_step  # type: ignore[assignment] # not validated: epochs are scored instead

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The student's own loss on a batch, None if it has no weight: the labels may be of another task."""
        inputs, labels = split_batch(batch)
        output = call_with(self.student, inputs)
        criteria = [term for term in self.distill.terms if isinstance(term, CriterionTerm)]
        if self.distill.distils_alone and not criteria:
            return None
        logits = select(output, None, "the student's output")
        check_task_loss(self.task_loss, logits)
        loss: Tensor = self.task_loss(logits, labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        for term in criteria:
            term.student_loss = loss
        return None if criteria else loss

    def on_after_backward(self) -> None:
        """After the backward pass: release the loss that a criterion got, which cannot be copied."""
        for term in self.distill.terms:
            if isinstance(term, CriterionTerm):
                term.student_loss = None

    def configure_optimizers(self) -> Any:
        """The user's optimizer, or the configured one."""
        optimizer: Any = self.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        return super().configure_optimizers()


class CriterionTerm(DistillationTerm):
    """A user's criterion, which computes the total itself from both outputs and the student's own loss.

    Args:
        criterion: Called with ``(student_output, teacher_output, student_loss)``, returns a scalar.

    Attributes:
        student_loss: The student's own loss in this step; set it before the term is called.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        super().__init__(name="criterion")
        self.criterion = criterion
        self.student_loss: Tensor | None = None

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The total, a scalar."""
        return self.criterion(student.output, map_tensors(teacher.output, savable), self.student_loss)


class Scoring(Callback):
    """A callback that scores the student after its epochs and loads its best weights at the end.

    Args:
        best: Keeper of the best weights.
        teacher: The teacher, or None.
    """

    def __init__(self, best: BestStudent, teacher: nn.Module | None) -> None:
        self.best, self.teacher = best, teacher

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step: score teacher and student."""
        self.best.begin(_student(pl_module), self.teacher)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each epoch: score the student."""
        self.best.end_epoch(_student(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end: restore the best weights. A spawned process returns the weights after this hook."""
        self.best.restore(_student(pl_module))


def _student(pl_module: LightningModule) -> nn.Module:
    student: nn.Module = pl_module.student  # type: ignore[assignment]
    return student


def optimizer_of(settings: conf.Optimizer | None) -> OptimizerCallable | None:
    """A function that makes the configured optimizer from parameters.

    Args:
        settings: The optimizer's section, or None.

    Returns:
        The function, or None for the default.

    Example:
        >>> make = optimizer_of(conf.Optimizer(SGD={"learning_rate": 0.5, "momentum": 0.9}))
        >>> make([nn.Parameter(torch.zeros(1))]).defaults["momentum"]
        0.9
    """
    if settings is None:
        return None
    if settings.SGD is not None:
        values = settings.SGD.model_dump()
        return functools.partial(torch.optim.SGD, lr=values.pop("learning_rate"), **values)
    kind, adam = (torch.optim.Adam, settings.Adam) if settings.AdamW is None else (torch.optim.AdamW, settings.AdamW)
    values = (adam or conf.AdamSettings()).model_dump(
        exclude_none=True
    )  # each class has its own default of the weight decay
    betas = (values.pop("beta_1"), values.pop("beta_2"))
    return functools.partial(kind, lr=values.pop("learning_rate"), betas=betas, eps=values.pop("epsilon"), **values)


def trainer_of(train: Training) -> Trainer:
    """The configured Trainer; the settings of the section ``trainer`` are passed to it unchanged."""
    usual = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    limits = {"max_epochs": train.end_epoch - train.start_epoch, "limit_train_batches": train.iteration}
    return Trainer(**{**usual, **limits, **train.trainer})
