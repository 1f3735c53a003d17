"""The demonstration's training runs: one teacher, then a student for each setting, method and seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill_core.demo_report import FULL, METHODS, SCARCE, Run
from lightning_distill.callback import DistillCallback
from lightning_distill.demo.digits import Classifier, Digits, Student, Teacher, hide_labels, hit_rate, predict
from lightning_distill.losses import SoftTargetLoss
from lightning_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method and setting.
        epochs: Number of epochs of each student.
        teacher_epochs: Number of epochs of the teacher.
        batch_size: Number of images in a step.
        student_lr: Highest learning rate of a student, on a one-cycle schedule with Adam.
        teacher_lr: Highest learning rate of the teacher.
        temperature: Softening of both networks' probabilities.
        logits_weight: Factor of the term on logits.
        features_weight: Factor of the term on features.
    """

    seeds: int = 3
    epochs: int = 15
    teacher_epochs: int = 12
    batch_size: int = 100
    student_lr: float = 1e-2
    teacher_lr: float = 3e-3
    temperature: float = 4.0
    logits_weight: float = 1.0
    features_weight: float = 1.0

    def terms(self) -> dict[str, Callable[[], list[DistillationTerm]]]:
        """Functions that make the terms of each method; an empty list for the student alone."""
        logits = partial(LogitsDistillation, SoftTargetLoss(temperature=self.temperature), weight=self.logits_weight)
        # Student (12, 4, 4), teacher (64, 4, 4): adapter="auto" makes a 1x1 convolution.
        features = partial(FeatureDistillation, "deep", "deep", "mse", weight=self.features_weight)
        return dict(zip(METHODS, (list, lambda: [logits()], lambda: [logits(), features()]), strict=True))


class Observer(Callback):
    """A callback that records the validation accuracy after each epoch and the time of each step.

    Args:
        advance: Called after each epoch.
    """

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance, self.accuracy, self.step_ms = advance, list[float](), list[float]()
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Before a step: start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """After a step: stop the clock."""
        self.step_ms.append(1000 * (time.perf_counter() - self._start))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch: record its accuracy."""
        self.accuracy.append(float(trainer.callback_metrics["val_accuracy"]))
        self.advance()


def train_all(
    digits: Digits, settings: Settings, console: Console
) -> tuple[list[Run], dict[tuple[str, str, int], dict[str, Tensor]]]:
    """Train the teacher and all students.

    Returns:
        The runs, and each student's state_dict by labels, method and seed.
    """
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    methods, students = settings.terms(), {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        each = 2 * len(methods) * settings.seeds
        task = progress.add_task("teacher", total=settings.teacher_epochs + each * settings.epochs)
        train = partial(_train, digits=digits, settings=settings, advance=lambda: progress.advance(task))
        torch.manual_seed(0)
        teacher = Teacher()
        runs = [train(teacher, [], Run(FULL, "teacher", 0, _size(teacher)), digits.train[1])]
        for seed in range(settings.seeds):  # the methods take turns, so that a busy minute slows all of them
            for share, labels in ((SCARCE, hide_labels(digits.train[1], 0.1, seed)), (FULL, digits.train[1])):
                for method, terms in methods.items():
                    progress.update(task, description=f"{share} labels, {method}, seed {seed}")
                    torch.manual_seed(seed)
                    student = Student()
                    callbacks = [DistillCallback(teacher, made, validate=False)] if (made := terms()) else []
                    runs.append(train(student, callbacks, Run(share, method, seed, _size(student)), labels, teacher))
                    students[share, method, seed] = student.state_dict()
        progress.update(task, description="done")
    return runs, students


def _train(
    net: nn.Module,
    callbacks: Sequence[Callback],
    result: Run,
    labels: Tensor,
    teacher: nn.Module | None = None,
    *,
    digits: Digits,
    settings: Settings,
    advance: Callable[[], None],
) -> Run:
    """Train ``net``, and fill in ``result``."""
    is_teacher = teacher is None
    observer, (images, _) = Observer(advance), digits.train
    generator = torch.Generator().manual_seed(result.seed)  # its own, so that all methods see the same batches
    batches = DataLoader(TensorDataset(images, labels), settings.batch_size, shuffle=True, generator=generator)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.teacher_epochs if is_teacher else settings.epochs,
        callbacks=[observer, *callbacks],
        log_every_n_steps=len(batches),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(net, settings.teacher_lr if is_teacher else settings.student_lr)
    trainer.fit(module, batches, DataLoader(TensorDataset(*digits.validation), batch_size=512))
    result.validation_accuracy = observer.accuracy
    result.step_ms = statistics.median(observer.step_ms)
    classes, (images, labels) = predict(net, digits.test[0]), digits.test
    result.test_accuracy = hit_rate(classes == labels)
    result.teacher_agreement = hit_rate(classes == predict(teacher or net, images))
    return result


def _size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
