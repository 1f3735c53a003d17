"""The teachers of a step: they run on the same batch, and are combined in the value of each term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_distill import checks, compat
from keras_distill.comparison import mean_scores
from keras_distill.functional.top_k import TopK
from keras_distill.mixed_calls import mixed, routed, rows_of, times, weights_by_confidence
from keras_distill.mixing import TeacherMix
from keras_distill.recording import Call, Recorder, Tap, probed, symbolic
from keras_distill.recording.rows import ROWS
from keras_distill.teachers import (
    AveragedTeacher,
    CallableTeacher,
    EMATeacher,
    LiveTeacher,
    OwnLayers,
    SelfTeacher,
    StoredTeacher,
    StudentAsTeacher,
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
        live: The teachers that run, with their recorders.
        numbers: Their positions among all teachers.
        cache: Position of the teacher whose outputs come with the targets, None without such a teacher.
    """

    def __init__(self, student: Recorder, dtype: str | None, hook: Callable[..., Any] | None, mix: TeacherMix) -> None:
        self.student, self.dtype, self.hook, self.mix = student, dtype, hook, mix
        self.live: list[LiveTeacher] = []
        self.numbers: list[int] = []
        self.cache: int | None = None

    @property
    def models(self) -> list[keras.Model]:
        """The models of the teachers that run."""
        return [live.model for live in self.live]

    @property
    def size(self) -> int:
        """Number of teachers."""
        return len(self.live) + (self.cache is not None)

    @property
    def depends_on_student(self) -> bool:
        """Whether a teacher changes with the student, so that its outputs cannot be stored."""
        return any(isinstance(live, StudentAsTeacher) for live in self.live)

    def can_answer(self, stored: Call | None) -> bool:
        """Whether the outputs of all teachers are known for a batch with these stored outputs."""
        return stored is not None or (bool(self.live) and self.cache is None)

    def assign(self, teachers: Sequence[Any], terms: Sequence[DistillationTerm]) -> None:
        """Use other teachers from now on.

        Args:
            teachers: Models, moving averages of the student, the student itself, and at most one cache.
            terms: The terms that read them.

        Raises:
            ValueError: If a tap does not name one layer of a teacher, or the settings do not fit the teachers.
        """
        if teachers:
            self.mix.check(len(teachers), terms)
        models = [_model_of(teacher) for teacher in teachers]
        for term in terms:
            for teacher in teachers:
                _check_network(term, teacher)
            term.in_teachers(models if any(model is not None for model in models) else [])
        live, numbers, cache = [], [], None
        for number, teacher in enumerate(teachers):
            readers = [term for term in terms if term.needs_teacher]
            taps = [tap for term in readers for tap in term.for_teacher(number).teacher_taps]
            if isinstance(teacher, StoredTeacher):
                teacher.check(taps, any(isinstance(term, LogitsDistillation) for term in readers))
                cache = number
                continue
            if isinstance(teacher, SelfTeacher) and self.hook is None:
                teacher.check_differs()
            live.append(_running(teacher, taps, self.dtype))
            numbers.append(number)
        self.live, self.numbers, self.cache = live, numbers, cache
        from_logits = any(
            isinstance(term, LogitsDistillation) and getattr(term.loss, "from_logits", None) is True for term in terms
        )
        for model in self.models:
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
            ValueError: If the inputs are unknown, the route is wrong, stored outputs stand for several teachers, or
                those of a cache among the teachers are missing.
        """
        if stored is not None:
            stored.training = student.training
        if stored is not None and self.cache is None:
            self._check_stand_in()
            return Answers([stored])
        if stored is None and self.cache is not None:
            expected = "the targets to hold the outputs of the cache, which is one of the teachers"
            raise ValueError(checks.message(expected, "labels alone", "Train on cache.attach((x, y))."))
        if stored is not None and not self.live:
            return Answers([stored])
        if x is None:
            remedy = "Pass `x`, or the student's output unchanged."
            raise ValueError(checks.message("the inputs of the batch, for the teacher", "x=None", remedy))
        teacher_of = None
        if self.mix.route is not None:
            rows = keras.tree.flatten(student.output)[0].shape[0]
            teacher_of = self.mix.teacher_of(x, self.size, rows)
        if self.hook is not None:
            x = with_call(self.hook, x, student)
        calls = [live.answer(x) for live in self.live]
        for call in calls:
            call.training = student.training
        return Answers(self._with_stored(calls, stored), teacher_of)

    def _check_stand_in(self) -> None:
        """Check that stored outputs may stand for all teachers.

        Raises:
            ValueError: If they may not.
        """
        if not self.mix.plain:
            expected = "live teachers, or a cache in the list of teachers, with `teacher_weights`, `mix` or `route`"
            remedy = "Name the cache, teacher=[cache, model], or leave these arguments out."
            raise ValueError(checks.message(expected, "the outputs of one teacher in `DistillTargets`", remedy))
        if self.depends_on_student:
            moving = next(live.teacher for live in self.live if isinstance(live, StudentAsTeacher))
            expected = f"a live teacher, because the weights of {_kind(moving)} change"
            remedy = "Train on the labels alone, or name the cache in the list of teachers."
            raise ValueError(checks.message(expected, "`DistillTargets`", remedy))

    def _with_stored(self, calls: list[Call], stored: Call | None) -> list[Call]:
        """The calls of the running teachers, with the stored one in its place."""
        if stored is None or self.cache is None:
            return calls
        if not isinstance(stored.output, TopK):
            stored.output = keras.tree.map_structure(ops.convert_to_tensor, stored.output)
        if ROWS in stored.features:  # the numbers of the examples in the data, which the cache knows, for all teachers
            for call in calls:
                call.features[ROWS] = stored.features[ROWS]
        return [*calls[: self.cache], stored, *calls[self.cache :]]

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
        if self.cache is not None and not (mix.mix == "losses" and mix.route is None and not mix.by_entropy):
            _check_all_classes(calls[self.cache], mix)
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
            if len(calls) > 1 and any(isinstance(score.teacher, TopK) for pair in pairs for score in pair):
                return []  # scores of a part of the classes cannot be averaged with scores of all
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

    def probe(self, inputs: Any, stored: Call | None = None) -> list[Call]:
        """Symbolic calls of the teachers, which have shapes and facts but no values.

        Args:
            inputs: A batch's inputs or their specifications.
            stored: The call of a teacher whose outputs are known.

        Returns:
            The calls.
        """
        hook = self.hook
        if (stored is not None and self.cache is None) or not self.live:
            return [] if stored is None else [stored]
        if hook is not None:

            def for_teacher(tensors: Any) -> Any:
                of_student = chosen_inputs(self.student.model, tensors)
                return with_call(hook, tensors, self.student.forward(of_student, training=False))

            inputs = compat.output_spec(for_teacher, symbolic(inputs))
        calls = [probed(live.recorder, chosen_inputs(live.model, inputs)) for live in self.live]
        return self._with_stored(calls, stored)


def _model_of(teacher: Any) -> keras.Model | None:
    """The model whose layers a teacher runs; None for a cache."""
    if isinstance(teacher, StoredTeacher):
        return None
    return teacher.student if isinstance(teacher, (EMATeacher, SelfTeacher)) else teacher


def _running(teacher: Any, taps: Sequence[Tap], dtype: str | None) -> LiveTeacher:
    """A teacher with its recorder."""
    if isinstance(teacher, EMATeacher):
        return AveragedTeacher(teacher, taps, dtype)
    return OwnLayers(teacher, taps, dtype) if isinstance(teacher, SelfTeacher) else LiveTeacher(teacher, taps, dtype)


def _kind(teacher: EMATeacher | SelfTeacher) -> str:
    return "a SelfTeacher" if isinstance(teacher, SelfTeacher) else "an EMATeacher"


def _check_network(term: DistillationTerm, teacher: Any) -> None:
    """Raise if a term reads or calls the layers of a teacher that has none, or whose weights change in every step."""
    if not isinstance(term, FeatureDistillation):
        return
    if term.reads_layers and isinstance(teacher, (EMATeacher, SelfTeacher)):
        expected = f"a teacher whose weights stay for term {term.name!r}, which takes numbers from its layers"
        raise ValueError(checks.message(expected, _kind(teacher), "Use another loss, or a trained teacher."))
    if term.needs_network and isinstance(teacher, StoredTeacher):
        expected = f"models as teachers for term {term.name!r}, which calls their layers"
        raise ValueError(checks.message(expected, "a cache", "Pass the model that it was built with."))


def _check_all_classes(call: Call, mix: TeacherMix) -> None:
    """Raise if a cache holds a part of the classes where the scores of all are mixed."""
    if isinstance(call.output, TopK):
        setting = "a route" if mix.route is not None else "teacher_weights='entropy'"
        setting = f"mix={mix.mix!r}" if mix.mix != "losses" else setting
        expected = f"the scores of all classes of each teacher with {setting}"
        remedy = "Build it without top_k and sampled, or use mix='losses' and numbers as weights."
        raise ValueError(checks.message(expected, "a cache that holds a part of them", remedy))
