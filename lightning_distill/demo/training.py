"""The demonstration's training runs: one teacher, then the comparison of its students for each share of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill_core.demo_report import FOLDERS, METHODS, METRIC, SCARCE
from distill_core.guidance.comparison import Comparison
from lightning_distill.demo.digits import Classifier, Digits, Student, Teacher, hide_labels
from lightning_distill.guidance import compare
from lightning_distill.guidance.runs import QUIET
from lightning_distill.losses import SoftTargetLoss
from lightning_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method and share of labels.
        epochs: Number of epochs of each student.
        teacher_epochs: Number of epochs of the teacher.
        batch_size: Number of images in a step.
        student_lr: Highest learning rate of a student, on a one-cycle schedule with Adam.
        teacher_lr: Highest learning rate of the teacher.
        temperature: Softening of both networks' probabilities.
        logits_weight: Factor of the term on logits.
        features_weight: Factor of the term on features.
    """

    seeds: int = 5
    epochs: int = 8
    teacher_epochs: int = 6
    batch_size: int = 50
    student_lr: float = 1e-2
    teacher_lr: float = 3e-3
    temperature: float = 4.0
    logits_weight: float = 1.0
    features_weight: float = 1.0

    def methods(self) -> dict[str, list[DistillationTerm]]:
        """The terms of each method."""
        logits = partial(LogitsDistillation, SoftTargetLoss(temperature=self.temperature), weight=self.logits_weight)
        # Student (12, 4, 4), teacher (64, 4, 4): adapter="auto" makes a 1x1 convolution.
        features = FeatureDistillation("deep", "deep", "mse", weight=self.features_weight)
        return dict(zip(METHODS, ([logits()], [logits(), features]), strict=True))


def trained_teacher(digits: Digits, settings: Settings) -> nn.Module:
    """The teacher, trained on all labels."""
    torch.manual_seed(0)
    teacher = Teacher()
    trainer = Trainer(**QUIET, accelerator="cpu", devices=1, max_epochs=settings.teacher_epochs, log_every_n_steps=1000)
    train, validation, _ = loaders(digits, digits.train[1], settings)
    trainer.fit(Classifier(teacher, settings.teacher_lr), train, validation)
    return teacher


def compared(
    digits: Digits, settings: Settings, teacher: nn.Module, output: Path, show: Callable[[str], None]
) -> dict[str, Comparison]:
    """The comparisons of the student alone with the distilled ones, by the share of labels.

    Args:
        digits: The images.
        settings: The numbers.
        teacher: The teacher.
        output: The folder of their folders.
        show: Called with a line for each finished run.
    """
    comparisons = {}
    for share, folder in FOLDERS.items():

        def data(seed: int, share: str = share) -> Any:
            labels = digits.train[1]
            return loaders(digits, hide_labels(labels, 0.1, seed) if share == SCARCE else labels, settings)

        comparisons[share] = compare(
            module=lambda: Classifier(Student(), settings.student_lr),
            data=data,
            teacher=teacher,
            methods=settings.methods(),
            metric=METRIC,
            seeds=settings.seeds,
            trainer={"max_epochs": settings.epochs, "accelerator": "cpu", "log_every_n_steps": 1000},
            folder=output / folder,
            save_weights=True,
            resume=False,
            progress=lambda line, share=share: show(f"{share} of the labels, {line}"),  # type: ignore[misc]
        )
    return comparisons


def loaders(digits: Digits, labels: Tensor, settings: Settings) -> list[DataLoader[Any]]:
    """Loaders to train, to validate and to test.

    Args:
        digits: The images.
        labels: The classes of the images to train on.
        settings: The numbers.
    """
    batches = DataLoader(TensorDataset(digits.train[0], labels), settings.batch_size, shuffle=True)
    return [batches, *(DataLoader(TensorDataset(*part), 512) for part in (digits.validation, digits.test))]
