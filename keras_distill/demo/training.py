"""The demonstration's training runs: one teacher, then a student for each setting, method and seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import ops
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distill_core.demo_report import FULL, METHODS, SCARCE, Run
from keras_distill.demo.digits import (
    UNLABELLED,
    Array,
    Digits,
    hide_labels,
    hit_rate,
    initial,
    make_student,
    make_teacher,
    predict,
    shuffled,
)
from keras_distill.losses import SoftTargetLoss
from keras_distill.model import DistillModel
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method and setting.
        epochs: Number of epochs of each student.
        teacher_epochs: Number of epochs of the teacher.
        batch_size: Number of images in a step.
        student_lr: Highest learning rate of a student, reached after a third of the steps, with Adam.
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

    def model(self, method: str, teacher: keras.Model, seed: int) -> keras.Model:
        """The untrained model of a method: the student itself, or a model that distils into it."""
        student = make_student(seed)
        if method == "alone":
            return student
        soft = SoftTargetLoss(temperature=self.temperature)
        terms: list[DistillationTerm] = [LogitsDistillation(soft, weight=self.logits_weight)]
        if method == METHODS[-1]:
            # Student (N, 4, 4, 12), teacher (N, 4, 4, 64). adapter="auto" makes this layer too, but unseeded.
            adapter = keras.layers.Conv2D(64, 1, kernel_initializer=initial(100 * seed + 99))
            terms.append(FeatureDistillation("deep", "deep", "mse", weight=self.features_weight, adapter=adapter))
        return DistillModel(student, teacher, terms, evaluate_distillation=False)

    def compile(self, model: keras.Model, lr: float, steps: int) -> None:
        """Compile a model for a number of steps, in the same way for a student alone and a distilled one."""
        warmup = steps // 3
        rate = keras.optimizers.schedules.CosineDecay(lr / 25, steps - warmup, warmup_target=lr, warmup_steps=warmup)
        # The mean over the labelled images only, 0 where a batch has none; the terms count every image.
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=UNLABELLED)
        model.compile(keras.optimizers.Adam(rate), loss)


class Observer(keras.callbacks.Callback):
    """A callback that records the validation accuracy after each epoch and the time of each step.

    Args:
        validation: Images ``(N, 8, 8, 1)`` and classes ``(N,)``.
        advance: Called after each epoch.
    """

    def __init__(self, validation: tuple[Array, Array], advance: Callable[[], None]) -> None:
        super().__init__()
        self.validation, self.advance = validation, advance
        self.accuracy, self.step_ms = list[float](), list[float]()
        self._start = 0.0

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Before a step: start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """After a step: stop the clock."""
        if logs:
            float(logs["loss"])  # some backends run ahead of Python: this waits for the step
        self.step_ms.append(1000 * (time.perf_counter() - self._start))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """After an epoch: record its accuracy. Validation in ``fit`` would create a new iterator, which costs more."""
        images, classes = self.validation
        self.accuracy.append(hit_rate(predict(self.model, images) == classes))
        self.advance()


def train_all(
    digits: Digits, settings: Settings, console: Console
) -> tuple[list[Run], dict[tuple[str, str, int], list[Array]]]:
    """Train the teacher and all students.

    Returns:
        The runs, and each student's weights by labels, method and seed.
    """
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    students, batches = {}, -(-len(digits.train[1]) // settings.batch_size)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        each = 2 * len(METHODS) * settings.seeds
        task = progress.add_task("teacher", total=settings.teacher_epochs + each * settings.epochs)
        train = partial(_train, digits=digits, settings=settings, advance=lambda: progress.advance(task))
        teacher = make_teacher(0)
        settings.compile(teacher, settings.teacher_lr, settings.teacher_epochs * batches)
        runs = [train(teacher, teacher, Run(FULL, "teacher", 0, teacher.count_params()), digits.train[1])]
        models = {method: settings.model(method, teacher, 0) for method in METHODS}
        for model in models.values():
            settings.compile(model, settings.student_lr, settings.epochs * batches)
        for seed in range(settings.seeds):  # the methods take turns, so that a busy minute slows all of them
            for share, labels in ((SCARCE, hide_labels(digits.train[1], 0.1, seed)), (FULL, digits.train[1])):
                for method, model in models.items():
                    progress.update(task, description=f"{share} labels, {method}, seed {seed}")
                    _restart(model, settings.model(method, teacher, seed))
                    student = model if method == "alone" else model.student
                    result = Run(share, method, seed, student.count_params())
                    runs.append(train(model, teacher, result, labels))
                    students[share, method, seed] = student.get_weights()
        progress.update(task, description="done")
    return runs, students


def _restart(model: keras.Model, fresh: keras.Model) -> None:
    """Give a compiled model the weights of a fresh one: compiling each run's own would take longer than the run."""
    model.set_weights(fresh.get_weights())
    for variable in model.optimizer.variables:  # its count of steps and its moments; the rate is a schedule
        variable.assign(ops.zeros_like(ops.convert_to_tensor(variable)))


def _train(
    model: keras.Model,
    teacher: keras.Model,
    result: Run,
    labels: Array,
    *,
    digits: Digits,
    settings: Settings,
    advance: Callable[[], None],
) -> Run:
    """Train ``model``, and fill in ``result``."""
    epochs = settings.teacher_epochs if model is teacher else settings.epochs
    observer, (images, _) = Observer(digits.validation, advance), digits.train
    # The order of all epochs is drawn beforehand, so that all methods of a seed see the same batches.
    order = shuffled(len(images), epochs, result.seed)
    model.fit(
        images[order],
        labels[order],
        batch_size=settings.batch_size,
        epochs=epochs,
        steps_per_epoch=-(-len(images) // settings.batch_size),
        shuffle=False,
        callbacks=[observer],
        verbose=0,
    )
    result.validation_accuracy = observer.accuracy
    result.step_ms = statistics.median(observer.step_ms)
    classes, (images, truth) = predict(model, digits.test[0]), digits.test
    result.test_accuracy = hit_rate(classes == truth)
    result.teacher_agreement = hit_rate(classes == predict(teacher, images))
    return result
