"""Distillation in a user's own loop, in which only hooks say what happens."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import backends, checks
from keras_distill.launcher import engine
from keras_distill.model import DistillModel
from keras_distill.taps import Call, Recorder
from keras_distill.targets import carries_features
from keras_distill.term import DistillationTerm


class Loop:
    """The total loss in a loop of the user's own, which calls the student itself.

    From :meth:`open` to :meth:`close` the student's calls are recorded: their inputs, and the tapped layers' outputs.

    Args:
        student: The student.
        teacher: The teacher, or None where its outputs are given.
        terms: What the student imitates; none leaves its own loss alone.
        task_weight: Factor of the student's own loss.
        criterion: A criterion of the user's own, which makes the total itself; there are no terms then.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | None,
        terms: Sequence[DistillationTerm],
        task_weight: float,
        criterion: Any = None,
    ) -> None:
        self.student, self.teacher, self.terms, self.task_weight = student, teacher, terms, task_weight
        self.criterion = criterion
        self.model = DistillModel(student, teacher, terms, track_agreement=False) if terms else None
        self._recorder = Recorder(student, [tap for term in terms for tap in term.student_taps], "student")
        self._thread = threading.local()  # tf.distribute runs each replica on a thread of its own
        self._before: Any = None
        self._open = False

    def open(self) -> None:
        """Begin to record the student."""
        original, self._before = self.student.call, self.student.__dict__.get("call")

        @functools.wraps(original)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = self._recorder.watch(lambda: original(*args, **kwargs))
            inputs = args[0] if args else next(iter(kwargs.values()), None)
            for tap in self._recorder.taps:
                if tap.layer in ("", self.student):  # whose call is the one that runs already
                    call.runs[tap.layer, tap.where] = [call.output if tap.where == "output" else inputs]
            self._calls.append((inputs, call))
            return call.output

        object.__setattr__(self.student, "call", recorded)  # past Keras, which would track what it is given
        self._open = True

    def close(self) -> None:
        """Stop recording."""
        if not self._open:
            return
        self._open = False
        if self._before is None:
            object.__delattr__(self.student, "call")
        else:
            object.__setattr__(self.student, "call", self._before)

    def release(self) -> None:
        """Forget calls that had no loss."""
        self._calls.clear()

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Any:
        """The total loss of one call of the student.

        Args:
            inputs: The teacher's input; ``None`` takes the student's.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known, with features as ``DistillTargets`` carry them.

        Returns:
            A scalar.

        Raises:
            ValueError: If the student was not called while it was recorded and its call is needed, or there is no
                teacher.
        """
        if self.model is None and self.criterion is None:
            return self.task_weight * student_loss
        seen, call = self._call_of(output)
        inputs = seen if inputs is None else inputs
        if call is None and (self._recorder.taps or (inputs is None and teacher_output is None)):
            remedy = "Call it as a model, between `on_train_begin` and `on_train_end`."
            expected = "the student to be called before `on_after_compute_loss`"
            raise ValueError(checks.message(expected, "no call of it", remedy))
        self.release()
        if teacher_output is None:
            self._check_teacher(inputs)
        if self.model is None:
            return self.criterion(output, self._teacher_output(inputs, teacher_output), student_loss)
        student = Call(output, {} if call is None else call.runs)
        distillation = engine.loss_of(self.model, student, inputs, output, teacher_output)
        return distillation if self.task_weight == 0 else self.task_weight * student_loss + distillation

    def _check_teacher(self, inputs: Any) -> None:
        """Raise if the teacher is missing; build it if it never ran: building runs the layers, which is not a call."""
        if self.teacher is None:
            remedy = "Set `teacher_model`, or pass `teacher_output`."
            raise ValueError(checks.message("a teacher to learn from", "teacher_model=None", remedy))
        if not self.teacher.built:
            self.teacher(inputs, training=False)

    def _teacher_output(self, inputs: Any, given: Any) -> Any:
        """The teacher's output without gradient: the given one, or its own."""
        if given is not None:
            return given["output"] if carries_features(given) else given
        teacher: Any = self.teacher
        with backends.no_gradient():
            output = teacher(inputs, training=False)
        return keras.tree.map_structure(keras.ops.stop_gradient, output)

    @property
    def _calls(self) -> collections.deque[tuple[Any, Call]]:
        """The last calls on this thread."""
        if not hasattr(self._thread, "calls"):
            self._thread.calls = collections.deque(maxlen=4)
        calls: collections.deque[tuple[Any, Call]] = self._thread.calls
        return calls

    def _call_of(self, output: Any) -> tuple[Any, Call | None]:
        """The inputs and the call that returned an output; the last call where the user has changed the output."""
        leaves = {id(leaf) for leaf in keras.tree.flatten(output)}
        calls = [*self._calls]
        own = [pair for pair in calls if leaves & {id(leaf) for leaf in keras.tree.flatten(pair[1].output)}]
        return own[-1] if own else calls[-1] if calls else (None, None)
