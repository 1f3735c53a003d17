"""The launcher's hooks and the course of a training, for both frameworks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

from distill_core.launcher.conf import Configuration
from distill_core.launcher.scores import BestStudent
from distill_core.launcher.words import Words

_Self = TypeVar("_Self", bound="Hooks")


class Loop(Protocol):
    """Interface of distillation in a user's own training loop."""

    def open(self) -> None:
        """Begin to record the student."""
        ...

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Any:
        """The total loss of a call of the student."""
        ...

    def release(self) -> None:
        """Drop recorded calls of the student that had no loss."""
        ...

    def close(self) -> None:
        """Stop recording and remove every hook."""
        ...


class Hooks:
    """Base of both launchers: the attributes that users set, and the hooks.

    Each half of the project overrides the methods at the end.

    Args:
        conf: The configuration.

    Attributes:
        checks: The module ``checks`` of a half.
        best_student: The class that scores students and keeps the best weights.
    """

    checks: ClassVar[Words]
    best_student: ClassVar[type[BestStudent]]

    def __init__(self, conf: Configuration) -> None:
        self.conf: Any = conf
        self.student_model: Any = None
        self.teacher_model: Any = None
        self.criterion: Any = None
        self.task_loss: Any = None
        self.optimizer: Any = None
        self.train_func: Callable[[Any], Any] | None = None
        self.eval_func: Callable[[Any], Any] | None = None
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        self.higher_is_better: bool | None = None
        self.eval_frequency: int | None = None
        self.scores: BestStudent = self.best_student(None, True, 1)
        self._loop: Loop | None = None
        self._begun = False

    @property
    def model(self) -> Any:
        """Another name of ``student_model``, as in the older API."""
        return self.student_model

    @model.setter
    def model(self, model: Any) -> None:
        self.student_model = model

    @property
    def best_score(self) -> float | None:
        """The best score of the student so far, or None."""
        return self.scores.best_score

    @property
    def running(self) -> bool:
        """Whether a training is between ``on_train_begin`` and ``on_train_end``."""
        return self._loop is not None

    def fit(self) -> Any:
        """Train the student.

        Returns:
            ``student_model`` with its best weights, or with those of the last epoch if it is not scored.

        Raises:
            ValueError: If a model or the data are missing, or ``train_func`` does not call the hooks.
        """
        student = self._student()
        if self.conf.tuning.random_seed is not None:
            self._seed(self.conf.tuning.random_seed)
        try:
            if self.train_func is None:
                self._train(student)
                return student
            self._begun = False
            self.train_func(student)
            if not self._begun:
                remedy = "Call `on_train_begin` first, and `on_after_compute_loss` in each step."
                received = "no call of `on_train_begin`"
                raise ValueError(self.checks.message("`train_func` to call the hooks", received, remedy))
            self.on_train_end()
        finally:
            self.close()
        return student

    __call__ = fit

    def create_criterion(self) -> Any:
        """Make the configured criterion, unless one is set. Only the older API needed this call.

        Returns:
            The criterion.

        Raises:
            ValueError: If the settings do not fit each other, with their path.
        """
        if self.criterion is None:
            self.criterion = self._configured_criterion()
        return self.criterion

    # Hooks -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first step: begin to record the student, and score both models.

        Args:
            dataloader: Not used; accepted for compatibility with the older API.

        Raises:
            ValueError: If a model is missing, a layer does not exist, or shapes do not fit.
        """
        self.close()
        student = self._student()
        loop = self._new_loop(student, self.create_criterion())
        self.scores = self._new_scores()
        self._begin(loop, student)
        self._loop, self._begun = loop, True
        loop.open()

    def on_epoch_begin(self, epoch: int) -> None:
        """At the start of an epoch.

        Args:
            epoch: Its number, from 0.
        """
        self._running().release()

    def on_step_begin(self, batch_id: int) -> None:
        """Before the student is called: drop recorded calls that had no loss.

        Args:
            batch_id: Number of the batch.
        """
        self._running().release()

    def on_after_compute_loss(  # the older API's names, for calls with keywords
        self,
        input: Any,  # noqa: A002
        student_output: Any,
        student_loss: Any,
        teacher_output: Any = None,
    ) -> Any:
        """The total loss, to be differentiated instead of the student's own.

        Args:
            input: The teacher's input: a dict, a tuple or list, or one tensor; None takes the student's own.
            student_output: The student's output. For self-distillation it may be a dict of tensors by the names in
                ``layer_mappings``.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output, if it is known; the teacher then does not run. If the criterion reads
                layers, pass ``{"output": output, "features": {layer: feature}}``.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``on_train_begin`` was not called, a layer did not run, or shapes do not fit.
        """
        return self._running().step(input, student_output, student_loss, teacher_output)

    def on_before_optimizer_step(self) -> None:
        """Before the optimizer steps: only checks that ``on_train_begin`` was called."""
        self._running()

    def on_step_end(self) -> None:
        """After a step: only checks that ``on_train_begin`` was called."""
        self._running()

    def on_epoch_end(self) -> None:
        """After an epoch: score the student and keep its weights if they are the best."""
        self._running().release()
        self.scores.end_epoch(self._student())

    def on_train_end(self) -> None:
        """At the end: load the best weights into the student, and remove every hook."""
        if self._loop is not None:
            self.scores.restore(self._student())
            self.close()

    def close(self) -> None:
        """Remove every hook and restore the teacher; :meth:`fit` does this even after an exception."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Shared by both halves -------------------------------------------------------------------------------------------

    def _new_scores(self) -> BestStudent:
        score, metric, higher = self.eval_func, self.conf.evaluation.accuracy.metric, True
        if score is None and metric is not None:
            data = self.conf.data("evaluation.accuracy.dataloader", self.eval_dataloader)
            if data is not None:
                score = evaluation = self._metric(data, metric)
                higher = evaluation.higher_is_better
        directions = (self.higher_is_better, self.conf.tuning.accuracy_criterion.higher_is_better, higher)
        higher = next(direction for direction in directions if direction is not None)
        frequency = self.conf.distillation.train.frequency if self.eval_frequency is None else self.eval_frequency
        return self.best_student(score, higher, frequency)

    def _begin(self, loop: Any, student: Any) -> None:
        """Score both models, before the loop opens."""
        self.scores.begin(student, self.teacher_model)

    def _running(self) -> Any:
        if self._loop is None:
            expected = "`on_train_begin` to be called first"
            raise ValueError(self.checks.message(expected, "no call of it", "Call it before the loop."))
        return self._loop

    # Overridden by each half -----------------------------------------------------------------------------------------

    def _student(self) -> Any:
        """The student, or an error if it is missing."""
        raise NotImplementedError

    def _seed(self, seed: int) -> None:
        """Seed every random number generator."""
        raise NotImplementedError

    def _train(self, student: Any) -> None:
        """The built-in training."""
        raise NotImplementedError

    def _new_loop(self, student: Any, criterion: Any) -> Any:
        """A loop that is not open yet."""
        raise NotImplementedError

    def _configured_criterion(self) -> Any:
        """The criterion of the configuration."""
        raise NotImplementedError

    def _metric(self, data: Any, metric: Any) -> Any:
        """A function that scores a model by a configured metric, with an attribute ``higher_is_better``."""
        raise NotImplementedError
