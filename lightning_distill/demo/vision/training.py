"""The demonstration's training runs: one teacher, then the students of each seed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_distill.callback import DistillCallback
from lightning_distill.demo.vision.images import Images
from lightning_distill.demo.vision.networks import Classifier, Student, Transformer, described, hit_rate, probe
from lightning_distill.terms import FeatureDistillation

TEACHER, UNTRAINED, ALONE, DISTILLED = "teacher, probed", "untrained, probed", "trained alone", "distilled, probed"
STUDENTS = (UNTRAINED, ALONE, DISTILLED)


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method.
        digits: Number of digits; ``None`` takes all.
        copies: Number of images of each digit.
        labels: Numbers of labels of each class.
        batch_size: Number of images in a step.
        teacher_steps: Number of steps of the teacher, which knows all labels.
        steps: Number of steps of a student: of the distillation, and of a training on few labels.
        teacher_size: Width and depth of the teacher.
        student_width: Channels of the student's first maps.
        teacher_lr: Highest learning rate of the teacher, on a one-cycle schedule with AdamW.
        student_lr: Highest learning rate of a student.
    """

    seeds: int = 2
    digits: int | None = None
    copies: int = 4
    labels: tuple[int, ...] = (2, 10, 50)
    batch_size: int = 64
    teacher_steps: int = 800
    steps: int = 500
    teacher_size: tuple[int, int] = (64, 3)
    student_width: int = 16
    teacher_lr: float = 2e-3
    student_lr: float = 1e-2


@dataclass
class Run:
    """Results of one method with one number of labels.

    Args:
        method: :data:`TEACHER`, or one of :data:`STUDENTS`.
        labels: Number of labels of each class.
        seed: Seed of the first weights, of the order of the images and of the choice of the labels.
        parameters: Number of parameters of the network.
        steps: Number of steps of its training.
        test: Share of right answers on the test images.
    """

    method: str
    labels: int
    seed: int
    parameters: int
    steps: int
    test: float


@dataclass
class Results:
    """All runs, and the networks for the figure.

    Args:
        runs: The runs, the teacher's first in each seed.
        teacher: The teacher.
        reached: The teacher's own share of right answers on the test images, with the labels of all images.
        untrained: The student of the first seed before its training.
        distilled: The same student after the distillation.
    """

    runs: list[Run]
    teacher: Transformer
    reached: float
    untrained: Student
    distilled: Student


def train_all(images: Images, settings: Settings, console: Console) -> Results:
    """Train the teacher and all students."""
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        torch.manual_seed(0)
        teacher = Transformer(*settings.teacher_size)
        fit(teacher, images.train, settings.teacher_steps, settings.teacher_lr, 0, settings, progress, "teacher")
        reached, runs, kept = hit_rate(teacher, *images.test), list[Run](), list[Student]()
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            untrained = Student(settings.student_width)
            distilled = distil(untrained, teacher, images, settings, seed, progress)
            kept += [untrained, distilled]
            for name, net, steps in (
                (TEACHER, teacher, settings.teacher_steps),
                (UNTRAINED, untrained, 0),
                (DISTILLED, distilled, settings.steps),
            ):
                runs += [Run(name, *row) for row in probes(net, images, settings, seed, steps)]
            for labels in settings.labels:
                alone = copy.deepcopy(untrained)
                few = images.few(labels, seed)
                name = f"alone, {labels} labels, seed {seed}"
                fit(alone, few, settings.steps, settings.student_lr, seed, settings, progress, name)
                test = hit_rate(alone, *images.test)
                runs.append(Run(ALONE, labels, seed, size(alone), settings.steps, test))
    return Results(runs, teacher, reached, *kept[:2])


def distil(
    untrained: Student, teacher: Transformer, images: Images, settings: Settings, seed: int, progress: Progress
) -> Student:
    """A student whose maps have learned the teacher's tokens of images without labels."""
    student = copy.deepcopy(untrained)
    term = FeatureDistillation("features", "norm", "cosine")
    callback = DistillCallback(teacher, term, student="net", task_weight=0, validate=False)
    only_images, name = images.train[:1], f"distilled, seed {seed}"
    fit(student, only_images, settings.steps, settings.student_lr, seed, settings, progress, name, callback)
    return student


def fit(
    net: nn.Module,
    data: Sequence[Tensor],
    steps: int,
    lr: float,
    seed: int,
    settings: Settings,
    progress: Progress,
    name: str,
    *callbacks: Callback,
) -> None:
    """Train a network for some steps, on images drawn with replacement."""
    dataset, generator = TensorDataset(*data), torch.Generator().manual_seed(seed)
    draws = RandomSampler(dataset, replacement=True, num_samples=steps * settings.batch_size, generator=generator)
    task = progress.add_task(name, total=steps)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[*callbacks, _Advance(progress, task)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net.train(), lr), DataLoader(dataset, settings.batch_size, sampler=draws))
    progress.update(task, visible=False)


class _Advance(Callback):
    """A callback that moves the progress bar."""

    def __init__(self, progress: Progress, task: object) -> None:
        self.progress, self.task = progress, task

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """After a step."""
        self.progress.advance(self.task)  # type: ignore[arg-type]


def probes(
    net: Transformer | Student, images: Images, settings: Settings, seed: int, steps: int
) -> list[tuple[int, int, int, int, float]]:
    """Labels, seed, parameters, steps and accuracy of linear classifiers on a network's frozen features."""
    test = described(net, images.test[0])
    rows = []
    for labels in settings.labels:
        few, classes = images.few(labels, seed)
        accuracy = probe((described(net, few), test), (classes, images.test[1]))
        rows.append((labels, seed, size(net), steps, accuracy))
    return rows


def size(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())
