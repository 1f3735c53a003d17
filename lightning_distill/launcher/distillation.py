"""The launcher's main class: built-in training, or the hooks in a user's own loop."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Trainer
from torch import nn

from distill_core.launcher.hooks import Hooks
from distill_core.launcher.words import Words
from lightning_distill import checks
from lightning_distill.launcher.batches import as_loader
from lightning_distill.launcher.conf import DistillationConf, Metric
from lightning_distill.launcher.criteria import criterion_of
from lightning_distill.launcher.loop import KeyedLoop, LoopDistiller, export, loop_of
from lightning_distill.launcher.scores import BestStudent, MetricEvaluation
from lightning_distill.launcher.training import (
    CriterionTerm,
    LauncherModule,
    Scoring,
    optimizer_of,
    trainer_of,
)
from lightning_distill.terms import DistillationTerm, LogitsDistillation, as_terms


class Distillation(Hooks):
    """Distillation by configuration, or by hooks in a training function of your own.

    Set ``student_model`` and ``teacher_model`` and call :meth:`fit`. Without ``train_func`` the training is built in
    and runs on Lightning's Trainer. With it, :meth:`fit` calls ``train_func(student_model)``, which calls the hooks;
    they work without :meth:`fit` too.

    Args:
        conf: Path of a YAML file, a dict of its form, a :class:`DistillationConf`, or None for the defaults.

    Attributes:
        student_model: The network to train.
        teacher_model: The network to match; None if the student learns from itself.
        criterion: A criterion of this package, or any function of ``(student_output, teacher_output, student_loss)``
            that returns the total; None takes the configured one.
        task_loss: The student's own loss in built-in training, called with its output and the labels; None takes the
            criterion's loss, which is usually cross entropy.
        optimizer: An optimizer, or a function that makes one from parameters; None takes the configured one, or AdamW.
        train_func: A training function of your own, called with the student.
        eval_func: Scores a model: returns a number, or several in a list or dict. The first one counts.
        train_dataloader: Batches for built-in training, ``(inputs, labels)`` or dicts; None takes the configured ones.
        eval_dataloader: Batches for the configured metric, if ``eval_func`` is not set.
        trainer: A Trainer for built-in training; None makes one with the configured settings.
        higher_is_better: Whether a larger score is better; None takes ``tuning.accuracy_criterion.higher_is_better`` of
            the file, then the metric's own direction, and True for an ``eval_func``.
        eval_frequency: Number of epochs between two scores; None takes the configured number.
        scores: The scores of the last training, and the weights that were the best.

    Raises:
        ValueError: If a configured value is wrong, with its path.

    Example:
        >>> distiller = Distillation({"distillation": {"train": {"trainer": {"enable_progress_bar": False}}}})
        >>> distiller.student_model, distiller.teacher_model = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> from lightning_distill import KnowledgeDistillationLoss
        >>> distiller.criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"])
        >>> distiller.train_dataloader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> type(distiller.fit()).__name__
        'Linear'
    """

    checks: ClassVar[Words] = checks
    best_student = BestStudent

    def __init__(self, conf: str | PathLike[str] | Mapping[str, Any] | DistillationConf | None = None) -> None:
        super().__init__(conf if isinstance(conf, DistillationConf) else DistillationConf(conf))
        if self.conf.model.framework == "tensorflow":
            remedy = "Use keras_distill.Distillation."
            raise ValueError(checks.message("`model.framework` to be 'pytorch'", "'tensorflow'", remedy))
        self.trainer: Trainer | None = None
        self._loaded: dict[str, Any] = {}  # for the next training
        self._last: dict[str, Any] = {}  # of the last one

    # For a loop of your own -------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, for an optimizer of your own; they exist after the first loss.

        If you do not use them, the adapters step together with the first optimizer that steps the student.
        """
        parameters: list[nn.Parameter] = self._running().parameters()
        return parameters

    def follow(self, optimizer: torch.optim.Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the adapters step with this optimizer; needed only where a gradient scaler is used.

        Args:
            optimizer: The student's optimizer.
            scaler: The loop's gradient scaler.
        """
        self._running().follow(optimizer, scaler=scaler)

    def state_dict(self) -> dict[str, Any]:
        """The state to save beside the student in your own loop: adapters and their optimizer, scores, best weights."""
        if self._loop is None:
            return self._loaded or self._last
        return {"adapters": self._running().state_dict(), "scores": self.scores.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state at the next ``on_train_begin``.

        Args:
            state: A state from :meth:`state_dict`.
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
        """Remove every hook and restore the teacher; :meth:`fit` does this even after an exception."""
        if self._loop is not None:
            self._last = self.state_dict()
        super().close()

    # Internal --------------------------------------------------------------------------------------------------------

    def _train(self, student: nn.Module) -> None:
        train = self.conf.distillation.train
        data = self.conf.training_data(self.train_dataloader)
        criterion = self.create_criterion()
        usual: Any = getattr(criterion, "task_loss", nn.functional.cross_entropy)
        task_loss = usual if self.task_loss is None else self.task_loss
        terms, task_weight = _settings(criterion)
        optimizer = self.optimizer if self.optimizer is not None else optimizer_of(train.optimizer)
        module = LauncherModule(
            student, self.teacher_model, terms, task_loss=task_loss, task_weight=task_weight, optimizer=optimizer
        )
        self.scores = self._new_scores()
        trainer = self.trainer or trainer_of(train)
        callbacks = [*trainer.callbacks]  # type: ignore[attr-defined]
        trainer.callbacks = [*callbacks, Scoring(self.scores, self.teacher_model)]  # type: ignore[attr-defined]
        try:
            trainer.fit(module, as_loader(data))
        finally:
            trainer.callbacks = callbacks  # type: ignore[attr-defined]

    def _begin(self, loop: Any, student: nn.Module) -> None:
        state, self._loaded = self._loaded, {}
        if state:
            loop.load_state_dict(state["adapters"])
            self.scores.load_state_dict(state["scores"])
        else:
            super()._begin(loop, student)

    def _new_loop(self, student: nn.Module, criterion: Any) -> LoopDistiller | KeyedLoop:
        terms, task_weight = _settings(criterion)
        return loop_of(student, self.teacher_model, criterion, terms, task_weight)

    def _configured_criterion(self) -> Any:
        return criterion_of(self.conf.distillation.train.criterion)

    def _metric(self, data: Any, metric: Metric) -> MetricEvaluation:
        return MetricEvaluation(data, metric)

    def _seed(self, seed: int) -> None:
        seed_everything(seed, verbose=False)

    def _student(self) -> nn.Module:
        if not isinstance(self.student_model, nn.Module):
            received = f"{self.student_model!r}"
            raise ValueError(checks.message("`student_model` to be a module", received, "Set it first."))
        return self.student_model


def _settings(criterion: Any) -> tuple[list[DistillationTerm], float]:
    """The criterion's terms, and its weight of the student's own loss."""
    if not hasattr(criterion, "terms"):
        return [CriterionTerm(criterion)], 0.0
    return as_terms(criterion.terms(), LogitsDistillation), criterion.task_weight
