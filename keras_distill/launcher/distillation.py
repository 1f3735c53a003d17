"""The launcher's main class: built-in training, or the hooks in a user's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import keras

from distill_core.launcher.hooks import Hooks
from distill_core.launcher.words import Words
from keras_distill import checks
from keras_distill.launcher.batches import fit_arguments
from keras_distill.launcher.conf import DistillationConf, Metric
from keras_distill.launcher.criteria import CriterionTerm, LabelCrossEntropy, criterion_of
from keras_distill.launcher.loop import Loop
from keras_distill.launcher.outputs import check_alike
from keras_distill.launcher.scores import BestStudent, MetricEvaluation, Scoring
from keras_distill.launcher.training import StudentAlone, optimizer_of
from keras_distill.model import DistillModel
from keras_distill.terms import as_terms


class Distillation(Hooks):
    """Distillation by configuration, or by hooks in a training function of your own.

    Set ``student_model`` and ``teacher_model`` and call :meth:`fit`. Without ``train_func`` the training is built in,
    a :class:`DistillModel` with ``compile`` and ``fit``. With it, :meth:`fit` calls ``train_func(student_model)``,
    which calls the hooks; they work without :meth:`fit` too.

    Args:
        conf: Path of a YAML file, a dict of its form, a :class:`DistillationConf`, or None for the defaults.

    Attributes:
        student_model: The network to train.
        teacher_model: The network to match, called with ``training=False``; None if its outputs are passed instead.
        criterion: A criterion of this package, or any function of ``(student_output, teacher_output, student_loss)``
            that returns the total; None takes the configured one.
        task_loss: The student's own loss in built-in training, in any form that ``compile`` accepts; None takes the
            criterion's loss, which is usually cross entropy.
        optimizer: An optimizer in any form that ``compile`` accepts; None takes the configured one, or AdamW.
        train_func: A training function of your own, called with the student.
        eval_func: Scores a model: returns a number, or several in a list or dict. The first one counts.
        train_dataloader: Data for built-in training: arrays ``(inputs, labels)``, a list of batches, a data set or
            loader, whose batches are ``(inputs, labels)`` or dicts; None takes the configured ones.
        eval_dataloader: Data of the same forms for the configured metric, if ``eval_func`` is not set.
        callbacks: Keras callbacks for built-in training.
        higher_is_better: Whether a larger score is better; None takes ``tuning.accuracy_criterion.higher_is_better`` of
            the file, then the metric's own direction, and True for an ``eval_func``.
        eval_frequency: Number of epochs between two scores; None takes the configured number.
        scores: The scores of the last training, and the weights that were the best.

    Raises:
        ValueError: If a configured value is wrong, with its path.

    Example:
        >>> distiller = Distillation({"distillation": {"train": {"fit": {"verbose": 0}}}})
        >>> layers = keras.layers
        >>> distiller.student_model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        >>> distiller.teacher_model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        >>> from keras_distill import KnowledgeDistillationLoss
        >>> distiller.criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"])
        >>> distiller.train_dataloader = keras.ops.ones((8, 4)), keras.ops.zeros((8,), dtype="int32")
        >>> type(distiller.fit()).__name__
        'Sequential'
    """

    checks: ClassVar[Words] = checks
    best_student = BestStudent

    def __init__(self, conf: str | PathLike[str] | Mapping[str, Any] | DistillationConf | None = None) -> None:
        super().__init__(conf if isinstance(conf, DistillationConf) else DistillationConf(conf))
        self.callbacks: Sequence[keras.callbacks.Callback] = ()

    # For a loop of your own -------------------------------------------------------------------------------------------

    @property
    def adapter_variables(self) -> list[keras.Variable]:
        """The adapters' trainable variables, to be differentiated and updated along with the student's.

        They exist once both models are built, at the latest after the first loss.
        """
        return [variable for term in self._running().terms for variable in term.trainable_variables]

    # Internal --------------------------------------------------------------------------------------------------------

    def _train(self, student: keras.Model) -> None:
        train = self.conf.distillation.train
        data = self.conf.training_data(self.train_dataloader)
        criterion = self._fitting(student, self.create_criterion())
        usual = getattr(criterion, "task_loss", None) or LabelCrossEntropy(check_alike(student, None))
        task_loss = usual if self.task_loss is None else self.task_loss
        if hasattr(criterion, "terms"):
            terms, task_weight = criterion.terms(), getattr(criterion, "task_weight", 0.0)
        else:  # a function, which makes the total loss itself
            terms, task_weight = [CriterionTerm(criterion, keras.losses.get(task_loss))], 0.0
        optimizer = optimizer_of(train.optimizer) if self.optimizer is None else self.optimizer
        model: keras.Model
        if terms:
            model = DistillModel(
                student, self.teacher_model, as_terms(terms), task_weight=task_weight, teacher_metrics=[]
            )
            model.compile(optimizer, task_loss if task_weight else None)
        else:
            model = StudentAlone(student)
            model.compile(optimizer, task_loss, loss_weights=[task_weight])
        self.scores = self._new_scores()
        settings = train.fit.model_dump()
        verbose = settings.pop("verbose")
        model.fit(
            **fit_arguments(data, limit=train.iteration, **settings),
            initial_epoch=train.start_epoch,
            epochs=train.end_epoch,
            callbacks=[*self.callbacks, Scoring(self.scores, student, self.teacher_model)],
            verbose=verbose,
        )

    def _new_loop(self, student: keras.Model, criterion: Any) -> Loop:
        if not hasattr(criterion, "terms"):
            return Loop(student, self.teacher_model, [], 0.0, criterion)
        criterion = self._fitting(student, criterion)
        terms = criterion.terms()
        return Loop(student, self.teacher_model, as_terms(terms) if terms else [], criterion.task_weight)

    def _fitting(self, student: keras.Model, criterion: Any) -> Any:
        """The criterion for the kind of outputs that the models return, unless the user has set ``from_logits``."""
        if not hasattr(criterion, "with_outputs") or criterion.from_logits is not None:
            return criterion
        return criterion.with_outputs(check_alike(student, self.teacher_model if criterion.compares_outputs else None))

    def _configured_criterion(self) -> Any:
        return criterion_of(self.conf.distillation.train.criterion)

    def _metric(self, data: Any, metric: Metric) -> MetricEvaluation:
        return MetricEvaluation(data, metric, self.conf.distillation.train.fit.batch_size)

    def _seed(self, seed: int) -> None:
        keras.utils.set_random_seed(seed)

    def _student(self) -> keras.Model:
        if not isinstance(self.student_model, keras.Model):
            received = f"{self.student_model!r}"
            raise ValueError(checks.message("`student_model` to be a keras.Model", received, "Set it first."))
        return self.student_model
