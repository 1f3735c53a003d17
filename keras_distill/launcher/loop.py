"""Distillation in a user's own loop, in which only hooks say what happens."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.recording import Call, Record
from keras_distill.step import DistillStep
from keras_distill.targets import DistillTargets, split_targets
from keras_distill.terms import DistillationTerm, TermState


class Loop:
    """The total loss in a loop of the user's own, which calls the student itself.

    From :meth:`open` to :meth:`close` the student's calls are recorded, on every thread: ``tf.distribute`` runs each
    replica on a thread of its own.

    Args:
        student: The student.
        teacher: The teacher, or None where its outputs are given.
        terms: What the student imitates; none leaves its own loss alone.
        task_weight: Factor of the student's own loss.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | None,
        terms: Sequence[DistillationTerm],
        task_weight: float,
    ) -> None:
        self.task_weight = task_weight
        self.distillation = DistillStep(student, teacher, terms) if terms else None
        self._thread = threading.local()
        self._watching = contextlib.ExitStack()

    @property
    def terms(self) -> list[TermState]:
        """What is trained of the terms."""
        return [] if self.distillation is None else self.distillation.states

    def open(self) -> None:
        """Begin to record the student."""
        if self.distillation is not None:
            recorder = self.distillation.recorder
            self._watching.enter_context(recorder.watching(everywhere=True, finished=self._finished))

    def close(self) -> None:
        """Stop recording."""
        self._watching.close()
        self.release()

    def release(self) -> None:
        """Forget calls that had no loss."""
        self._calls.clear()

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Any:
        """The total loss of one call of the student.

        Args:
            inputs: What the teacher is called with; ``None`` is what the student was called with.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known, with features as ``DistillTargets`` carry them.

        Returns:
            A scalar.

        Raises:
            ValueError: If the student was not called while it was recorded and its call is needed.
        """
        if self.distillation is None:
            return self.task_weight * student_loss
        record = self._record_of(output)
        recorder = self.distillation.recorder
        inputs = record.inputs if inputs is None and record is not None else inputs
        if record is None and (recorder.taps or (inputs is None and teacher_output is None)):
            remedy = "Call it as a model, between `on_train_begin` and `on_train_end`."
            expected = "the student to be called before `on_after_compute_loss`"
            raise ValueError(checks.message(expected, "no call of it", remedy))
        _, stored = split_targets(DistillTargets(None, teacher_output))
        student: Call = recorder.call_of(output, record)
        # the student's own loss stands where labels would: it reaches no term but CriterionTerm
        compared = self.distillation.compare(output, inputs, student_loss, student=student, teacher=stored)
        self.release()
        return compared.total if self.task_weight == 0 else self.task_weight * student_loss + compared.total

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
        """The record of the call that returned an output; of the last call where the user has changed the output."""
        leaves = {id(leaf) for leaf in keras.tree.flatten(output)}
        calls: list[tuple[Record, Any]] = list(self._calls)
        own = [call for call in calls if leaves & {id(leaf) for leaf in keras.tree.flatten(call[1])}]
        last: Record | None = calls[-1][0] if calls else None
        if own or self.distillation is None:
            return own[-1][0] if own else last
        return self.distillation.recorder.record_of(output) or last
