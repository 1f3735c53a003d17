"""The launcher: distillation from a YAML file, a configuration object, or hooks in a training function of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import keras

from keras_distill import checks
from keras_distill.launcher.batches import fit_arguments
from keras_distill.launcher.conf import DistillationConf
from keras_distill.launcher.criteria import (
    CriterionTerm,
    IntermediateLayersKnowledgeDistillationLoss,
    KnowledgeDistillationLoss,
    LabelCrossEntropy,
    criterion_of,
)
from keras_distill.launcher.loop import Loop
from keras_distill.launcher.scores import BestStudent, MetricEvaluation, Scoring
from keras_distill.launcher.training import StudentAlone, optimizer_of
from keras_distill.model import DistillModel
from keras_distill.terms import DistillationTerm, as_terms

__all__ = [
    "Distillation",
    "DistillationConf",
    "IntermediateLayersKnowledgeDistillationLoss",
    "KnowledgeDistillationLoss",
]


class Distillation:
    """Distillation by configuration, or by hooks in a training function of your own.

    Set ``student_model`` and ``teacher_model`` and call :meth:`fit`. Without ``train_func`` the training is built in,
    a :class:`DistillModel` with ``compile`` and ``fit``. With it, :meth:`fit` calls ``train_func(student_model)``,
    which calls the hooks; they work without :meth:`fit` too.

    Args:
        conf: Path of a YAML file, a dict of its form, a :class:`DistillationConf`, or None for the defaults.

    Attributes:
        student_model: The network to train.
        teacher_model: The network to match, which is called with ``training=False``; None where its outputs are given.
        criterion: A criterion of this package, or any function of ``(student_output, teacher_output, student_loss)``
            that gives the total; None takes the configured one.
        task_loss: The student's own loss in built-in training, whatever ``compile`` takes; None takes the criterion's,
            cross entropy unless it says otherwise.
        optimizer: Whatever ``compile`` takes; None takes the configured one, or AdamW.
        train_func: A training function of your own, called with the student.
        eval_func: Scores a model: a number, or several in a list or dict of which the first is the judge.
        train_dataloader: Data for built-in training: arrays ``(inputs, labels)``, a list of batches, a data set or
            loader, whose batches are ``(inputs, labels)`` or dicts; None takes the configured ones.
        eval_dataloader: Data of the same forms for the configured metric, where there is no ``eval_func``.
        callbacks: Keras callbacks for built-in training.
        higher_is_better: Whether a larger score is better.
        eval_frequency: How many epochs lie between two scores; None takes the configured number.
        scores: The scores of the last training, and the weights that were the best.

    Raises:
        ValueError: If a configured value is wrong, with its path.

    Example:
        >>> distiller = Distillation({"distillation": {"train": {"fit": {"verbose": 0}}}})
        >>> layers = keras.layers
        >>> distiller.student_model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        >>> distiller.teacher_model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        >>> distiller.criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"])
        >>> distiller.train_dataloader = keras.ops.ones((8, 4)), keras.ops.zeros((8,), dtype="int32")
        >>> type(distiller.fit()).__name__
        'Sequential'
    """

    def __init__(self, conf: str | PathLike[str] | Mapping[str, Any] | DistillationConf | None = None) -> None:
        self.conf = conf if isinstance(conf, DistillationConf) else DistillationConf(conf)
        self.student_model: keras.Model | None = None
        self.teacher_model: keras.Model | None = None
        self.criterion: Any = None
        self.task_loss: Any = None
        self.optimizer: Any = None
        self.train_func: Callable[[keras.Model], Any] | None = None
        self.eval_func: Callable[[keras.Model], Any] | None = None
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        self.callbacks: Sequence[keras.callbacks.Callback] = ()
        self.higher_is_better = True
        self.eval_frequency: int | None = None
        self.scores = BestStudent(None, True, 1)
        self._loop: Loop | None = None
        self._begun = False

    @property
    def best_score(self) -> float | None:
        """The best score that the student has reached, or None."""
        return self.scores.best_score

    def fit(self) -> keras.Model:
        """Train the student.

        Returns:
            ``student_model`` with its best weights, those of the last epoch where nothing scores it.

        Raises:
            TypeError: If a model or the data are of a wrong type.
            ValueError: If a model or the data are missing, or ``train_func`` calls no hook.
        """
        student = self._student()
        if self.conf.tuning.random_seed is not None:
            keras.utils.set_random_seed(self.conf.tuning.random_seed)
        if self.train_func is None:
            self._train(student)
            return student
        try:
            self._begun = False
            self.train_func(student)
            if not self._begun:
                remedy = "Call it first, and `on_after_compute_loss` in each step."
                raise ValueError(checks.message("`train_func` to call `on_train_begin`", "no call of it", remedy))
            self.on_train_end()
        finally:
            self.close()
        return student

    __call__ = fit

    # Hooks -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first step: watch the student, score both models.

        Args:
            dataloader: Taken for compatibility; not needed.

        Raises:
            ValueError: If a model is missing, a layer does not exist, or shapes do not fit.
        """
        self.close()
        student = self._student()
        terms, task_weight = self._settings(self._criterion(), None)
        self._loop = Loop(student, self.teacher_model, terms, task_weight)
        self.scores, self._begun = self._new_scores(), True
        self.scores.begin(student, self.teacher_model)
        self._loop.open()

    def on_epoch_begin(self, epoch: int) -> None:
        """At the start of an epoch.

        Args:
            epoch: Its number, from 0.
        """
        self._running().release()

    def on_step_begin(self, batch_id: int) -> None:
        """Before the student is called: forget calls that had no loss.

        Args:
            batch_id: Number of the batch.
        """
        self._running().release()

    def on_after_compute_loss(  # the older API's names, for those who pass keywords
        self,
        input: Any,  # noqa: A002
        student_output: Any,
        student_loss: Any,
        teacher_output: Any = None,
    ) -> Any:
        """The total loss, to differentiate in place of the student's own.

        Args:
            input: What the teacher is called with, a tensor or several in a list or dict as Keras models take them;
                None shows it what the student was called with.
            student_output: What the student returned.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output, if it is known: the teacher then does not run. Where layers are read,
                ``{"output": output, "features": {layer: feature}}``.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``on_train_begin`` was not called, a layer did not run, or shapes do not fit.
        """
        return self._running().step(input, student_output, student_loss, teacher_output)

    def on_before_optimizer_step(self) -> None:
        """Before the optimizer steps; there is nothing to do."""
        self._running()

    def on_step_end(self) -> None:
        """After a step."""
        self._running()

    def on_epoch_end(self) -> None:
        """After an epoch: score the student and keep its weights if they are the best."""
        self._running().release()
        self.scores.end_epoch(self._student())

    def on_train_end(self) -> None:
        """At the end: give the student its best weights, and remove what was put on it."""
        if self._loop is not None:
            self.scores.restore(self._student())
            self.close()

    # What a loop of your own may want --------------------------------------------------------------------------------

    @property
    def adapter_variables(self) -> list[keras.Variable]:
        """The adapters' trainable variables, to be differentiated and updated along with the student's.

        They exist once both models are built, at the latest after the first loss.
        """
        return [variable for term in self._running().terms for variable in term.trainable_variables]

    def close(self) -> None:
        """Remove what was put on the student; :meth:`fit` does so even after an exception."""
        if self._loop is not None:
            self._loop.close()
        self._loop = None

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _train(self, student: keras.Model) -> None:
        train = self.conf.distillation.train
        data = self.train_dataloader
        if data is None and train.dataloader is not None:
            data = train.dataloader.make()
        if data is None:
            expected = "`train_dataloader` to be set, or `distillation.train.dataloader` to name a class_path"
            raise ValueError(checks.message(expected, "neither", "Set one, or `train_func`."))
        criterion = self._criterion()
        task_loss = getattr(criterion, "task_loss", LabelCrossEntropy()) if self.task_loss is None else self.task_loss
        terms, task_weight = self._settings(criterion, task_loss)
        model: DistillModel = StudentAlone(student, task_weight)
        if terms:
            model = DistillModel(student, self.teacher_model, terms, task_weight=task_weight, track_agreement=False)
        optimizer = optimizer_of(train.optimizer) if self.optimizer is None else self.optimizer
        model.compile(optimizer, task_loss if task_weight else None)
        self.scores = self._new_scores()
        how = train.fit.model_dump()
        verbose = how.pop("verbose")
        model.fit(
            **fit_arguments(data, limit=train.iteration, **how),
            initial_epoch=train.start_epoch,
            epochs=train.end_epoch,
            callbacks=[*self.callbacks, Scoring(self.scores, student, self.teacher_model)],
            verbose=verbose,
        )

    def _criterion(self) -> Any:
        return criterion_of(self.conf.distillation.train.criterion) if self.criterion is None else self.criterion

    def _settings(self, criterion: Any, task_loss: Any) -> tuple[list[DistillationTerm], float]:
        """Terms and the weight of the student's own loss, as the criterion says."""
        if not hasattr(criterion, "terms"):
            task_loss = task_loss if task_loss is None else keras.losses.get(task_loss)
            return [CriterionTerm(criterion, task_loss)], 0.0
        terms = criterion.terms()
        return as_terms(terms) if terms else [], criterion.task_weight

    def _new_scores(self) -> BestStudent:
        score, accuracy = self.eval_func, self.conf.evaluation.accuracy
        data = self.eval_dataloader
        if data is None and accuracy.dataloader is not None:
            data = accuracy.dataloader.make()
        train = self.conf.distillation.train
        if score is None and accuracy.metric is not None and data is not None:
            score = MetricEvaluation(data, accuracy.metric, train.fit.batch_size)
        return BestStudent(score, self.higher_is_better, self.eval_frequency or train.frequency)

    def _student(self) -> keras.Model:
        if not isinstance(self.student_model, keras.Model):
            received = f"{self.student_model!r}"
            raise ValueError(checks.message("`student_model` to be a keras.Model", received, "Set it first."))
        return self.student_model

    def _running(self) -> Loop:
        if self._loop is None:
            expected = "`on_train_begin` to be called first"
            raise ValueError(checks.message(expected, "no call of it", "Call it before the loop."))
        return self._loop
