"""The demonstration's training runs: one teacher, then the comparison of its students for each share of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras

from distill_core.demo_report import FOLDERS, METHODS, METRIC, SCARCE
from distill_core.guidance.comparison import Comparison
from keras_distill.demo.digits import UNLABELLED, Digits, hide_labels, make_student, make_teacher
from keras_distill.guidance import compare
from keras_distill.losses import SoftTargetLoss
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method and share of labels.
        epochs: Number of epochs of each student.
        teacher_epochs: Number of epochs of the teacher.
        batch_size: Number of images in a step.
        student_lr: Highest learning rate of a student, reached after a third of the steps, with Adam.
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
        # Student (N, 4, 4, 12), teacher (N, 4, 4, 64): adapter="auto" makes a 1x1 convolution.
        features = FeatureDistillation("deep", "deep", "mse", weight=self.features_weight)
        return dict(zip(METHODS, ([logits()], [logits(), features]), strict=True))

    def compiled(self, lr: float, steps: int) -> dict[str, Any]:
        """The arguments of ``compile`` for a number of steps, for a student alone and a distilled one.

        Args:
            lr: The highest learning rate.
            steps: Number of steps of the training.
        """
        warmup = max(steps // 3, 1)
        rate = keras.optimizers.schedules.CosineDecay(
            lr / 25, max(steps - warmup, 1), warmup_target=lr, warmup_steps=warmup
        )
        # The mean over the labelled images only, 0 where a batch has none; the terms count every image.
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=UNLABELLED)
        optimizer = keras.optimizers.Adam(rate)
        together = 1 if keras.backend.backend() == "torch" else 10  # steps of an execution; PyTorch has one
        return {"optimizer": optimizer, "loss": loss, "metrics": ["accuracy"], "steps_per_execution": together}


def trained_teacher(digits: Digits, settings: Settings) -> keras.Model:
    """The teacher, trained on all labels."""
    keras.utils.set_random_seed(0)
    teacher, (images, labels) = make_teacher(), digits.train
    steps = settings.teacher_epochs * -(-len(labels) // settings.batch_size)
    teacher.compile(**settings.compiled(settings.teacher_lr, steps))
    teacher.fit(images, labels, batch_size=settings.batch_size, epochs=settings.teacher_epochs, verbose=0)
    return teacher


def compared(
    digits: Digits, settings: Settings, teacher: keras.Model, output: Path, show: Callable[[str], None]
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
            images, labels = digits.train
            kept = hide_labels(labels, 0.1, seed) if share == SCARCE else labels
            return (images, kept), digits.validation, digits.test

        comparisons[share] = compare(
            student=make_student,
            data=data,
            teacher=teacher,
            methods=settings.methods(),
            metric=METRIC,
            seeds=settings.seeds,
            compile=partial(settings.compiled, settings.student_lr),
            fit={"epochs": settings.epochs, "batch_size": settings.batch_size},
            folder=output / folder,
            save_weights=True,
            reuse_models=True,
            resume=False,
            progress=lambda line, share=share: show(f"{share} of the labels, {line}"),  # type: ignore[misc]
        )
    return comparisons
