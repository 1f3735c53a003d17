"""The teachers of a step: they run on the same batch, and are combined in the value of each term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_distill import checks, compat
from keras_distill.comparison import mean_scores
from keras_distill.mixed_calls import mixed, routed, rows_of, times, weights_by_confidence
from keras_distill.mixing import TeacherMix
from keras_distill.recording import Call, Recorder, probed, symbolic
from keras_distill.teachers import (
    AveragedTeacher,
    CallableTeacher,
    EMATeacher,
    LiveTeacher,
    chosen_inputs,
    joint_inputs,
    with_call,
)
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation
from keras_distill.terms.logits import Scores
from keras_distill.terms.weighing import scalar, weights_of_examples


class Answers(NamedTuple):
    """The teachers' calls on one batch.

    Attributes:
        calls: A call of each teacher.
        teacher_of: With a route the teacher of each example, integers ``(N,)``; else None.
    """

    calls: list[Call]
    teacher_of: Any = None


class Ensemble:
    """The teachers of one step.

    Args:
        student: Records the student, whose call the hook may read.
        dtype: Precision that the teachers compute in; None keeps their own.
        hook: Makes the teachers' inputs from the batch's; None passes them on.
        mix: How the teachers are combined.

    Attributes:
        live: The teachers with their recorders.
    """

    def __init__(self, student: Recorder, dtype: str | None, hook: Callable[..., Any] | None, mix: TeacherMix) -> None:
        self.student, self.dtype, self.hook, self.mix = student, dtype, hook, mix
        self.live: list[LiveTeacher] = []

    @property
    def models(self) -> list[keras.Model]:
        """The teachers."""
        return [live.model for live in self.live]

    def assign(self, teachers: Sequence[Any], terms: Sequence[DistillationTerm]) -> None:
        """Use other teachers from now on.

        Args:
            teachers: Models and moving averages of the student.
            terms: The terms that read them.

        Raises:
            ValueError: If a tap does not name one layer of a teacher, or the settings do not fit the teachers.
        """
        models = [teacher.student if isinstance(teacher, EMATeacher) else teacher for teacher in teachers]
        if models:
            self.mix.check(len(models), terms)
        for term in terms:
            if any(isinstance(teacher, EMATeacher) for teacher in teachers):
                _check_layers_stay(term)
            term.in_teachers(models)
        self.live = []
        for number, teacher in enumerate(teachers):
            taps = [tap for term in terms for tap in term.for_teacher(number).teacher_taps]
            kind: Any = AveragedTeacher if isinstance(teacher, EMATeacher) else LiveTeacher
            self.live.append(kind(teacher, taps, self.dtype))
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

    def answers(self, x: Any, student: Call, stored: Call | None) -> Answers:
        """The teachers' calls on a batch.

        Args:
            x: The batch's inputs.
            student: The student's call.
            stored: The teacher's call, if its outputs are known already.

        Returns:
            The calls.

        Raises:
            ValueError: If the inputs are unknown, the route is wrong, or stored outputs stand for several teachers.
        """
        if stored is not None:
            if not self.mix.plain:
                expected = "live teachers with `teacher_weights`, `mix` or `route`"
                remedy = "Leave these arguments out."
                raise ValueError(checks.message(expected, "the outputs of one teacher in `DistillTargets`", remedy))
            if any(isinstance(live, AveragedTeacher) for live in self.live):
                expected = "a live teacher, because the weights of an EMATeacher change"
                raise ValueError(checks.message(expected, "`DistillTargets`", "Train on the labels alone."))
            stored.training = student.training
            return Answers([stored])
        if x is None:
            remedy = "Pass `x`, or the student's output unchanged."
            raise ValueError(checks.message("the inputs of the batch, for the teacher", "x=None", remedy))
        teacher_of = None
        if self.mix.route is not None:
            rows = keras.tree.flatten(student.output)[0].shape[0]
            teacher_of = self.mix.teacher_of(x, len(self.live), rows)
        if self.hook is not None:
            x = with_call(self.hook, x, student)
        calls = [live.answer(x) for live in self.live]
        for call in calls:
            call.training = student.training
        return Answers(calls, teacher_of)

    def value(self, term: DistillationTerm, student: Call, answers: Answers, labels: Any, weights: Any) -> Any:
        """The value of a term for all teachers together.

        Args:
            term: The term.
            student: The student's call.
            answers: The teachers' calls; empty if no term reads a teacher.
            labels: The batch's labels, or None.
            weights: The batch's sample weights, or None.

        Returns:
            A scalar.
        """
        calls, mix = answers.calls, self.mix

        def value_of(call: Call, number: int = 0, weights: Any = weights) -> Any:
            part = term.for_teacher(number)
            return scalar(part.compute(student, call, labels=labels, sample_weight=weights))

        if not term.needs_teacher:
            return value_of(student)
        if len(calls) == 1:
            return value_of(calls[0])
        if mix.route is not None:
            if isinstance(term, FeatureDistillation) and term.own_parts:
                return self._routed_parts(term, answers, weights, value_of)
            return value_of(routed(term, calls, answers.teacher_of))
        if isinstance(term, LogitsDistillation) and mix.mix != "losses":
            return value_of(mixed(term, student, calls, mix))
        if isinstance(term, LogitsDistillation) and mix.by_entropy:
            by_teacher = weights_by_confidence(term, student, calls, weights)
            return sum(value_of(call, number, by_teacher[number]) for number, call in enumerate(calls))
        values = [value_of(call, number) for number, call in enumerate(calls)]
        if mix.weights is None:
            return sum(values) / len(values)
        shares = ops.unstack(mix.shares(len(calls)), len(calls))
        pairs = [(ops.cast(share, value.dtype), value) for share, value in zip(shares, values, strict=True)]
        return sum(ops.where(share > 0, share * value, ops.zeros_like(value)) for share, value in pairs)

    def scores(
        self, terms: Sequence[DistillationTerm], student: Call, answers: Answers, labels: Any, weights: Any
    ) -> list[Scores]:
        """Logits of the student and of the teachers together, from the first term on class scores.

        Args:
            terms: The terms.
            student: The student's call.
            answers: The teachers' calls, at least one.
            labels: The batch's labels.
            weights: The batch's sample weights.

        Returns:
            One entry for each output that the term compares; empty if no term compares class scores.
        """
        mix = self.mix
        for term in terms:
            if not isinstance(term, LogitsDistillation):
                continue
            calls = answers.calls
            if len(calls) > 1 and mix.route is not None:
                calls = [routed(term, calls, answers.teacher_of)]
            elif len(calls) > 1 and mix.mix != "losses":
                calls = [mixed(term, student, calls, mix)]
            pairs = list(zip(*(term.scores(student, call, weights, labels) for call in calls), strict=True))
            if pairs:
                shares = mix.shares(len(calls)) if len(calls) > 1 and not mix.by_entropy else None
                return [pair[0]._replace(teacher=mean_scores(pair, shares)) for pair in pairs]
        return []

    def _routed_parts(
        self, term: FeatureDistillation, answers: Answers, weights: Any, value_of: Callable[..., Any]
    ) -> Any:
        """The sum of each teacher's loss on its own examples, where each teacher has adapters of its own."""
        self.mix.check_routed_parts(term)
        weights = weights_of_examples(weights)
        teacher_of, total = answers.teacher_of, 0.0
        for number, call in enumerate(answers.calls):
            rows = teacher_of == number
            factor = times(weights, ops.cast(rows, "float32"))
            total = total + value_of(rows_of(call, term.for_teacher(number), rows), number, factor)
        known = ops.all((teacher_of >= 0) & (teacher_of < len(answers.calls)))
        return ops.where(known, total, ops.full_like(total, float("nan")))

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


def _check_layers_stay(term: DistillationTerm) -> None:
    """Raise if a term takes numbers from layers of a teacher whose weights change in every step."""
    if isinstance(term, FeatureDistillation) and term.reads_layers:
        expected = f"a teacher whose weights stay for term {term.name!r}, which takes numbers from its layers"
        raise ValueError(checks.message(expected, "an EMATeacher", "Use another loss, or a trained teacher."))
