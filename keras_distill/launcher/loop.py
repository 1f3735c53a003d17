"""Distillation in a user's own loop, in which only hooks say what happens."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.model import DistillModel
from keras_distill.steps import Step, in_step
from keras_distill.taps import Call, Recorder
from keras_distill.targets import DistillTargets
from keras_distill.term import DistillationTerm


class Loop:
    """The total loss in a loop of the user's own, which calls the student itself.

    From :meth:`open` to :meth:`close` the student's calls are watched: their inputs, and what the tapped layers give.

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
        self.student, self.terms, self.task_weight = student, terms, task_weight
        self.model = DistillModel(student, teacher, terms, track_agreement=False) if terms else None
        self._recorder = Recorder(student, [tap for term in terms for tap in term.student_taps], "student")
        self._thread = threading.local()  # tf.distribute runs each replica on a thread of its own
        self._before: Any = None
        self._open = False

    def open(self) -> None:
        """Begin to watch the student."""
        original, self._before = self.student.call, self.student.__dict__.get("call")

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = self._recorder.watch(lambda: original(*args, **kwargs))
            inputs = args[0] if args else next(iter(kwargs.values()), None)
            for tap in self._recorder.taps:
                if tap.layer in ("", self.student):  # whose call is the one that runs already
                    call.runs[tap.layer, tap.where] = [call.output if tap.where == "output" else inputs]
            self._calls.append((inputs, call))
            return call.output

        object.__setattr__(self.student, "call", watched)  # past Keras, which would track what it is given
        self._open = True

    def close(self) -> None:
        """Stop watching."""
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
            inputs: What the teacher is called with; ``None`` is what the student was called with.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known, with features as ``DistillTargets`` carry them.

        Returns:
            A scalar.

        Raises:
            ValueError: If the student was not called while it was watched and its call is needed.
        """
        if self.model is None:
            return self.task_weight * student_loss
        seen, call = self._call_of(output)
        inputs = seen if inputs is None else inputs
        if call is None and (self._recorder.taps or (inputs is None and teacher_output is None)):
            remedy = "Call it as a model, between `on_train_begin` and `on_train_end`."
            expected = "the student to be called before `on_after_compute_loss`"
            raise ValueError(checks.message(expected, "no call of it", remedy))
        teacher = self.model.teacher
        if teacher_output is None and teacher is not None and not teacher.built:
            teacher(inputs, training=False)  # building runs the layers too, which must not be taken for a call
        step = Step(self.model, task_alone=True)  # regularisers are in the student's own loss, if the user wants them
        step.student = Call(output, {} if call is None else call.runs)
        # what stands where labels would reaches no term but CriterionTerm
        targets = student_loss if teacher_output is None else DistillTargets(student_loss, teacher_output)
        with in_step(step):
            distillation = self.model.compute_loss(x=output if inputs is None else inputs, y=targets, y_pred=output)
        self.release()
        return distillation if self.task_weight == 0 else self.task_weight * student_loss + distillation

    @property
    def _calls(self) -> collections.deque[tuple[Any, Call]]:
        """The last calls on this thread."""
        if not hasattr(self._thread, "calls"):
            self._thread.calls = collections.deque(maxlen=4)
        calls: collections.deque[tuple[Any, Call]] = self._thread.calls
        return calls

    def _call_of(self, output: Any) -> tuple[Any, Call | None]:
        """The inputs and the call that gave an output; the last call where the user has changed the output."""
        unseen: tuple[Any, Call | None] = (None, None)
        leaves = {id(leaf) for leaf in keras.tree.flatten(output)}
        calls = [*self._calls]
        own = [one for one in calls if leaves & {id(leaf) for leaf in keras.tree.flatten(one[1].output)}]
        return own[-1] if own else calls[-1] if calls else unseen
