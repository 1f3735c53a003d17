"""DistillStep: one owner of everything that a step of distillation needs, for ``fit`` and for a loop of your own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.agreement import agreement_of
from keras_distill.recording import Call, Recorder, probed
from keras_distill.teachers import LiveTeacher, as_teachers, checked_dtype, chosen_inputs
from keras_distill.terms import DistillationTerm, TermState, as_terms
from keras_distill.terms.weighing import scalar


class StepLosses(NamedTuple):
    """Scalars of one step.

    Attributes:
        total: The weighted sum of the values.
        values: The value of each term that works, without its weight, by the name of the term.
        agreement: Share of the rows where student and teacher choose the same class, or None.
        rows: Number of those rows, or None.
    """

    total: Any
    values: dict[str, Any]
    agreement: Any = None
    rows: Any = None


class DistillStep:
    """One step of distillation: the student's recording, the teacher's answer, the terms and what they train.

    :class:`DistillModel` delegates to it. In a loop of your own, call the student while the step watches::

        step = DistillStep(student, teacher, terms)
        with tf.GradientTape() as tape, step.watching():
            output = student(x, training=True)
            loss = task_loss(y, output) + step.losses(output, labels=y)["distillation_loss"]
        variables = student.trainable_variables + step.trainable_variables

    Args:
        student: The model that is trained.
        teacher: A model, several models, over which each term is averaged, or None where no term reads it or its
            outputs are given.
        terms: What the student imitates; ``None`` is ``[LogitsDistillation()]``. The step makes copies that share the
            settings: a term may serve several steps.
        teacher_dtype: Precision that the teacher computes in, such as ``"bfloat16"``; None leaves it to the model.
        teacher_inputs: Called with the batch's inputs and, if it takes a second argument, the student's call; returns
            the teacher's inputs. None shows the teacher what the student is shown.

    Attributes:
        student: The student.
        terms: The step's own terms.
        states: What is trained and saved of them, a layer for each.

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
    ) -> None:
        self.student, self.teacher_dtype = student, checked_dtype(teacher_dtype)
        self.terms = [term.owned(student) for term in as_terms(terms)]
        self.states: list[TermState] = [term.state for term in self.terms if term.state is not None]
        self.recorder = Recorder(student, [tap for term in self.terms for tap in term.student_taps], "student")
        self.teacher_inputs = teacher_inputs
        # set while a graph that Python has chosen is traced or run: the terms that are in it
        self.working_names: tuple[str, ...] | None = None
        self.version = 0
        self._behind: dict[str, Any] = {}  # layers behind the student's taps, by the key of the tap
        self.teachers: list[LiveTeacher] = []
        self.teacher = teacher
        self.build_from_models()

    @property
    def teacher(self) -> Any:
        """The teacher, a list of several, or None; another may be assigned at any time."""
        models = [live.model for live in self.teachers]
        return models if len(models) > 1 else next(iter(models), None)

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        models = as_teachers(teacher, self.student)
        for term in self.terms:
            term.in_teacher(models[0] if models else None)
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        self.teachers = [LiveTeacher(model, taps, self.teacher_dtype) for model in models]
        self.version += 1  # graphs hold the teacher
        self._check_teacher()

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
        """What a graph of a step depends on in Python: which terms work, their fixed settings, the teacher.

        Args:
            training: Whether it is a step of training, in which terms of weight 0 are skipped.
        """
        working = (term for term in self.terms if term.weight != 0 or not training)
        return (self.version, *(term.traced_settings() for term in working))

    def watching(self, everywhere: bool = False) -> contextlib.AbstractContextManager[None]:
        """A context in which calls of the student are recorded, so that :meth:`losses` knows its inner layers.

        Args:
            everywhere: Whether calls on other threads are recorded too, as replicas of ``tf.distribute`` make them.
        """
        return self.recorder.watching(everywhere)

    def forward(self, inputs: Any, training: bool | None) -> Any:
        """The student's output for some inputs, recorded."""
        with self.watching():
            return self.student(chosen_inputs(self.student, inputs), training=training)

    def build(self, inputs: Any, teacher: Call | None = None) -> None:
        """Make the adapters; errors of layouts, of logits and of shapes come here.

        Args:
            inputs: A batch's inputs or their specifications.
            teacher: The teacher's call, where its outputs are given.
        """
        knows_teacher = teacher is not None or bool(self.teachers)
        waiting = [term for term in self.terms if not term.built and (knows_teacher or not term.needs_teacher)]
        if not waiting:
            return
        student = probed(self.recorder, chosen_inputs(self.student, inputs))
        if teacher is None and self.teachers and any(term.needs_teacher for term in waiting):
            teacher = self._probed_teacher(inputs)
        self._build_terms(waiting, student, teacher)

    def build_from_models(self) -> None:
        """Build where student and teachers know their inputs already, so that errors come when the model is made."""
        inputs = compat.input_structure(self.student)
        if inputs is not None and all(compat.input_structure(live.model) is not None for live in self.teachers):
            self.build(self._all_inputs(inputs))

    def build_from_config(self, configs: Mapping[str, Any]) -> None:
        """Make the adapters of a saved model.

        Args:
            configs: What the terms need, by their names.
        """
        for term in self.terms:
            if not term.built and term.name in configs:
                if configs[term.name] is not None:
                    term.build_from_shapes(configs[term.name])
                self._adopt(term)

    def check_trained(self) -> None:
        """Raise if no term moves the student: adapters on frozen layers would learn alone, and their loss would fall.

        Raises:
            ValueError: If every term reads layers that are frozen with all layers behind them, as far as is known.
        """
        taps = [tap for term in self.terms for tap in term.trained_taps or (None,)]
        behind = [None if tap is None else self._behind.get(tap.key) for tap in taps]
        if all(layers and not any(layer.trainable_variables for layer in layers) for layers in behind):
            names = ", ".join(repr(tap.name) for tap in taps if tap is not None)
            expected = "a term, or a loss on labels, that trains the student"
            remedy = "Unfreeze a layer, name one after the frozen ones, or pass a loss to `compile`."
            raise ValueError(checks.message(expected, f"terms on {names} alone, frozen with all layers before", remedy))

    def losses(
        self,
        output: Any,
        x: Any = None,
        labels: Any = None,
        sample_weight: Any = None,
        *,
        teacher: Call | None = None,
        training: bool = True,
    ) -> dict[str, Any]:
        """The terms' values for one call of the student.

        Args:
            output: What the student returned while the step was watching.
            x: Inputs of the teacher; None shows it the student's.
            labels: The batch's labels, for terms that need them.
            sample_weight: The batch's weights.
            teacher: The teacher's call, if it is known: the teacher then does not run.
            training: Whether the student is trained; terms of weight 0 are then skipped.

        Returns:
            ``"distillation_loss"``, the weighted sum, and ``"<term>_loss"`` for each term that works.

        Raises:
            ValueError: If there is no teacher, or ``output`` is not a recorded output of the student.
        """
        compared = self.compare(output, x, labels, sample_weight, teacher=teacher, training=training)
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
        track_agreement: bool = False,
    ) -> StepLosses:
        """As :meth:`losses`, with the agreement of the two models.

        Args:
            output: What the student returned.
            x: Inputs of the teacher; None shows it the student's.
            labels: The batch's labels.
            sample_weight: The batch's weights.
            student: The student's call, where it does not hang on the output.
            teacher: The teacher's call, if it is known.
            training: Whether the student is trained.
            track_agreement: Whether the agreement is computed.

        Returns:
            The scalars.
        """
        terms = self._working(training)
        dtype = keras.backend.result_type(keras.config.floatx(), "float32")  # TensorFlow adds no float32 to a float64
        zero = ops.zeros((), dtype)
        if not terms:
            return StepLosses(zero, {})
        student, x = self._student_call(output, x, student, terms, training)
        reads_teacher = any(term.needs_teacher for term in terms)
        if teacher is None and reads_teacher and not self.teachers:
            remedy = "Pass teacher=..., set `model.teacher`, or train on DistillTargets(labels, teacher)."
            raise ValueError(checks.message("a teacher to learn from", "teacher=None", remedy))
        if x is not None:
            self.build(x, teacher)
        elif not all(term.built for term in terms):
            self._build_from(student, teacher)
        calls = self._teacher_calls(x, student, teacher) if reads_teacher else []
        total, values = zero, {}
        for term in terms:
            weights = sample_weight if term.use_sample_weight else None
            sources = calls if term.needs_teacher else [student]
            each = [
                ops.cast(scalar(term.compute(student, call, labels=labels, sample_weight=weights)), dtype)
                for call in sources
            ]
            value = sum(each) / len(each) if len(each) > 1 else each[0]
            weight = ops.cast(term.state.number("weight"), dtype)  # type: ignore[union-attr]
            values[term.name] = value
            # in a graph that the user traces, or in evaluation, the weight may be 0 and the value infinite
            total = total + ops.where(weight > 0, weight * value, zero)
        share, rows = agreement_of(self.terms, student, calls) if track_agreement and calls else (None, None)
        return StepLosses(total, values, share, rows)

    def _working(self, training: bool) -> list[DistillationTerm]:
        """The terms that are computed: in evaluation all, in training those whose weight is not 0.

        A graph that a user traces would keep today's set for ever: there all work, and a weight of 0 is multiplied.
        """
        if not training:
            return self.terms
        names = self.working_names
        if names is None:
            if not backends.executes_eagerly():
                return self.terms
            names = tuple(term.name for term in self.terms if term.weight != 0)
        return [term for term in self.terms if term.name in names]

    def _check_teacher(self) -> None:
        """Raise if a new teacher does not fit the adapters, where both models know their inputs."""
        built = [term for term in self.terms if term.built and term.needs_teacher]
        inputs = compat.input_structure(self.student)
        known = all(compat.input_structure(live.model) is not None for live in self.teachers)
        if built and inputs is not None and self.teachers and known and self.teacher_inputs is None:
            student, teacher = probed(self.recorder, inputs), self._probed_teacher(self._all_inputs(inputs))
            for term in built:
                term.check_calls(student, teacher)

    def _student_call(
        self, output: Any, x: Any, student: Call | None, terms: Sequence[DistillationTerm], training: bool
    ) -> tuple[Call, Any]:
        if student is None:
            record = self.recorder.record_of(output)
            if record is None and any(term.student_taps for term in terms):
                expected = "the output that the student returned in this step, for terms that read its layers"
                remedy = (
                    "Give `compute_loss` what calling the model returned, unchanged; or call super().train_step(...)."
                )
                raise ValueError(checks.message(expected, "a tensor that no recorded call of it has returned", remedy))
            student = self.recorder.call_of(output, record)
            x = record.inputs if x is None and record is not None else x
        student.training = training
        student.decided = self.working_names is not None or backends.executes_eagerly()
        return student, x

    def _teacher_calls(self, x: Any, student: Call, teacher: Call | None) -> list[Call]:
        if teacher is not None:
            teacher.training = student.training
            return [teacher]
        if x is None:
            expected = "the inputs of the batch, for the teacher"
            raise ValueError(checks.message(expected, "x=None", "Pass `x`, or the student's output unchanged."))
        if self.teacher_inputs is not None:
            x = _with_call(self.teacher_inputs, x, student)
        return [live.answer(x) for live in self.teachers]

    def _all_inputs(self, inputs: Any) -> Any:
        """The student's inputs, and those that only a teacher has: the data has both."""
        structures = [compat.input_structure(live.model) for live in self.teachers]
        named = {key: one for each in structures if isinstance(each, dict) for key, one in each.items()}
        own = inputs if isinstance(inputs, dict) else {one.name: one for one in keras.tree.flatten(inputs)}
        more = set(named) - set(own) and isinstance(inputs, (dict, keras.KerasTensor))
        return {**named, **own} if more else inputs

    def _probed_teacher(self, inputs: Any) -> Call:
        hook, live = self.teacher_inputs, self.teachers[0]
        if hook is not None:
            inputs = keras.tree.map_structure(
                lambda tensor: keras.KerasTensor(tensor.shape, keras.backend.standardize_dtype(tensor.dtype)), inputs
            )

            def shown(symbolic: Any) -> Any:
                return _with_call(hook, symbolic, self.recorder.forward(symbolic, training=False))

            inputs = compat.output_spec(shown, inputs)
        return probed(live.recorder, chosen_inputs(live.model, inputs))

    def _build_from(self, student: Call, teacher: Call | None) -> None:
        """Make the adapters from calls, where no inputs are given to infer them from."""
        for term in self.terms:
            if not term.built and (teacher is not None or not term.needs_teacher):
                self._build_terms([term], student, teacher)

    def _build_terms(self, terms: Sequence[DistillationTerm], student: Call, teacher: Call | None) -> None:
        for term in terms:
            term.build_from_calls(student, student if teacher is None else teacher)
            self._adopt(term)
            for tap in term.trained_taps:
                self._behind[tap.key] = student.facts_of(student.feature(tap)).behind

    def _adopt(self, term: DistillationTerm) -> None:
        term.built = True
        if term.state is not None:
            term.state.adopt()


def _with_call(hook: Callable[..., Any], inputs: Any, call: Call) -> Any:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(hook).parameters.values()
    several = sum(one.kind in kinds for one in parameters) > 1
    several = several or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    return hook(inputs, call) if several else hook(inputs)
