"""One run of a comparison: a fresh student, its data, ``compile`` and ``fit``, and the evaluation of the student."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distill_core.guidance.comparison import wrong_metric
from distill_core.guidance.driver import MissingMetricError, Task
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE, digest, file_name, write_predictions, write_samples
from distill_core.guidance.run_records import RunRecord
from distill_core.terminal import one_line
from keras_distill import checks, compat
from keras_distill.cache import TeacherCache
from keras_distill.callbacks import SetEpoch
from keras_distill.guidance.copies import copied_settings
from keras_distill.guidance.data import RunData, batches_of, data_of, digest_of_batch, is_arrays
from keras_distill.guidance.evaluation import Answers, cost_of, first_images, predictions_of
from keras_distill.guidance.observer import RunObserver
from keras_distill.guidance.reuse import CompiledModels
from keras_distill.model import DistillModel
from keras_distill.targets import EpochData


@dataclass(frozen=True)
class Trainings:
    """Makes the runs of a comparison. It can be pickled where its parts can.

    Args:
        student: Makes a model.
        data: Data, or a function that makes them.
        methods: The arguments of :class:`DistillModel` by method.
        compile_settings: The arguments of ``compile``, or a function that makes them.
        fit: The arguments of ``fit``.
        metric: The metric that decides.
        folder: The folder for predictions and weights; None writes none.
        save_weights: Whether the weights of each student are kept.
        models: Compiled models to use again; None trains a fresh one in each run.
    """

    student: Callable[[], keras.Model]
    data: Any
    methods: Mapping[str, Mapping[str, Any]]
    compile_settings: Any
    fit: Mapping[str, Any]
    metric: str
    folder: Path | None = None
    save_weights: bool = False
    models: CompiledModels | None = None

    @property
    def batch_size(self) -> int:
        """Number of examples in a batch of arrays."""
        return int(self.fit.get("batch_size") or 32)

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
        with kept_random_state():
            return self._train(task)

    def _train(self, task: Task) -> RunRecord:
        keras.utils.set_random_seed(task.seed)
        student = self.made_student()
        start = digest(student.get_weights())
        data = data_of(self.data, task.seed)
        settings = dict(self.methods.get(task.method, {}))
        cache = teacher if isinstance(teacher := settings.pop("teacher", None), TeacherCache) else None
        shuffle = bool(self.fit.get("shuffle", True))
        train, arrays = data.training(cache, self.batch_size, shuffle, task.seed)
        batch = next(batches_of(train, 0)) if arrays is None else arrays.first_batch(0)
        model = student
        if task.method not in (ALONE, EQUAL_COMPUTE):
            model = distill_model(student, None if cache else teacher, settings)
        observer = RunObserver(task.steps)
        error, metrics, noise, predictions = None, dict[str, float](), None, None
        try:
            student, model = self._compiled(student, model, self._steps(train, task), task.method, batch)
            self._fit(model, train, data, observer, task)
            metrics, noise = self._evaluated(student, model, data, observer, task)
            predictions = predictions_of(student, data.val, self.batch_size)
        except MissingMetricError:
            raise
        except Exception as raised:
            if observer.steps == 0:
                raise
            error = one_line(f"{type(raised).__name__}: {raised}")
        observer.stop()
        if error is None and not np.isfinite(metrics[self.metric]):
            error = f"{self.metric} is {metrics[self.metric]}"
        name, folder, weights = file_name(task.method, task.seed), self.folder, None
        if folder is not None and self.save_weights and error is None:
            weights = f"weights/{name}.weights.h5"
            (folder / "weights").mkdir(parents=True, exist_ok=True)
            student.save_weights(folder / weights)
        keep = predictions is not None and folder is not None and error is None
        return RunRecord(
            method=task.method,
            seed=task.seed,
            metrics=dict(metrics),
            seconds=observer.seconds,
            steps=observer.steps,
            epochs=observer.epochs,
            step_seconds=observer.step_seconds,
            curve=observer.curve,
            error=error,
            predictions=write_predictions(folder, name, *predictions) if keep else None,  # type: ignore[arg-type, misc]
            weights=weights,
            student=start,
            batches=[digest_of_batch(batch)]
            if arrays is None
            else [digest_of_batch(arrays.first_batch(epoch)) for epoch in range(observer.epochs)],
            random=noise,
        )

    def made_student(self) -> keras.Model:
        """A fresh student.

        Raises:
            TypeError: If it is not a Keras model.
            ValueError: If it has no weights yet, or distils by itself.
        """
        student = self.student()
        if not isinstance(student, keras.Model):
            raise TypeError(checks.message("`student` to make a Keras model", f"a {type(student).__name__}"))
        if isinstance(student, DistillModel):
            remedy = "Pass the plain student; each method puts it into a DistillModel."
            raise ValueError(checks.message("`student` to make a model that does not distil", "a DistillModel", remedy))
        if not student.built:
            remedy = "Begin it with keras.Input, or call build."
            raise ValueError(checks.message("`student` to make a model that is built", f"{student!r}", remedy))
        return student

    def compiled(self, steps: int | None = None) -> dict[str, Any]:
        """The arguments of ``compile`` for one model: optimizer and metrics are new.

        Args:
            steps: Number of steps of the training, for a function that asks for it; None if it is not known.
        """
        settings = self.compile_settings
        if callable(settings):
            asks = "steps" in inspect.signature(settings).parameters
            if asks and steps is None:
                expected = "`data` to have a length, since `compile` asks for the number of steps"
                raise ValueError(checks.message(expected, "a data set without one", "Pass steps_per_epoch in `fit`."))
            return dict(settings(steps=steps) if asks else settings())
        return {name: _fresh(value) for name, value in settings.items()}

    def _compiled(
        self, student: keras.Model, model: keras.Model, steps: int | None, method: str, batch: Any
    ) -> tuple[keras.Model, keras.Model]:
        """The student and the model to train, compiled now or for an earlier seed."""
        kept = None if self.models is None else self.models.kept.get((method, steps))
        if kept is not None and kept.started(model):
            return kept.student, kept.model
        model.compile(**self.compiled(steps))
        if model is student or model.step.built:  # else its step creates them, with the terms
            compat.create_variables(model, batch)
        if self.models is not None and not self.fit.get("callbacks"):
            self.models.keep((method, steps), student, model)
        return student, model

    def _steps(self, train: Any, task: Task) -> int | None:
        if task.steps is not None:
            return task.steps
        per_epoch = self.fit.get("steps_per_epoch")
        if per_epoch is None:
            try:
                per_epoch = len(train)
            except TypeError:
                return None
        return int(per_epoch) * int(self.fit["epochs"])

    def _fit(self, model: keras.Model, train: Any, data: RunData, observer: RunObserver, task: Task) -> None:
        settings = {"verbose": 0, **self.fit}
        settings.pop("batch_size", None)  # of arrays, which are batches now
        if is_arrays(data.train):
            settings["shuffle"] = False  # Keras would shuffle the batches once more
        own = settings.pop("callbacks", None)
        callbacks = copy.deepcopy([] if own is None else [*own] if isinstance(own, (list, tuple)) else [own])
        if task.steps is not None:
            first = int(settings.get("initial_epoch", 0))
            settings["epochs"] = first + task.stretched(int(settings["epochs"]) - first)
        if is_arrays(data.val):
            settings.setdefault("validation_batch_size", self.batch_size)
        if isinstance(train, EpochData) and not isinstance(model, DistillModel):  # whose `fit` sets the epoch itself
            callbacks = [SetEpoch(train), *callbacks]
        model.fit(train, validation_data=data.val, callbacks=[*callbacks, observer], **settings)

    def _evaluated(
        self, student: keras.Model, model: keras.Model, data: RunData, observer: RunObserver, task: Task
    ) -> tuple[dict[str, float], float | None]:
        """The metrics of the model with those of the training's last epoch, and the noise of the one that decides."""
        if model is not student and self.metric.endswith("_loss"):  # a DistillModel's has another meaning
            model = student
            student.compile(**self.compiled(task.steps or observer.steps))
        logged = observer.curve[-1] if observer.curve else {}
        metrics: dict[str, Any] = {name: value for name, value in logged.items() if name not in ("epoch", "step")}
        metrics |= self.evaluate(model, data)
        if self.metric not in metrics:
            raise MissingMetricError(wrong_metric(self.metric, list(metrics)))
        noise = None
        if task.examined:
            first, second = metrics[self.metric], self.evaluate(model, data).get(self.metric, metrics[self.metric])
            noise = abs(first - second)
            noise = noise if noise > 1e-6 * max(abs(first), abs(second)) else 0.0
        return metrics, noise

    def evaluate(self, model: keras.Model, data: RunData) -> dict[str, float]:
        """The metrics of a compiled model, with ``val_`` or ``test_`` before their names."""
        metrics: dict[str, float] = {}
        for prefix, part in (("val", data.val), ("test", data.test)):
            if part is not None:
                arguments = (
                    {"x": part[0], "y": part[1], "sample_weight": (*part, None)[2], "batch_size": self.batch_size}
                    if is_arrays(part)
                    else {"x": part}
                )
                results = model.evaluate(**arguments, return_dict=True, verbose=0)
                metrics |= {f"{prefix}_{name}": float(value) for name, value in results.items()}
        return metrics

    def facts(self, teacher: Any, teacher_inputs: Any = None) -> dict[str, Any]:
        """The costs of the student and the teacher, and the teacher's metrics and predictions, before any training.

        Args:
            teacher: The teacher of the methods.
            teacher_inputs: Its inputs, if they are not the student's; it is not evaluated then.
        """
        with kept_random_state():
            keras.utils.set_random_seed(0)
            student, data = self.made_student(), data_of(self.data, 0)
            described: dict[str, Any] = {"metrics": {}, "cost": None, "predictions": None}
            if isinstance(teacher, keras.Model):
                described["cost"] = cost_of(teacher, data.val)
                if teacher_inputs is None:
                    with suppress(Exception):  # the two may have other inputs or outputs
                        described |= self._teacher_facts(teacher, data)
            if self.folder is not None:
                write_samples(self.folder, first_images(data.val))
            return {"student": {"cost": cost_of(student, data.val)}, "teacher": described}

    def _teacher_facts(self, teacher: keras.Model, data: RunData) -> dict[str, Any]:
        answers = Answers(teacher)
        answers.compile(**self.compiled(1))
        metrics, arrays = self.evaluate(answers, data), predictions_of(answers, data.val, self.batch_size)
        kept = arrays is not None and self.folder is not None
        return {
            "metrics": metrics,
            "predictions": write_predictions(self.folder, "teacher", *arrays) if kept else None,  # type: ignore[arg-type, misc]
        }


def distill_model(student: keras.Model, teacher: Any, settings: Mapping[str, Any]) -> DistillModel:
    """The model of a method, with terms of its own, so that nothing is carried from one run to the next."""
    return DistillModel(student, teacher, **{"evaluate_distillation": False, **copied_settings(settings)})


@contextmanager
def kept_random_state() -> Iterator[None]:
    """A context after which the generators of Python and NumPy are as before. Those of the backends stay seeded."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _fresh(value: Any) -> Any:
    """A copy of an optimizer, a metric or a loss, or of those in a structure, without what it has learned."""
    if isinstance(value, (keras.optimizers.Optimizer, keras.metrics.Metric)):
        return type(value).from_config(value.get_config())
    if isinstance(value, Mapping):
        return {name: _fresh(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fresh(entry) for entry in value]
    return value
