"""One run of a comparison: a fresh module, its data, a Trainer, and the evaluation of the trained student."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn

from distill_core.guidance.comparison import wrong_metric
from distill_core.guidance.driver import MissingMetricError, Task
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE, file_name, write_predictions, write_samples
from distill_core.guidance.run_records import RunRecord
from distill_core.terminal import one_line
from lightning_distill import checks, compat
from lightning_distill.callback import DistillCallback
from lightning_distill.guidance.evaluation import Predictions, cost_of, replaced_by
from lightning_distill.guidance.observer import RunObserver, digest_of, kept_random_state, seed_everything
from lightning_distill.teachers import EMATeacher, TeacherGroup, as_teacher

QUIET: Final[dict[str, Any]] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class Loaders:
    """The data of a run: a LightningDataModule, or loaders."""

    module: LightningDataModule | None = None
    train: Any = None
    val: Any = None
    test: Any = None

    @property
    def validates(self) -> bool:
        """Whether there are data to validate on."""
        return self.val is not None if self.module is None else compat.overrides(self.module, "val_dataloader")

    @property
    def tests(self) -> bool:
        """Whether there are data to test on."""
        return self.test is not None if self.module is None else compat.overrides(self.module, "test_dataloader")


@dataclass(frozen=True)
class Trainings:
    """Makes the runs of a comparison. It can be pickled where its parts can.

    Args:
        module: Makes a LightningModule.
        data: A LightningDataModule, loaders, or a function that makes them.
        methods: The arguments of :class:`DistillCallback` by method.
        trainer: The arguments of the Trainer.
        metric: The metric that decides.
        folder: The folder for predictions and weights; None writes none.
        student: Path of the student in the module; None finds it.
        labels: The place of the labels in a batch.
        save_weights: Whether the weights of each student are kept.
    """

    module: Callable[[], LightningModule]
    data: Any
    methods: Mapping[str, Mapping[str, Any]]
    trainer: Mapping[str, Any]
    metric: str
    folder: Path | None = None
    student: str | Sequence[str] | None = None
    labels: Any = None
    save_weights: bool = False

    def prepare(self, threads: int) -> None:
        """In a new process: take a share of the processor."""
        torch.set_num_threads(threads)

    def __call__(self, task: Task) -> RunRecord:
        """Make a run.

        Args:
            task: The run.

        Returns:
            Its record. An error after the first step is in it.

        Raises:
            Exception: An error before the end of the first step.
            MissingMetricError: If the metric was not measured.
        """
        with kept_random_state(), quiet():
            return self._train(task)

    def _train(self, task: Task) -> RunRecord:
        seed_everything(task.seed)
        module = self.made_module()
        loaders = loaders_of(self.data, task.seed)
        with seeded_setup(loaders.module, task.seed):
            return self._record(task, module, loaders)

    def _record(self, task: Task, module: LightningModule, loaders: Loaders) -> RunRecord:
        start = digest_of(module)
        observer = RunObserver(task.seed)
        trainer = self._trainer(task, observer)
        error, metrics, random = None, dict[str, float](), None
        predictions: Predictions | None = None
        try:
            trainer.fit(module, loaders.train, loaders.val, loaders.module)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            metrics, predictions, random = self._evaluated(module, loaders, metrics, task.examined)
        except MissingMetricError:
            raise
        except Exception as raised:
            if observer.steps == 0:
                raise
            error = one_line(f"{type(raised).__name__}: {raised}")
        observer.stop()
        if error is None and not _is_finite(metrics[self.metric]):
            error = f"{self.metric} is {metrics[self.metric]}"
        name, folder = file_name(task.method, task.seed), self.folder
        arrays = None if predictions is None or error else predictions.arrays
        weights = None
        if folder is not None and self.save_weights and error is None:
            weights = f"weights/{name}.pt"
            (folder / "weights").mkdir(parents=True, exist_ok=True)
            torch.save(module.state_dict(), folder / weights)
        return RunRecord(
            method=task.method,
            seed=task.seed,
            metrics=dict(metrics),
            seconds=observer.seconds,
            steps=trainer.global_step,
            epochs=len(observer.batches),
            step_seconds=observer.step_seconds,
            curve=observer.curve,
            error=error,
            predictions=None if arrays is None or folder is None else write_predictions(folder, name, *arrays),
            weights=weights,
            student=start,
            batches=observer.batches,
            random=random,
        )

    def made_module(self) -> LightningModule:
        """A fresh module.

        Raises:
            TypeError: If it is not a LightningModule.
            ValueError: If it distils by itself.
        """
        module = self.module()
        if not isinstance(module, LightningModule):
            raise TypeError(checks.message("`module` to make a LightningModule", f"a {type(module).__name__}"))
        if any(isinstance(callback, DistillCallback) for callback in vars(module).values()):
            expected = "`module` to make a module that does not distil by itself"
            remedy = "Pass your plain LightningModule; each method adds a DistillCallback to it."
            raise ValueError(checks.message(expected, f"a {type(module).__name__} with a DistillCallback", remedy))
        return module

    def _trainer(self, task: Task, observer: RunObserver) -> Trainer:
        settings = {**QUIET, "devices": 1, **self.trainer}
        callbacks = copy.deepcopy(_as_list(settings.pop("callbacks", None)))
        if task.method not in (ALONE, EQUAL_COMPUTE):
            callbacks.append(distill_callback(self.methods[task.method]))
        if task.steps is not None:
            epochs = settings.get("max_epochs") or -1
            settings |= {"max_steps": task.steps, "max_epochs": task.stretched(epochs) if epochs > 0 else -1}
        return Trainer(**settings, callbacks=[*callbacks, observer])

    def _evaluated(
        self, module: LightningModule, loaders: Loaders, metrics: dict[str, float], examined: bool
    ) -> tuple[dict[str, float], Predictions, float | None]:
        """The metrics of a trained module with those of the training, its predictions, and the noise of its metric."""
        recorder = Predictions(module, self.student, self.labels)
        logged = metrics
        seed_everything(0)  # a loader that shuffles the validation data has the same order in every run
        metrics = {**metrics, **self.evaluate(module, loaders, [recorder])}
        if self.metric not in metrics:
            raise MissingMetricError(wrong_metric(self.metric, list(metrics)))
        random = None
        if examined:
            seed_everything(1)
            again = {**logged, **self.evaluate(module, loaders)}
            first, second = metrics[self.metric], again.get(self.metric, metrics[self.metric])
            difference = abs(first - second)
            random = difference if difference > 1e-6 * max(abs(first), abs(second)) else 0.0
        return metrics, recorder, random

    def evaluate(
        self, module: LightningModule, loaders: Loaders, callbacks: Sequence[Callback] = (), **limits: Any
    ) -> dict[str, float]:
        """The metrics that a module logs in validation, and in the test if there are data for one.

        Args:
            module: The module.
            loaders: The data.
            callbacks: Callbacks beside those of the settings.
            **limits: Further arguments of the Trainer.
        """
        trainer = self._evaluator(callbacks, **limits)
        results: list[Mapping[str, float]] = []
        if loaders.validates and compat.overrides(module, "validation_step"):
            results += trainer.validate(module, loaders.val, verbose=False, datamodule=loaders.module)
        if loaders.tests and compat.overrides(module, "test_step"):
            results += trainer.test(module, loaders.test, verbose=False, datamodule=loaders.module)
        return {name: float(value) for result in results for name, value in result.items()}

    def _evaluator(self, callbacks: Sequence[Callback] = (), **limits: Any) -> Trainer:
        settings = {**QUIET, "devices": 1, **self.trainer, "logger": False, **limits}
        own = copy.deepcopy(_as_list(settings.pop("callbacks", None)))
        return Trainer(**settings, callbacks=[*own, *callbacks])

    def facts(self, teacher: Any, teacher_inputs: Any = None) -> dict[str, Any]:
        """The costs of the student and the teacher, and the teacher's metrics and predictions, before any training.

        Args:
            teacher: The teacher of the methods.
            teacher_inputs: Its inputs, if they are not the student's; it is not evaluated then.
        """
        with kept_random_state(), quiet():
            seed_everything(0)
            loaders = loaders_of(self.data, 0)
            with seeded_setup(loaders.module, 0):
                return self._facts(loaders, teacher, teacher_inputs)

    def _facts(self, loaders: Loaders, teacher: Any, teacher_inputs: Any) -> dict[str, Any]:
        module = self.made_module()
        if loaders.module is not None:  # many set up their validation data for a fit alone
            loaders.module.trainer = self._evaluator()
            loaders.module.prepare_data()
            loaders.module.setup("fit")
        first = Predictions(module, self.student, self.labels)
        self.evaluate(module, loaders, [first], limit_val_batches=1, limit_test_batches=0)
        root = module if first.root is None else first.root
        facts: dict[str, Any] = {"student": {"cost": cost_of(root, first.call)}, "teacher": _no_teacher()}
        if isinstance(teacher, nn.Module):
            facts["teacher"] = {**_no_teacher(), "cost": cost_of(teacher, first.call)}
            if first.root is not None and teacher_inputs is None:
                facts["teacher"] |= self._teacher_facts(module, loaders, first.root, teacher)
        if self.folder is not None and first.root is not None:
            recorder = Predictions(module, self.student, self.labels)
            self.evaluate(module, loaders, [recorder], limit_val_batches=200, limit_test_batches=0)
            write_samples(self.folder, () if recorder.images is None else recorder.images)
        return facts

    def _teacher_facts(
        self, module: LightningModule, loaders: Loaders, root: nn.Module, teacher: nn.Module
    ) -> dict[str, Any]:
        """The module's own metrics with the teacher in the place of the student; empty if it does not fit there."""
        recorder = Predictions(module, self.student, self.labels)
        metrics: dict[str, float] = {}
        predictions = None
        seed_everything(0)
        with suppress(Exception), replaced_by(root, teacher):  # the two may have other inputs or outputs
            metrics = self.evaluate(module, loaders, [recorder])
            if recorder.arrays is not None and self.folder is not None:
                predictions = write_predictions(self.folder, "teacher", *recorder.arrays)
        return {"metrics": metrics, "predictions": predictions}


def distill_callback(settings: Mapping[str, Any]) -> DistillCallback:
    """The callback of a method, with terms of its own, so that nothing is carried from one run to the next."""
    settings = {"validate": False, **settings}
    teacher = as_teacher(settings.pop("teacher"))
    if isinstance(teacher, (EMATeacher, TeacherGroup)):
        teacher = copy.deepcopy(teacher)
    return DistillCallback(teacher, **copy.deepcopy(settings))


def loaders_of(data: Any, seed: int) -> Loaders:
    """The data of a run.

    Args:
        data: A LightningDataModule; loaders to train, to validate and perhaps to test; or a function or class that
            makes one of these, called with the seed if it has a parameter ``seed``.
        seed: The seed of the run. Loaders that are not made for the run shuffle by it.

    Raises:
        TypeError: If it is none of these.
    """
    shared = not callable(data) or isinstance(data, LightningDataModule)
    if not shared:
        data = data(seed=seed) if "seed" in _parameters(data) else data()
    if isinstance(data, LightningDataModule):
        return Loaders(module=data)
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        expected = (
            "`data` to be a LightningDataModule, (train, val) or (train, val, test) loaders, or a function of these"
        )
        raise TypeError(checks.message(expected, f"a {type(data).__name__}"))
    if shared:
        for loader in data:
            for holder in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
                if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                    generator.manual_seed(seed)
    train, val, test = (*data, None)[:3]
    return Loaders(train=train, val=val, test=test)


@contextmanager
def seeded_setup(module: LightningDataModule | None, seed: int) -> Iterator[None]:
    """A context in which each ``setup`` of a LightningDataModule draws the same random numbers.

    Lightning calls it before the fit, the validation and the test. If it splits the data at random each time, all three
    get the same split.

    Args:
        module: The LightningDataModule, if the data are one.
        seed: The seed of the run.
    """
    if module is None:
        yield
        return
    setup, own = module.setup, "setup" in vars(module)

    def seeded(*args: Any, **kwargs: Any) -> None:
        with kept_random_state():
            seed_everything(seed)
            setup(*args, **kwargs)

    module.setup = seeded  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.setup
        if own:
            module.setup = setup  # type: ignore[method-assign]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the lines that Lightning writes at the start and the end of every run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
            warnings.filterwarnings("ignore", message=r"The number of training batches")
            warnings.filterwarnings("ignore", message=r".isinstance\(treespec, LeafSpec\). is deprecated")
            yield
    finally:
        logger.setLevel(level)


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return []


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [*value] if isinstance(value, (list, tuple)) else [value]


def _is_finite(value: float) -> bool:
    return value - value == 0


def _no_teacher() -> dict[str, Any]:
    return {"metrics": {}, "cost": None, "predictions": None}
