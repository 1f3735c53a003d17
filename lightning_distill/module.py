"""The LightningModule around a plain student network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_distill import checks
from lightning_distill.adapters import OptimizerCallable
from lightning_distill.callback import DistillCallback
from lightning_distill.hparams import Teacher, Terms
from lightning_distill.on_policy import OnPolicyDistillation
from lightning_distill.recording.arguments import takes
from lightning_distill.recording.batches import call_with, has_labels, inputs_in, split_batch
from lightning_distill.recording.outputs import obvious
from lightning_distill.schedules import Schedule
from lightning_distill.teachers.inputs import Place
from lightning_distill.teachers.route import Place as Route
from lightning_distill.terms.mixing import Weights

LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class DistillModule(LightningModule):
    """A LightningModule for a plain student network: use it directly, or subclass it and override methods.

    It distils through its own :class:`DistillCallback`, ``self.distill``. The teacher is not among its parameters: the
    state_dict has the student alone, under ``"student."``. A batch is ``(inputs, labels)``, where the inputs may be a
    tensor, a tuple of arguments or a dict of keyword arguments, or one dict with the labels under ``"labels"``,
    ``"label"``, ``"target"`` or ``"y"``. With ``task_weight=0`` it may be the inputs alone, without labels: a tensor, a
    list with one tensor, or a dict. Logs ``train_loss`` (the task loss), ``val_loss`` and ``test_loss``, if the batches
    have labels. A subclass may add callbacks in ``configure_callbacks``; the module's own is always among them.

    Args:
        student: The network to train.
        teacher: The network to match, or several; ``None`` if no term needs one.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``.
        task_loss: The student's own loss, called with the logits in its output and the labels, a scalar.
        task_weight: Factor of the task loss, 0 or greater, or a schedule; 0 trains on the teacher alone.
        optimizer: Makes the optimizer from the student's parameters; ``None`` is ``torch.optim.AdamW``.
        lr_scheduler: Makes the learning rate scheduler from the optimizer; it steps once an epoch.
        labels: As in :class:`DistillCallback`.
        teacher_inputs: As in :class:`DistillCallback`.
        teacher_weights: As in :class:`DistillCallback`.
        mix: As in :class:`DistillCallback`.
        route: As in :class:`DistillCallback`.
        teacher_dtype: As in :class:`DistillCallback`.
        on_policy: As in :class:`DistillCallback`.
        adapter_optimizer: As in :class:`DistillCallback`.
        validate: As in :class:`DistillCallback`.
        log: As in :class:`DistillCallback`.
        prog_bar: As in :class:`DistillCallback`.
        name: As in :class:`DistillCallback`.

    Raises:
        ValueError: If ``task_weight`` is negative, or terms share a name.
        TypeError: If the teacher is not a module.

    Example:
        >>> module = DistillModule(nn.Linear(4, 3), nn.Linear(4, 3))
        >>> sorted(module.state_dict())
        ['student.bias', 'student.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        terms: Terms = None,
        *,
        task_loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        task_weight: float | Schedule = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        labels: str | int | Callable[[Any], Tensor] | None = None,
        teacher_inputs: Place = None,
        teacher_weights: Weights = None,
        mix: str = "losses",
        route: Route | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        on_policy: OnPolicyDistillation | None = None,
        adapter_optimizer: OptimizerCallable | None = None,
        validate: bool | None = None,
        log: bool = True,
        prog_bar: bool | Sequence[str] = False,
        name: str = "distill",
    ) -> None:
        super().__init__()
        self.student, self.task_loss, self.lr_scheduler = student, task_loss, lr_scheduler
        # not the default in the signature: a YAML file that names another class would inherit AdamW's weight decay
        self.optimizer = torch.optim.AdamW if optimizer is None else optimizer
        self.distill = DistillCallback(
            teacher,
            terms,
            student="student",
            task_weight=task_weight,
            labels=labels,
            teacher_inputs=teacher_inputs,
            teacher_weights=teacher_weights,
            mix=mix,
            route=route,
            teacher_dtype=teacher_dtype,
            on_policy=on_policy,
            adapter_optimizer=adapter_optimizer,
            validate=validate,
            log=log,
            prog_bar=prog_bar,
            name=name,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_callbacks" in vars(cls):  # one that forgets `super` would train without distillation, silently
            cls.configure_callbacks = _with_distillation(cls.configure_callbacks)  # type: ignore[method-assign, assignment]

    @property
    def teacher(self) -> Any:
        """The teacher. It is not part of the state_dict."""
        return self.distill.teacher

    def configure_callbacks(self) -> Sequence[Callback]:
        """The callback that distils, and any other of its kind that the Trainer has, which Lightning would drop."""
        callbacks = [] if self._trainer is None else getattr(self._trainer, "callbacks", [])
        return [
            self.distill,
            *(other for other in callbacks if isinstance(other, DistillCallback) and other is not self.distill),
        ]

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Sequence[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As in Lightning, without the networks and terms, which would take the teacher into every checkpoint."""
        ignored = [ignore] if isinstance(ignore, str) else [*(ignore or [])]
        caller = inspect.currentframe()
        frame = frame or (caller.f_back if caller else None)
        super().save_hyperparameters(
            *args, ignore=[*ignored, "student", "teacher", "terms"], frame=frame, logger=logger
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The task loss of a batch, ``None`` without labels; the callback adds the distillation loss."""
        return self._task_loss(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Logs ``val_loss``."""
        return self._task_loss(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss``."""
        self._task_loss(batch, "test_loss")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The student's output for a batch of inputs, or of inputs and labels."""
        return call_with(self, self._of_student(inputs_in(batch, self.distill.labels)))

    def configure_optimizers(self) -> Any:
        """The student's optimizer, and its scheduler if there is one."""
        optimizer = self.optimizer(self.student.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _of_student(self, inputs: Any) -> Any:
        """The inputs without those of the teacher alone."""
        place = self.distill.teacher_inputs
        if isinstance(inputs, Mapping) and isinstance(place, str) and not takes(self.student, place):
            return {name: value for name, value in inputs.items() if name != place}
        return inputs

    def _task_loss(self, batch: Any, name: str) -> Tensor | None:
        if not has_labels(batch, self.distill.labels):
            if not self.distill.distils_alone:
                got = f"a dict of {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
                remedy = "Pass task_weight=0 to train without labels, or labels=<where a batch keeps them>."
                raise ValueError(checks.message("a batch with inputs and labels for the task loss", got, remedy))
            call_with(self, self._of_student(inputs_in(batch)))
            return None
        inputs, labels = split_batch(batch, self.distill.labels)
        output = call_with(self, self._of_student(inputs))
        # your own task loss may need the whole output of a network without obvious logits
        logits = self.distill.logits(output) if self.task_loss is F.cross_entropy else obvious(output)
        if not self.distill.distils_alone:
            check_task_loss(self.task_loss, logits)
        loss = self.task_loss(logits, labels)
        # the mean over all processes in validation, so that each stops and lowers its learning rates at the same time
        self.log(name, loss, prog_bar=True, batch_size=len(labels), sync_dist=name != "train_loss")
        return loss


def check_task_loss(task_loss: Callable[..., Tensor], output: Any) -> None:
    """Raise if the student's own loss is the cross entropy of a single class.

    Args:
        task_loss: The loss.
        output: The student's output.

    Raises:
        ValueError: If so.
    """
    if task_loss is F.cross_entropy:
        remedy = "Set `task_loss`, for instance to torch.nn.functional.binary_cross_entropy_with_logits."
        checks.several_classes(output, remedy)


def _with_distillation(configure: Callable[[Any], Any]) -> Callable[[Any], list[Callback]]:
    @functools.wraps(configure)
    def configure_callbacks(self: DistillModule) -> list[Callback]:
        callbacks = configure(self)
        added = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        own = DistillModule.configure_callbacks(self)
        return [*(callback for callback in own if callback not in added), *added]

    return configure_callbacks
