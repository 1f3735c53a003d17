"""The launcher: distillation from a YAML file, a configuration object, or hooks in a training function of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.launcher import criteria
from lightning_distill.launcher.batches import as_loader
from lightning_distill.launcher.conf import DistillationConf
from lightning_distill.launcher.criteria import (
    IntermediateLayersKnowledgeDistillationLoss,
    KnowledgeDistillationLoss,
    SelfKnowledgeDistillationLoss,
)
from lightning_distill.launcher.loop import LoopDistiller, export
from lightning_distill.launcher.scores import BestStudent, MetricEvaluation
from lightning_distill.launcher.training import (
    CriterionTerm,
    LauncherModule,
    Scoring,
    optimizer_of,
    trainer_of,
)
from lightning_distill.terms import DistillationTerm, LogitsDistillation, as_terms

__all__ = [
    "Distillation",
    "DistillationConf",
    "IntermediateLayersKnowledgeDistillationLoss",
    "KnowledgeDistillationLoss",
    "SelfKnowledgeDistillationLoss",
]


class Distillation:
    """Distillation by configuration, or by hooks in a training function of your own.

    Set ``student_model`` and ``teacher_model`` and call :meth:`fit`. Without ``train_func`` the training is built in
    and runs on Lightning's Trainer. With it, :meth:`fit` calls ``train_func(student_model)``, which calls the hooks;
    they work without :meth:`fit` too.

    Args:
        conf: Path of a YAML file, a dict of its form, a :class:`DistillationConf`, or None for the defaults.

    Attributes:
        student_model: The network to train.
        teacher_model: The network to match; None where the student learns from itself.
        criterion: A criterion of this package, or any function of ``(student_output, teacher_output, student_loss)``
            that gives the total; None takes the configured one.
        task_loss: The student's own loss in built-in training, called with its output and the labels; None takes the
            criterion's, cross entropy unless it says otherwise.
        optimizer: An optimizer, or a function that makes one from parameters; None takes the configured one, or AdamW.
        train_func: A training function of your own, called with the student.
        eval_func: Scores a model: a number, or several in a list or dict of which the first is the judge.
        train_dataloader: Batches for built-in training, ``(inputs, labels)`` or dicts; None takes the configured ones.
        eval_dataloader: Batches for the configured metric, where there is no ``eval_func``.
        trainer: A Trainer for built-in training; None makes one with the configured settings.
        higher_is_better: Whether a larger score is better.
        eval_frequency: How many epochs lie between two scores; None takes the configured number.
        scores: The scores of the last training, and the weights that were the best.

    Raises:
        ValueError: If a configured value is wrong, with its path.

    Example:
        >>> distiller = Distillation({"distillation": {"train": {"trainer": {"enable_progress_bar": False}}}})
        >>> distiller.student_model, distiller.teacher_model = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distiller.criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"])
        >>> distiller.train_dataloader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> type(distiller.fit()).__name__
        'Linear'
    """

    def __init__(self, conf: str | PathLike[str] | Mapping[str, Any] | DistillationConf | None = None) -> None:
        self.conf = conf if isinstance(conf, DistillationConf) else DistillationConf(conf)
        if self.conf.model.framework == "tensorflow":
            raise ValueError(
                "Expected `model.framework` to be 'pytorch', but got 'tensorflow'. Use keras_distill.Distillation."
            )
        self.student_model: nn.Module | None = None
        self.teacher_model: nn.Module | None = None
        self.criterion: Any = None
        self.task_loss: Callable[[Tensor, Tensor], Tensor] | None = None
        self.optimizer: Any = None
        self.train_func: Callable[[nn.Module], Any] | None = None
        self.eval_func: Callable[[nn.Module], Any] | None = None
        self.train_dataloader: Iterable[Any] | None = None
        self.eval_dataloader: Iterable[Any] | None = None
        self.trainer: Trainer | None = None
        self.higher_is_better = True
        self.eval_frequency: int | None = None
        self._loop: LoopDistiller | None = None
        self.scores = BestStudent(None, True, 1)
        self._begun = False
        self._loaded: dict[str, Any] = {}  # for the next training
        self._last: dict[str, Any] = {}  # of the last one

    @property
    def best_score(self) -> float | None:
        """The best score that the student has reached, or None."""
        return self.scores.best_score

    def fit(self) -> nn.Module:
        """Train the student.

        Returns:
            ``student_model`` with its best weights, those of the last epoch where nothing scores it.

        Raises:
            ValueError: If a model or the data are missing, or ``train_func`` calls no hook.
        """
        student = self._student()
        if self.conf.tuning.random_seed is not None:
            seed_everything(self.conf.tuning.random_seed, verbose=False)
        try:
            if self.train_func is None:
                self._train(student)
            else:
                self._begun = False
                self.train_func(student)
                if not self._begun:
                    raise ValueError(
                        "Expected `train_func` to call the hooks, but it did not call `on_train_begin`. Call it first,"
                        " and `on_after_compute_loss` in each step."
                    )
                self.on_train_end()
        finally:
            self.close()
        return student

    __call__ = fit

    # Hooks -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first step: freeze the teacher, watch the student, score both.

        Args:
            dataloader: Taken for compatibility; not needed.

        Raises:
            ValueError: If a model is missing, or a layer does not exist.
        """
        self.close()
        student = self._student()
        terms, task_weight = self._settings(None)
        self._loop = LoopDistiller(student, self.teacher_model, terms, task_weight=task_weight)
        self.scores, self._begun = self._new_scores(), True
        state, self._loaded = self._loaded, {}
        if state:
            self._loop.load_state_dict(state["adapters"])
            self.scores.load_state_dict(state["scores"])
        else:
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
        student_loss: Tensor,
        teacher_output: Any = None,
    ) -> Tensor:
        """The total loss, to differentiate in place of the student's own.

        Args:
            input: What the teacher is called with: a dict of keywords, a tuple or list of arguments, or one tensor;
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
        """Before the optimizer steps; there is nothing to do, since the adapters step with it."""
        self._running()

    def on_step_end(self) -> None:
        """After a step."""
        self._running()

    def on_epoch_end(self) -> None:
        """After an epoch: score the student and keep its weights if they are the best."""
        self._running().release()
        self.scores.end_epoch(self._student())

    def on_train_end(self) -> None:
        """At the end: give the student its best weights, remove what was put on it, give the teacher back."""
        if self._loop is not None:
            self.scores.restore(self._student())
            self.close()

    # What a loop of your own may want --------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, for an optimizer of your own; they exist after the first loss.

        Without this the adapters step along with the first optimizer that steps the student.
        """
        return self._running().parameters()

    def follow(self, optimizer: torch.optim.Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the adapters step with this optimizer; needed only where a gradient scaler is used.

        Args:
            optimizer: The student's optimizer.
            scaler: The loop's gradient scaler.
        """
        self._running().follow(optimizer, scaler=scaler)

    def state_dict(self) -> dict[str, Any]:
        """What to save beside the student in a loop of your own: adapters and their optimizer, scores, best weights."""
        if self._loop is None:
            return self._loaded or self._last
        return {"adapters": self._loop.state_dict(), "scores": self.scores.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state at the next ``on_train_begin``.

        Args:
            state: What :meth:`state_dict` gave.
        """
        self._loaded = state

    def save(self, path: str | PathLike[str]) -> None:
        """Write the student's state_dict.

        Args:
            path: File to write.
        """
        torch.save(self._student().state_dict(), path)

    def export(self, path: str | PathLike[str], example: Any) -> None:
        """Write the student as a program that runs without its source (``torch.export.load``).

        Args:
            path: File to write.
            example: Inputs to trace it with, as ``on_after_compute_loss`` takes them.
        """
        export(self._student(), str(path), example)

    def close(self) -> None:
        """Remove every hook and give the teacher back as it was; :meth:`fit` does so even after an exception."""
        if self._loop is not None:
            self._last = self.state_dict()
            self._loop.close()
        self._loop = None

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _train(self, student: nn.Module) -> None:
        train = self.conf.distillation.train
        data = self.train_dataloader
        if data is None and train.dataloader is not None:
            data = train.dataloader.make()
        if data is None:
            raise ValueError(
                "Expected `train_dataloader` to be set, or `distillation.train.dataloader` to name a class_path, but"
                " got neither. Set one, or `train_func`."
            )
        self.criterion = self._configured_criterion() if self.criterion is None else self.criterion
        usual: Any = getattr(self.criterion, "task_loss", nn.functional.cross_entropy)
        task_loss = usual if self.task_loss is None else self.task_loss
        terms, task_weight = self._settings(task_loss)
        optimizer = self.optimizer if self.optimizer is not None else optimizer_of(train.optimizer)
        module = LauncherModule(
            student, self.teacher_model, terms, task_loss=task_loss, task_weight=task_weight, optimizer=optimizer
        )
        self.scores = self._new_scores()
        trainer = self.trainer or trainer_of(train)
        scoring, own = Scoring(self.scores, self.teacher_model), [*trainer.callbacks]  # type: ignore[attr-defined]
        trainer.callbacks = [*own, scoring]  # type: ignore[attr-defined]
        try:
            trainer.fit(module, as_loader(data))
        finally:
            trainer.callbacks = own  # type: ignore[attr-defined]

    def _settings(self, task_loss: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[list[DistillationTerm], float]:
        """Terms and the weight of the student's own loss, as the criterion says."""
        if self.criterion is None:
            self.criterion = self._configured_criterion()
        if not hasattr(self.criterion, "terms"):
            return [CriterionTerm(self.criterion, task_loss)], 0.0
        return as_terms(self.criterion.terms(), LogitsDistillation), self.criterion.task_weight

    def _configured_criterion(self) -> Any:
        section = self.conf.distillation.train.criterion
        if section is None:
            return KnowledgeDistillationLoss()
        name, settings = next(iter(section.model_dump(exclude_none=True).items()))
        try:
            return getattr(criteria, name)(**settings)
        except ValueError as error:
            raise ValueError(f"distillation.train.criterion.{name}: {error}") from None

    def _new_scores(self) -> BestStudent:
        score, accuracy = self.eval_func, self.conf.evaluation.accuracy
        loader = self.eval_dataloader
        if loader is None and accuracy.dataloader is not None:
            loader = accuracy.dataloader.make()
        if score is None and accuracy.metric is not None and loader is not None:
            score = MetricEvaluation(loader, accuracy.metric)
        frequency = self.conf.distillation.train.frequency if self.eval_frequency is None else self.eval_frequency
        checks.at_least("eval_frequency", frequency, 1)
        return BestStudent(score, self.higher_is_better, frequency)

    def _student(self) -> nn.Module:
        if not isinstance(self.student_model, nn.Module):
            raise ValueError(f"Expected `student_model` to be a module, but got {self.student_model!r}. Set it first.")
        return self.student_model

    def _running(self) -> LoopDistiller:
        if self._loop is None:
            raise ValueError("Expected `on_train_begin` to be called first, but it was not. Call it before the loop.")
        return self._loop
