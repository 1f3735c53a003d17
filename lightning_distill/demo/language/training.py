"""The demonstration's training runs: one teacher, then the students of each seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.cache import TeacherCache
from lightning_distill.callback import DistillCallback
from lightning_distill.demo.language.networks import GPT, LanguageModel, bits_per_byte, written
from lightning_distill.demo.language.text import Text
from lightning_distill.losses import SoftTargetLoss
from lightning_distill.on_policy import OnPolicyDistillation
from lightning_distill.terms import SequenceDistillation

TEACHER, ALONE, LONGER = "teacher", "student alone", "alone, equal compute"
ONLINE, OFFLINE, OWN_TEXT = "distilled", "distilled, cached", "distilled, own text"
STUDENTS = (ALONE, LONGER, ONLINE, OFFLINE, OWN_TEXT)


@dataclass(frozen=True)
class Settings:
    """Numbers of the demonstration.

    Args:
        seeds: Number of students for each method.
        files: Number of files of each part of the text; ``None`` takes all.
        vocabulary: Number of tokens.
        length: Number of tokens of a row.
        rows: Number of rows to train on.
        batch_size: Number of rows in a step.
        teacher_epochs: Number of times that the teacher sees each row.
        epochs: Number of times that a student sees each row; more for the student with equal compute.
        teacher_size: Width and depth of the teacher.
        student_size: Width and depth of a student.
        teacher_lr: Highest learning rate of the teacher, on a one-cycle schedule with AdamW.
        student_lr: Highest learning rate of a student.
        temperature: Softening of both networks' probabilities.
        weight: Factor of the divergence from the teacher.
        task_weight: Factor of the cross entropy with the text, for a student with a teacher.
        top_k: Number of the likeliest tokens in the cache.
        own_share: Share of the batches that the student continues, for a student that writes text of its own.
        own_prompt: Number of tokens of a row that it keeps.
        own_tokens: Number of tokens that it writes.
        curve_points: Number of measurements on the validation text in a training.
        curve_rows: Number of rows of the validation text for these measurements.
    """

    seeds: int = 1
    files: int | None = None
    vocabulary: int = 1024
    length: int = 128
    rows: int = 2000
    batch_size: int = 8
    teacher_epochs: int = 3
    epochs: int = 2
    teacher_size: tuple[int, int] = (128, 4)
    student_size: tuple[int, int] = (64, 3)
    teacher_lr: float = 3e-3
    student_lr: float = 5e-3
    temperature: float = 1.0
    weight: float = 0.75
    task_weight: float = 0.25
    top_k: int = 64
    own_share: float = 0.25
    own_prompt: int = 64
    own_tokens: int = 16
    curve_points: int = 8
    curve_rows: int = 100

    def steps(self, epochs: int) -> int:
        """Number of steps of so many epochs."""
        return epochs * (self.rows // self.batch_size)

    def gpt(self, size: tuple[int, int]) -> GPT:
        """A network of a width and a depth."""
        return GPT(self.vocabulary, self.length, *size)


@dataclass
class Run:
    """Results of one training run.

    Args:
        method: :data:`TEACHER`, or one of :data:`STUDENTS`.
        seed: Seed of the first weights and of the order of the rows.
        parameters: Number of parameters.
        steps: Number of steps.
        step_flops: Floating-point operations of a step, those of a teacher in the step included.
        once_flops: Floating-point operations before the training: of the teacher that fills a cache.
        seconds: Duration of the training and of filling a cache, without measurements.
        curve: Steps, and bits per byte of some rows of the validation text.
        test: Bits per byte of the test text.
        cache_bytes: Size of the cache on disk.
    """

    method: str
    seed: int
    parameters: int
    steps: int
    step_flops: int
    once_flops: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    test: float = 0.0
    cache_bytes: int = 0

    def flops(self, steps: int | None = None) -> int:
        """Floating-point operations of so many steps, or of all."""
        return self.once_flops + self.step_flops * (self.steps if steps is None else steps)


class Observer(Callback):
    """A callback that measures the network now and then, and the time that this takes.

    Args:
        measure: Makes the number.
        steps: Number of steps of the training.
        points: Number of measurements, the last after the last step.
        advance: Called after each step.
    """

    def __init__(self, measure: Callable[[], float], steps: int, points: int, advance: Callable[[], None]) -> None:
        self.measure, self.advance = measure, advance
        self.due = {round(steps * (point + 1) / points) for point in range(points)}
        self.curve, self.seconds = list[tuple[int, float]](), 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After a step: measure if it is due."""
        started = time.perf_counter()
        if trainer.global_step in self.due:
            self.curve.append((trainer.global_step, self.measure()))
        self.advance()
        self.seconds += time.perf_counter() - started


def train_all(text: Text, settings: Settings, console: Console) -> tuple[list[Run], dict[str, GPT]]:
    """Train the teacher and all students.

    Returns:
        The runs, and the networks of the first seed by method.
    """
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        return _Trainings(text, settings, progress).all()


class _Trainings:
    """All trainings, on the same rows.

    Args:
        text: The text.
        settings: The numbers.
        progress: The progress bar.
    """

    def __init__(self, text: Text, settings: Settings, progress: Progress) -> None:
        self.text, self.settings = text, settings
        self.data = TensorDataset(*text.train.windows(settings.length, settings.rows))
        self.teacher = _seeded(lambda: settings.gpt(settings.teacher_size), 0)
        student = settings.gpt(settings.student_size)
        self.forward, self.step = forward_flops(self.teacher, settings), step_flops(student, settings)
        self.size, self.short = _size(student), settings.steps(settings.epochs)
        self.longer = round(self.short * (self.step + self.forward) / self.step)
        share = settings.own_share
        self.mixed = round(
            (1 - share) * (self.step + self.forward) + share * own_text_flops(student, self.teacher, settings)
        )
        self.writes = round(self.short * (self.step + self.forward) / self.mixed)
        self.progress = progress
        self.task = progress.add_task(TEACHER, total=settings.steps(settings.teacher_epochs))

    def all(self) -> tuple[list[Run], dict[str, GPT]]:
        """The runs, and the networks of the first seed."""
        settings, networks = self.settings, {TEACHER: self.teacher}
        steps = settings.steps(settings.teacher_epochs)
        of_teacher = Run(TEACHER, 0, _size(self.teacher), steps, step_flops(self.teacher, settings))
        self.train(self.teacher, of_teacher, settings.teacher_lr)
        runs = [of_teacher]
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            cache = self.cached(Path(folder) / "cache")
            filled: dict[str, Any] = {
                "once_flops": self.forward * len(self.data) // settings.batch_size,
                "seconds": time.perf_counter() - started,
                "cache_bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()),
            }
            for seed in range(settings.seeds):
                run = partial(Run, seed=seed, parameters=self.size)
                together = self.step + self.forward
                planned: list[tuple[Run, list[Callback]]] = [
                    (run(ALONE, steps=self.short, step_flops=self.step), []),
                    (run(LONGER, steps=self.longer, step_flops=self.step), []),
                    (run(ONLINE, steps=self.short, step_flops=together), [self.distilling()]),
                    (run(OFFLINE, steps=self.short, step_flops=self.step, **filled), [self.distilling(cache)]),
                    (run(OWN_TEXT, steps=self.writes, step_flops=self.mixed), [self.writing(seed)]),
                ]
                for result, callbacks in planned:
                    student = _seeded(lambda: settings.gpt(settings.student_size), seed)
                    self.train(student, result, settings.student_lr, *callbacks)
                    runs.append(result)
                    networks.setdefault(result.method, student)
        self.progress.update(self.task, description="done")
        return runs, networks

    def distilling(self, teacher: TeacherCache | None = None, **further: Any) -> Callback:
        """The callback that distils the teacher, or its stored outputs."""
        settings = self.settings
        loss = SoftTargetLoss(temperature=settings.temperature)
        term = SequenceDistillation(loss, weight=settings.weight, shift=False)  # the labels are the next tokens
        weight = settings.task_weight
        return DistillCallback(teacher or self.teacher, [term], task_weight=weight, validate=False, **further)

    def writing(self, seed: int) -> Callback:
        """The callback that distils the teacher, in some batches on text of the student."""
        settings = self.settings
        on_policy = OnPolicyDistillation(
            settings.own_share,
            max_new_tokens=settings.own_tokens,
            prompt=lambda batch: torch.arange(batch[0].shape[1]) < settings.own_prompt,
            generate=lambda net, *, input_ids, attention_mask, **settings: written(net, input_ids, **settings),
            build=lambda batch, tokens, mask, labels: [tokens[:, :-1], labels[:, 1:]],
            seed=seed,
        )
        return self.distilling(on_policy=on_policy)

    def cached(self, folder: Path) -> TeacherCache:
        """The teacher's likeliest tokens at each place of all rows, on disk."""
        return TeacherCache.build(self.teacher, self.data, folder, top_k=self.settings.top_k, progress=False)

    def train(self, net: GPT, result: Run, lr: float, *callbacks: Callback) -> None:
        """Train a network, and fill in its results."""
        settings, text = self.settings, self.text
        some = text.validation.windows(settings.length, settings.curve_rows)
        self.progress.reset(self.task, total=result.steps, description=f"{result.method}, seed {result.seed}")
        observer = Observer(
            lambda: bits_per_byte(net, some, text.token_bytes),
            result.steps,
            settings.curve_points,
            lambda: self.progress.advance(self.task),
        )
        generator = torch.Generator().manual_seed(result.seed)  # its own, so that all methods see the same batches
        batches = DataLoader(self.data, settings.batch_size, shuffle=True, drop_last=True, generator=generator)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=result.steps,
            gradient_clip_val=1.0,
            callbacks=[*callbacks, observer],
            log_every_n_steps=len(batches),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.fit(LanguageModel(net, lr), batches)
        result.seconds += time.perf_counter() - started - observer.seconds
        result.curve = observer.curve
        result.test = bits_per_byte(net, text.test.windows(settings.length), text.token_bytes)


def step_flops(net: GPT, settings: Settings) -> int:
    """Floating-point operations of a step: forward and backward pass of a batch."""
    return _counted(lambda tokens: net(tokens).sum().backward(), net, settings)


def forward_flops(net: GPT, settings: Settings) -> int:
    """Floating-point operations of the forward pass of a batch."""
    return _counted(torch.no_grad()(net), net, settings)


def own_text_flops(student: GPT, teacher: GPT, settings: Settings) -> int:
    """Floating-point operations of a step on text of the student, which it writes before."""
    size = settings.own_prompt + settings.own_tokens - 1
    write = torch.no_grad()(lambda tokens: written(student, tokens, settings.own_tokens, 1.0))
    return (
        _counted(write, student, settings, settings.own_prompt)
        + _counted(lambda tokens: student(tokens).sum().backward(), student, settings, size)
        + _counted(torch.no_grad()(teacher), teacher, settings, size)
    )


def _counted(work: Callable[[Tensor], Any], net: GPT, settings: Settings, length: int | None = None) -> int:
    tokens = torch.zeros(settings.batch_size, length or settings.length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts matrix products alone
        work(tokens)
    net.zero_grad()
    return int(counter.get_total_flops())


def _seeded(make: Callable[[], GPT], seed: int) -> GPT:
    torch.manual_seed(seed)
    return make()


def _size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
