"""Students that teach each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_distill.adapters import OptimizerCallable
from lightning_distill.distiller import Distiller
from lightning_distill.hparams import Terms
from lightning_distill.losses import SoftTargetLoss
from lightning_distill.progress import fraction_done
from lightning_distill.recording import Call, Tap, map_tensors
from lightning_distill.recording.batches import call_with, inputs_in, split_batch
from lightning_distill.recording.outputs import obvious
from lightning_distill.schedules import Balanced, Schedule
from lightning_distill.teachers.hold import memory_of
from lightning_distill.teachers.without_network import WithoutNetwork

LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class MutualLearning(LightningModule):
    r"""Two or more students that teach each other, each with its optimizer (deep mutual learning).

    .. math:: L_k = w_{task} \, L_{task}(z_k) + \frac{1}{K - 1} \sum_{l \ne k} D(z_k, z_l)

    The students are called with the same batch in train mode, and the outputs of the others have no gradient in a
    student's loss. A batch is as in :class:`DistillModule`. It logs ``student_<k>/loss``, ``student_<k>/task_loss`` and
    ``student_<k>/distillation_loss``, and in validation ``student_<k>/val_loss`` and their mean ``val_loss``.

    It optimizes manually: one backward pass a batch, then a step of each optimizer. ``trainer.global_step`` therefore
    counts K steps a batch, as Lightning does, and so does ``max_steps``.

    Args:
        students: The networks, two or more, without common parameters.
        terms: Terms on outputs; ``None`` is ``LogitsDistillation(SoftTargetLoss(temperature=1.0))``, as in the paper.
        task_loss: The loss on the labels, called with the logits in a student's output and the labels, a scalar.
        task_weight: Factor of the task loss, 0 or greater, or a schedule.
        optimizer: Makes an optimizer from a student's parameters, or a list of one for each student; ``None`` is
            ``torch.optim.AdamW``.
        lr_scheduler: Makes the learning rate scheduler from an optimizer; it steps once an epoch.
        labels: As in :class:`DistillCallback`.

    Attributes:
        students: The networks.

    Raises:
        ValueError: If there are fewer than two students, they share parameters, or a term reads layers.

    Example:
        >>> module = MutualLearning([nn.Linear(4, 3), nn.Linear(4, 3)], optimizer=torch.optim.SGD)
        >>> len(module.configure_optimizers()[0])
        2

    References:
        Zhang et al. (2018). Deep Mutual Learning. arXiv:1706.00384, equations 4 to 7. Deviation: all students step
        together, from the same outputs; in the paper's algorithm 1 each sees the update of the one before it.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        terms: Terms = None,
        *,
        task_loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        task_weight: float | Schedule = 1.0,
        optimizer: OptimizerCallable | Sequence[OptimizerCallable] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        labels: str | int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.students = nn.ModuleList(_checked(students))
        self.task_loss, self.lr_scheduler, self.labels = task_loss, lr_scheduler, labels
        made = optimizer if isinstance(optimizer, Sequence) else [optimizer or torch.optim.AdamW] * len(self.students)
        if len(made) != len(self.students):
            raise ValueError(
                f"Expected `optimizer` to be one for each of the {len(self.students)} students, but got {len(made)}."
            )
        self._optimizers = list(made)
        if terms is None:
            terms = SoftTargetLoss(temperature=1.0)
        self._terms, self._task_weight = [terms], task_weight  # in a list: a term is a module
        self._distillers: list[Distiller] = []
        self._validated = False  # whether there was a validation in this epoch
        self._new_distillers()  # which checks the settings

    def _new_distillers(self) -> list[Distiller]:
        settings: dict[str, Any] = {"task_weight": self._task_weight, "labels": self.labels}
        made = [Distiller(student, cast(Any, _Peers()), self._terms[0], **settings) for student in self.students]
        for term in made[0].terms:
            if term.student_taps or any(True for _ in term.parameters()):
                raise ValueError(
                    "Expected terms on outputs without parameters of their own in MutualLearning, but got"
                    f" {type(term).__name__} {term.name!r}. Use LogitsDistillation."
                )
            if isinstance(weight := term.schedules.get("weight"), Balanced):  # checkpoints would not hold it
                raise ValueError(
                    f"Expected `weight` to be a number or a schedule in MutualLearning, but got {weight!r}."
                )
        return made

    def on_fit_start(self) -> None:
        """Prepares the training.

        Raises:
            MisconfigurationException: If the precision needs a gradient scaler, which Lightning would update between
                two optimizers.
        """
        self._distillers = self._new_distillers()
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "Expected a precision without a gradient scaler for several optimizers, but got precision='16-mixed'."
                " Pass precision='bf16-mixed'."
            )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Calls every student, and lets each learn from the labels and from the others."""
        inputs, labels = split_batch(batch, self.labels)
        outputs, tasks = [], []
        for student, distiller in zip(self.students, self._distillers, strict=True):
            self._advance(distiller)
            with distiller.record(batch=batch):
                outputs.append(call_with(student, inputs))
            tasks.append(self._task_loss(outputs[-1], labels))
        fixed = [map_tensors(output, Tensor.detach) for output in outputs]
        totals = []
        for index, (distiller, task) in enumerate(zip(self._distillers, tasks, strict=True)):
            distiller.teacher.outputs = [output for other, output in enumerate(fixed) if other != index]
            totals.append(distiller.total(task, batch))
            distiller.teacher.outputs = []
            values = {"loss": totals[-1].detach(), **distiller.parts}
            shown = {name: values[name] for name in ("loss", "task_loss", "distillation_loss")}
            self.log_dict({f"student_{index}/{name}": value for name, value in shown.items()}, batch_size=len(labels))
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        # the gradients of the students are apart, and DDP wants one backward pass
        self.manual_backward(torch.stack(totals).sum())
        for optimizer in optimizers:
            optimizer.step()

    def on_train_epoch_start(self) -> None:
        """Begins an epoch without a validation so far."""
        self._validated = False

    def on_train_epoch_end(self) -> None:
        """Steps the learning rate schedulers; a ``ReduceLROnPlateau`` after a validation alone.

        Raises:
            MisconfigurationException: If it would never step.
        """
        schedulers: Any = self.lr_schedulers() or []
        for index, scheduler in enumerate(schedulers if isinstance(schedulers, list) else [schedulers]):
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif self._validated:
                scheduler.step(self.trainer.callback_metrics[f"student_{index}/val_loss"])
            elif not self.trainer.enable_validation:
                raise MisconfigurationException(
                    "Expected data to validate on with a ReduceLROnPlateau, which reads `val_loss`, but got none. Pass"
                    " them to fit, or another lr_scheduler."
                )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss of each student on the labels, and their mean."""
        inputs, labels = split_batch(batch, self.labels)
        losses = [self._task_loss(call_with(student, inputs), labels) for student in self.students]
        values = {f"student_{index}/val_loss": loss for index, loss in enumerate(losses)}
        values["val_loss"] = torch.stack(losses).mean()
        # the mean over all processes, so that each lowers its learning rates at the same time
        self.log_dict(values, batch_size=len(labels), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Notes that the losses are new."""
        self._validated = True

    def predict_step(self, batch: Any, batch_idx: int) -> list[Any]:
        """The output of each student."""
        return [call_with(student, inputs_in(batch, self.labels)) for student in self.students]

    def configure_optimizers(self) -> Any:
        """An optimizer for each student, and its scheduler if there is one."""
        made = [make(student.parameters()) for make, student in zip(self._optimizers, self.students, strict=True)]
        return made, [] if self.lr_scheduler is None else [self.lr_scheduler(optimizer) for optimizer in made]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_distillers": []}

    def _task_loss(self, output: Any, labels: Tensor) -> Tensor:
        return self.task_loss(obvious(output), labels)

    def _advance(self, distiller: Distiller) -> None:
        """Set the scheduled values at this point of the training."""
        trainer = self.trainer
        step = trainer.global_step // len(self.students)
        distiller.advance(step, trainer.current_epoch, fraction_done(trainer) if distiller.scheduler else None)


class _Peers(WithoutNetwork):
    """The other students as the teachers of one."""

    outputs: Sequence[Any] = ()

    def as_source(self) -> _Peers:
        """The source of the outputs."""
        return self

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if a term reads a layer.

        Raises:
            ValueError: If so.
        """
        if taps:
            raise ValueError(
                f"Expected terms on outputs in MutualLearning, but {taps[0][0]} names a layer. Use LogitsDistillation."
            )

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The outputs of the others, without gradients."""
        return [
            Call((), {}, output=output, who="teacher", teacher=index, read_logits=call.read_logits)
            for index, output in enumerate(self.outputs)
        ]


def _checked(students: Sequence[nn.Module]) -> Sequence[nn.Module]:
    if len(students) < 2:
        raise ValueError(f"Expected `students` to be two or more networks, but got {len(students)}.")
    owners: dict[Any, int] = {}
    for index, student in enumerate(students):
        for name, parameter in student.named_parameters():
            owner = owners.setdefault(memory_of(parameter), index)
            if owner != index:
                raise ValueError(
                    f"Expected `students` to share no parameters, but students {owner} and {index} both"
                    f" have {name!r}. Pass copy.deepcopy(student), with weights of its own."
                )
    return students
