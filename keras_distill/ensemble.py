"""The teachers of a step: they run on the same batch, and their losses are averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.recording import Call, Recorder, probed, symbolic
from keras_distill.teachers import CallableTeacher, LiveTeacher, chosen_inputs, joint_inputs, with_call
from keras_distill.terms import DistillationTerm, LogitsDistillation


class Ensemble:
    """The teachers of one step.

    Args:
        student: Records the student, whose call the hook may read.
        dtype: Precision that the teachers compute in; None keeps their own.
        hook: Makes the teachers' inputs from the batch's; None passes them on.

    Attributes:
        live: The teachers with their recorders.
    """

    def __init__(self, student: Recorder, dtype: str | None, hook: Callable[..., Any] | None) -> None:
        self.student, self.dtype, self.hook = student, dtype, hook
        self.live: list[LiveTeacher] = []

    @property
    def models(self) -> list[keras.Model]:
        """The teachers."""
        return [live.model for live in self.live]

    def assign(self, models: Sequence[keras.Model], terms: Sequence[DistillationTerm]) -> None:
        """Use other teachers from now on.

        Args:
            models: The teachers.
            terms: The terms that read them.
        """
        taps = [tap for term in terms for tap in term.teacher_taps]
        self.live = [LiveTeacher(model, taps, self.dtype) for model in models]
        from_logits = any(
            isinstance(term, LogitsDistillation) and getattr(term.loss, "from_logits", None) is True for term in terms
        )
        for model in models:
            if isinstance(model, CallableTeacher):
                model.expects_logits = from_logits

    def joint_inputs(self, inputs: Any) -> Any:
        """The student's symbolic inputs with those that only a teacher has, or None if a model does not know them."""
        any_inputs = (CallableTeacher,)
        known = all(isinstance(model, any_inputs) or compat.input_structure(model) is not None for model in self.models)
        return joint_inputs(inputs, self.models) if inputs is not None and known else None

    def calls(self, x: Any, student: Call) -> list[Call]:
        """Run every teacher on a batch.

        Args:
            x: The batch's inputs.
            student: The student's call.

        Returns:
            The teachers' calls.

        Raises:
            ValueError: If the inputs are unknown.
        """
        if x is None:
            remedy = "Pass `x`, or the student's output unchanged."
            raise ValueError(checks.message("the inputs of the batch, for the teacher", "x=None", remedy))
        if self.hook is not None:
            x = with_call(self.hook, x, student)
        return [live.answer(x) for live in self.live]

    def probe(self, inputs: Any) -> list[Call]:
        """Symbolic calls of the teachers, which have shapes and facts but no values.

        Args:
            inputs: A batch's inputs or their specifications.

        Returns:
            The calls.
        """
        hook = self.hook
        if hook is not None:

            def for_teacher(tensors: Any) -> Any:
                return with_call(hook, tensors, self.student.forward(tensors, training=False))

            inputs = compat.output_spec(for_teacher, symbolic(inputs))
        return [probed(live.recorder, chosen_inputs(live.model, inputs)) for live in self.live]
