"""DistillStep: the models, terms and adapters of one distillation step, for ``fit`` and for a custom training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.balancing import check_balanced, measured_weights, taped
from keras_distill.building import BuildsTerms
from keras_distill.comparison import StepLosses
from keras_distill.ensemble import Answers, Ensemble
from keras_distill.mixing import TeacherMix
from keras_distill.recording import Call, Recorder
from keras_distill.schedules import Progress, Schedule
from keras_distill.states import NumbersState
from keras_distill.teachers import EMATeacher, as_teachers, checked_dtype, chosen_inputs
from keras_distill.terms import DistillationTerm, as_terms


class DistillStep(BuildsTerms):
    """One step of distillation: it records the student, runs the teacher and computes the terms.

    :class:`DistillModel` delegates to it. In a custom training loop, call the student while the step watches::

        step = DistillStep(student, teacher, terms)
        with tf.GradientTape() as tape, step.watching():
            output = student(x, training=True)
            loss = task_loss(y, output) + step.losses(output, labels=y)["distillation_loss"]
        variables = student.trainable_variables + step.trainable_variables

    Args:
        student: The model that is trained.
        teacher: A model, or several models, over which each term is averaged. None if no term needs a teacher, or if
            :meth:`losses` is called with the teacher's outputs.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``. The step makes copies that share the settings, so a
            term can be used in several steps.
        teacher_dtype: Precision that the teacher computes in, such as ``"bfloat16"``; None keeps the model's own.
        teacher_inputs: Called with the batch's inputs and, if it takes a second argument, the student's call; returns
            the teacher's inputs. With None the teacher gets the student's inputs.
        teacher_weights: As for :class:`DistillModel`, like ``mix``.
        mix: The kind of the average.
        route: As for :class:`DistillModel`; the inputs are those that :meth:`losses` gets as ``x``.

    Attributes:
        student: The student.
        terms: The step's own terms.
        states: The numbers and weights of these terms, and the weights of the teachers, as layers.
        recorder: Records the student.
        ensemble: The teachers.
        averages: Those of them that are moving averages of the student.
        working_names: Names of the terms in the graph that is being traced or run, None outside of such graphs.
        behind: The layers behind the student's taps, by the key of the tap.
        version: Counts the teachers that were assigned: a graph of an earlier teacher must not be used again.

    Raises:
        TypeError: If the teacher is not a Keras model, or an entry of ``terms`` is not a term.
        ValueError: If the teacher is the student, terms share a name, or a layer is unknown.

    Example:
        >>> student, teacher = (keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]) for _ in range(2))
        >>> step = DistillStep(student, teacher)
        >>> with step.watching():
        ...     output = student(ops.ones((2, 4)))
        >>> sorted(step.losses(output))
        ['distillation_loss', 'logits_loss']
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any = None,
        terms: DistillationTerm | Sequence[DistillationTerm] | None = None,
        *,
        teacher_dtype: Any = None,
        teacher_inputs: Callable[..., Any] | None = None,
        teacher_weights: Sequence[float | Schedule] | str | None = None,
        mix: str = "losses",
        route: str | int | Callable[[Any], Any] | None = None,
    ) -> None:
        self.student, self.teacher_dtype = student, checked_dtype(teacher_dtype)
        self.terms = [term.owned(student) for term in as_terms(terms)]
        combination = TeacherMix(teacher_weights, mix, route)
        teachers = [
            each.owned(student, number) if isinstance(each, EMATeacher) else each
            for number, each in enumerate(as_teachers(teacher, student))
        ]
        self.averages = [each for each in teachers if isinstance(each, EMATeacher)]
        averages = (average.state for average in self.averages)
        states = [*(term.state for term in self.terms), combination.state, *averages]
        self.states: list[NumbersState] = [state for state in states if state is not None]
        taps = [tap for term in self.terms for tap in (*term.student_taps, *term.student_values)]
        self.recorder = Recorder(student, taps, "student")
        self.ensemble = Ensemble(self.recorder, self.teacher_dtype, teacher_inputs, combination)
        self.working_names: tuple[str, ...] | None = None
        self.version = 0
        self._advanced = False
        self.behind: dict[str, Any] = {}
        self._teachers: list[Any] = []
        self._assign(teachers)
        check_balanced(self.terms, self.averages)
        self.build_from_models()

    @property
    def teacher(self) -> Any:
        """The teacher, a list of several teachers, or None. It can be replaced at any time by assignment.

        In a list with an :class:`EMATeacher` or a :class:`SelfTeacher` a None stands for one that is still to be set.
        """
        return list(self._teachers) if len(self._teachers) > 1 else next(iter(self._teachers), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self._assign(as_teachers(teacher, self.student, self.averages))
        self.build_from_models()  # a graph that makes weights and then fails would leave them without values

    def update_teacher(self, stepped: Any = True) -> None:
        """Move an :class:`EMATeacher` towards the student: call it after each step of the optimizer in your own loop.

        Args:
            stepped: Whether the optimizer has changed the weights, a bool or a scalar tensor.
        """
        for average in self.averages:
            average.update(stepped)

    def named_averages(self) -> dict[str, EMATeacher]:
        """The moving averages by their names in the logs, ``"teacher"`` or, in a list, ``"teacher_<position>"``."""
        several = len(self._teachers) > 1
        return {
            f"teacher_{number}" if several else "teacher": each
            for number, each in enumerate(self._teachers)
            if isinstance(each, EMATeacher)
        }

    def _owners(self) -> list[Any]:
        """The objects whose settings may have schedules."""
        return [*self.terms, self.ensemble.mix, *self.averages]

    def _assign(self, teachers: list[Any]) -> None:
        self.version += 1
        try:
            self._use(teachers)
            self._check_teacher()
        except BaseException:  # keep the teacher that fits
            self._use(self._teachers)
            raise
        self._teachers = teachers

    def _use(self, teachers: list[Any]) -> None:
        """Run these teachers from now on, or none as long as one of them is still to be set."""
        self.ensemble.assign([] if None in teachers else teachers, self.terms)

    @property
    def trainable_variables(self) -> list[Any]:
        """Weights of adapters and learned losses; they exist once the terms are built."""
        return [variable for state in self.states for variable in state.trainable_variables]

    @property
    def built(self) -> bool:
        """Whether every term has made its adapters."""
        return all(term.built for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term reads the teacher."""
        return any(term.needs_teacher for term in self.terms)

    def signature(self, training: bool = True) -> tuple[Any, ...]:
        """Key of a traced step: it changes when the step must be traced again.

        Args:
            training: Whether it is a training step, in which terms of weight 0 are skipped.

        Returns:
            The version, then the traced settings of each computed term.
        """
        working = (term for term in self.terms if term.weight != 0 or not training)
        return (self.version, *((*term.traced_settings(), training and term.measuring) for term in working))

    def watching(self, everywhere: bool = False) -> contextlib.AbstractContextManager[Any]:
        """A context in which calls of the student are recorded, so that :meth:`losses` can read its inner layers.

        Args:
            everywhere: Whether calls on other threads are recorded too, such as those of ``tf.distribute`` replicas.
        """
        contexts = contextlib.ExitStack()
        contexts.enter_context(self.recorder.watching(everywhere))
        contexts.enter_context(self.taped())
        return contexts

    def taped(self) -> contextlib.AbstractContextManager[None]:
        """A context around the student's call and its losses, in which balanced weights can be measured eagerly."""
        return taped(any(term.measuring for term in self.terms))

    def forward(self, inputs: Any, training: bool | None) -> Any:
        """Call the student and record the call.

        Args:
            inputs: The batch's inputs.
            training: Whether dropout and batch normalisation train; with ``None`` Keras decides.

        Returns:
            The student's output.
        """
        with self.recorder.watching():
            return self.student(chosen_inputs(self.student, inputs), training=training)

    def advance(self, step: int, epoch: int | None = None, fraction: float | None = None) -> None:
        """Set the scheduled weights and temperatures before a step of your own loop. ``fit`` sets them itself.

        Args:
            step: Optimizer steps made so far.
            epoch: The epoch, from 0, for schedules over epochs.
            fraction: Share of the whole training, from 0 to 1, for schedules over it.

        Raises:
            ValueError: If a schedule needs a position that is not passed.
        """
        progress = Progress(step, epoch, fraction)
        for owner in self._owners():
            for name, schedule in owner.schedules.items():
                owner.follow(name, schedule.at(progress))
        if self.ensemble.mix.state is not None:
            self.ensemble.mix.state.sync()
        self.begin(step)
        self._advanced = True

    def begin(self, step: int) -> None:
        """Fix the balanced weights that have been measured in all their steps.

        Args:
            step: Optimizer steps made so far.

        Raises:
            ValueError: If no gradient could be measured.
        """
        for term in self.terms:
            if term.measuring:
                term.state.balance.begin(step)  # type: ignore[union-attr]

    def losses(
        self,
        output: Any,
        x: Any = None,
        labels: Any = None,
        sample_weight: Any = None,
        *,
        teacher: Call | None = None,
        training: bool = True,
        task_loss: Any = None,
    ) -> dict[str, Any]:
        """The terms' values for one call of the student.

        Args:
            output: The student's output of a call that was recorded.
            x: Inputs of the teacher; with None it gets the student's inputs.
            labels: The batch's labels, for terms that need them.
            sample_weight: The batch's sample weights.
            teacher: The teacher's call, if its outputs are known already; the teacher then does not run.
            training: Whether the student is trained; terms of weight 0 are then skipped.
            task_loss: The student's own loss, if a weight is balanced; it is not added.

        Returns:
            ``"distillation_loss"``, the weighted sum, and ``"<term>_loss"`` for each computed term.

        Raises:
            ValueError: If the teacher or a call of :meth:`advance` is missing, or ``output`` was not recorded.
        """
        if training and not self._advanced and any(owner.schedules for owner in self._owners()):
            expected = "a call of `advance` before a training step, because a setting has a schedule"
            raise ValueError(checks.message(expected, "none", "Call step.advance(number_of_steps_so_far)."))
        compared = self.compare(
            output, x, labels, sample_weight, teacher=teacher, training=training, task_loss=task_loss
        )
        values = {f"{name}_loss": value for name, value in compared.values.items()}
        return {"distillation_loss": compared.total, **values}

    def compare(
        self,
        output: Any,
        x: Any = None,
        labels: Any = None,
        sample_weight: Any = None,
        *,
        student: Call | None = None,
        teacher: Call | None = None,
        training: bool = True,
        with_scores: bool = False,
        task_loss: Any = None,
        position: Any = None,
    ) -> StepLosses:
        """As :meth:`losses`, but also with the class scores of the two models.

        Args:
            output: The student's output.
            x: As for :meth:`losses`.
            labels: As for :meth:`losses`.
            sample_weight: As for :meth:`losses`.
            student: The student's call; None takes the one that is attached to the output.
            teacher: As for :meth:`losses`.
            training: As for :meth:`losses`.
            with_scores: Whether the class scores are returned too.
            task_loss: As for :meth:`losses`.
            position: Optimizer steps so far, a scalar; None takes that of :meth:`advance`.

        Returns:
            The losses.

        Raises:
            ValueError: As for :meth:`losses`.
        """
        terms = self._working(training)
        dtype = keras.backend.result_type(keras.config.floatx(), "float32")  # TensorFlow adds no float32 to a float64
        zero = ops.zeros((), dtype)
        if not terms and self.built:
            return StepLosses(zero, {})
        student, x = self._student_call(output, x, student, terms, training)
        reads_teacher = any(term.needs_teacher for term in terms)
        if teacher is None and reads_teacher and not self.ensemble.size:
            remedy = "Pass teacher=..., set `model.teacher`, or train on DistillTargets(labels, teacher)."
            raise ValueError(checks.message("a teacher to learn from", f"teacher={self.teacher!r}", remedy))
        if x is not None:
            self.build(x, teacher)
        elif not self.built:  # the inputs are unknown
            waiting = [t for t in self.terms if not t.built and (teacher is not None or not t.needs_teacher)]
            self._build_terms(waiting, student, [student if teacher is None else teacher])
        if not terms:  # those that rest have been built too, so that an optimizer knows their weights
            return StepLosses(zero, {})
        answers = self.ensemble.answers(x, student, teacher) if reads_teacher else Answers([])
        total, values = zero, {}
        for term in terms:
            weights = sample_weight if term.use_sample_weight else None
            values[term.name] = ops.cast(self.ensemble.value(term, student, answers, labels, weights), dtype)
        measured = measured_weights(terms, student, values, task_loss, position) if training else {}
        for term in terms:
            weight, value = term.state.number("weight"), values[term.name]  # type: ignore[union-attr]
            weight = ops.cast(measured.get(term.name, weight), dtype)
            # in evaluation, and in a graph that the user traces, the weight may be 0: 0 times infinity would be NaN
            total = total + ops.where(weight > 0, weight * value, zero)
        scores = None
        if with_scores and answers.calls:
            scores = self.ensemble.scores(self.terms, student, answers, labels, sample_weight)
        return StepLosses(total, values, scores)

    def _working(self, training: bool) -> list[DistillationTerm]:
        """The terms to compute: in evaluation all of them, in training those whose weight is not 0.

        A graph that a user traces keeps its set of terms forever: it computes all of them, also those of weight 0.
        """
        if not training:
            return [term for term in self.terms if not term.trains_only]
        names = self.working_names
        if names is None:
            if not backends.executes_eagerly():
                return self.terms
            names = tuple(term.name for term in self.terms if term.weight != 0)
        return [term for term in self.terms if term.name in names]

    def _student_call(
        self, output: Any, x: Any, student: Call | None, terms: Sequence[DistillationTerm], training: bool
    ) -> tuple[Call, Any]:
        if student is None:
            record = self.recorder.record_of(output)
            if record is None and any(term.student_taps for term in terms):
                expected = "the output that the student returned in this step, for terms that read its layers"
                remedy = "Pass the model's output to `compute_loss` unchanged, or call super().train_step(...)."
                raise ValueError(checks.message(expected, "a tensor that no recorded call has returned", remedy))
            student = self.recorder.call_of(output, record)
            x = record.inputs if x is None and record is not None else x
        student.inputs, student.training = student.inputs if x is None else x, training
        student.decided = self.working_names is not None or backends.executes_eagerly()
        return student, x
