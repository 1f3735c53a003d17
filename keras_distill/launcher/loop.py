"""Distillation in a user's own training loop, which calls the hooks."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.recording import Call, Record, Recorder
from keras_distill.step import DistillStep
from keras_distill.targets import DistillTargets, split_targets
from keras_distill.teachers import LiveTeacher, as_teachers
from keras_distill.terms import DistillationTerm, TermState


class Loop:
    """The total loss in a user's own loop, which calls the student itself.

    From :meth:`open` to :meth:`close` the student's calls are recorded, on every thread: ``tf.distribute`` runs each
    replica on a thread of its own.

    Args:
        student: The student.
        teacher: The teacher, or None if its outputs are passed to :meth:`step`.
        terms: The terms; an empty list leaves the student's own loss alone.
        task_weight: Factor of the student's own loss.
        criterion: The user's own criterion, which computes the total itself; ``terms`` is then empty.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | None,
        terms: Sequence[DistillationTerm],
        task_weight: float,
        criterion: Any = None,
    ) -> None:
        self.task_weight, self.criterion = task_weight, criterion
        self.distillation = DistillStep(student, teacher, terms) if terms else None
        self.recorder = Recorder(student, [], "student") if self.distillation is None else self.distillation.recorder
        models = [each for each in as_teachers(teacher, student) if isinstance(each, keras.Model)]
        self.teachers = [LiveTeacher(model, []) for model in models]  # for the criterion
        self._thread = threading.local()
        self._watching = contextlib.ExitStack()

    @property
    def terms(self) -> list[TermState]:
        """The trainable parts of the terms."""
        return [] if self.distillation is None else self.distillation.states

    def open(self) -> None:
        """Begin to record the student."""
        if self.distillation is not None or self.criterion is not None:
            self._watching.enter_context(self.recorder.watching(everywhere=True, finished=self._finished))

    def close(self) -> None:
        """Stop recording."""
        self._watching.close()
        self.release()

    def release(self) -> None:
        """Drop recorded calls that had no loss."""
        self._calls.clear()

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Any:
        """The total loss of one call of the student.

        Args:
            inputs: The teacher's input; ``None`` takes the student's.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known, with features in the form of ``DistillTargets``.

        Returns:
            A scalar.

        Raises:
            ValueError: If the student's call is needed but was not recorded, or the teacher is missing.
        """
        if self.distillation is None and self.criterion is None:
            return self.task_weight * student_loss
        record = self._record_of(output)
        inputs = record.inputs if inputs is None and record is not None else inputs
        if record is None and (self.recorder.taps or (inputs is None and teacher_output is None)):
            remedy = "Call it as a model, between `on_train_begin` and `on_train_end`."
            expected = "the student to be called before `on_after_compute_loss`"
            raise ValueError(checks.message(expected, "no call of it", remedy))
        _, stored = split_targets(DistillTargets(None, teacher_output))
        try:
            if self.distillation is None:
                return self.criterion(output, self._answer(inputs, stored).output, student_loss)
            student: Call = self.recorder.call_of(output, record)
            total = self.distillation.compare(output, inputs, student=student, teacher=stored).total
        finally:
            self.release()  # also the calls that were made to build the terms
        return total if self.task_weight == 0 else self.task_weight * student_loss + total

    def _answer(self, inputs: Any, stored: Call | None) -> Call:
        """The teacher's call for the criterion: the stored call, or a new one."""
        if stored is None and not self.teachers:
            remedy = "Set `teacher_model`, or pass `teacher_output`."
            raise ValueError(checks.message("a teacher to learn from", "teacher_model=None", remedy))
        return self.teachers[0].answer(inputs) if stored is None else stored

    @property
    def _calls(self) -> collections.deque[tuple[Record, Any]]:
        """The last calls on this thread."""
        if not hasattr(self._thread, "calls"):
            self._thread.calls = collections.deque(maxlen=4)
        calls: collections.deque[tuple[Record, Any]] = self._thread.calls
        return calls

    def _finished(self, record: Record, output: Any) -> None:
        self._calls.append((record, output))

    def _record_of(self, output: Any) -> Record | None:
        """The record of the call that returned an output, or of the last call if the user has changed the output."""
        leaves = {id(leaf) for leaf in keras.tree.flatten(output)}
        records: list[Record | None] = [record for record, _ in self._calls]
        matching: list[Record | None] = [
            record for record, returned in self._calls if leaves & {id(leaf) for leaf in keras.tree.flatten(returned)}
        ]
        return (matching or records or [None])[-1]
