"""DistillModel: a student that learns from a teacher in ``compile`` and ``fit``."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.cache.data import check_class_weight, epoch_tellers
from keras_distill.callbacks import schedule_followers, with_callbacks
from keras_distill.comparison import compare
from keras_distill.metrics import LossParts
from keras_distill.probe import probed
from keras_distill.schedules import Schedule, add_setting, deserialized, first_value, serialized, set_setting
from keras_distill.steps import Step, current_step, in_step
from keras_distill.taps import Call, Recorder
from keras_distill.targets import DistillTargets, carries_features, split_targets, weights_of
from keras_distill.term import DistillationTerm
from keras_distill.terms import as_terms


@keras.saving.register_keras_serializable(package="keras_distill")
class DistillModel(keras.Model):
    r"""A student that learns from a teacher, trained like any Keras model.

    .. math:: L = w_{task} L_{task} + \sum_i w_i D_i(A_i(F^s_i), F^t_i) + R

    L_task is the loss given to ``compile``, D_i are the distances of the terms, A_i their adapters, and R the student's
    regularisers at full weight. The model predicts, and is called, as the student. The teacher runs in inference mode,
    without gradient; it is no part of this model: neither counted, nor changed, nor saved.

    The logs hold ``loss``, ``task_loss``, ``distillation_loss``, ``<term>_loss`` for each term without its weight,
    ``teacher_agreement``, the compiled metrics, and their ``val_`` forms.

    Args:
        student: The model to train.
        teacher: A trained model that takes the same inputs; None where the data carries :class:`DistillTargets`. It may
            be set later: ``model.teacher = teacher``.
        terms: What the student imitates; ``None`` is ``[LogitsDistillation()]``.
        task_weight: Factor of the compiled loss, 0 or greater, a number or a schedule; kept in a variable, which may be
            set while training.
        evaluate_distillation: Whether ``evaluate`` and validation run the teacher. If not, their loss is the task's.
        track_agreement: Whether the logs hold the share of examples where student and teacher choose the same class.
        save_teacher: Whether the teacher is kept in the files of this model.
        name: Name of the model.
        **kwargs: Further settings of ``keras.Model``.

    Attributes:
        student: The model to train; save it with ``model.student.save(...)``.
        terms: The terms.

    Raises:
        TypeError: If student or teacher is no Keras model, or a term is none.
        ValueError: If the teacher is the student, terms share a name, a layer is unknown, or shapes do not fit.

    Example:
        >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model = DistillModel(student, teacher)
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> history = model.fit(ops.ones((8, 4)), ops.zeros((8,)), verbose=0).history
        >>> sorted(history)
        ['distillation_loss', 'logits_loss', 'loss', 'task_loss', 'teacher_agreement']

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | None = None,
        terms: DistillationTerm | Sequence[DistillationTerm] | None = None,
        *,
        task_weight: float | Schedule = 1.0,
        evaluate_distillation: bool = True,
        track_agreement: bool = True,
        save_teacher: bool = False,
        name: str = "distill_model",
        **kwargs: Any,
    ) -> None:
        if not isinstance(student, keras.Model):
            raise TypeError(checks.message("`student` to be a keras.Model", f"a {type(student).__name__}"))
        schedules: dict[str, Schedule] = {}
        task_weight = first_value("task_weight", task_weight, checks.non_negative, schedules)
        switches = {"evaluate_distillation": evaluate_distillation, "track_agreement": track_agreement}
        for switch, value in {**switches, "save_teacher": save_teacher}.items():
            checks.boolean(switch, value)
        kwargs.setdefault("dtype", student.dtype_policy)  # so that compile() scales the loss for mixed_float16
        kwargs.setdefault("autocast", False)  # the inputs reach both models as they are
        super().__init__(name=name, **kwargs)
        self.student = student
        self.terms, self.schedules = as_terms(terms), schedules
        self.evaluate_distillation, self.track_agreement = evaluate_distillation, track_agreement
        self.save_teacher = save_teacher
        self._task_weight = add_setting(self, "task_weight", task_weight)
        parts = ("task", "distillation", *(term.name for term in self.terms))
        self._parts = LossParts(parts, agreement=track_agreement)
        # recorders are no layers: Keras does not track what they hold
        self._student_recorder = Recorder(student, [tap for term in self.terms for tap in term.student_taps], "student")
        self._teacher_recorder: Recorder | None = None
        self.teacher = teacher
        self._build_from_specifications()

    @property
    def teacher(self) -> keras.Model | None:
        """The teacher; a model may be assigned, with which training then goes on."""
        return None if self._teacher_recorder is None else self._teacher_recorder.model

    @teacher.setter
    def teacher(self, teacher: keras.Model | None) -> None:
        if teacher is not None and not isinstance(teacher, keras.Model):
            raise TypeError(checks.message("`teacher` to be a keras.Model or None", f"a {type(teacher).__name__}"))
        if teacher is self.student:
            remedy = "Pass a model of its own, such as a copy made by keras.models.clone_model."
            raise ValueError(checks.message("`teacher` to be another model than `student`", "the same model", remedy))
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        self._teacher_recorder = None if teacher is None else Recorder(teacher, taps, "teacher")
        self.train_function = self.test_function = None  # both have the old teacher in their graphs

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Keras, but for the teacher, which must not become a layer of this model."""
        if name == "teacher":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Every attribute but the teacher: Keras saves what is listed here."""
        return [name for name in super().__dir__() if name != "teacher" or self.save_teacher]

    @property
    def task_weight(self) -> keras.Variable:
        """Factor of the compiled loss, a scalar variable; a number may be assigned to it."""
        return self._task_weight

    @task_weight.setter
    def task_weight(self, value: float) -> None:
        set_setting("task_weight", self._task_weight, value)

    @property
    def output_names(self) -> list[str]:
        """Names of the student's outputs, by which ``compile`` takes losses and metrics."""
        return list(self.student.output_names)

    @property
    def losses(self) -> list[Any]:
        """The student's regularisers, left out while the task loss alone is asked for."""
        step = current_step(self)
        return [] if step is not None and step.task_alone else list(super().losses)

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """Variables that no gradient changes; on JAX the teacher's among them, since its steps see no others."""
        own: list[keras.Variable] = super().non_trainable_variables
        recorder: Recorder | None = self.__dict__.get("_teacher_recorder")  # Keras asks before it is there
        if keras.backend.backend() != "jax" or recorder is None:
            return own
        known = {id(variable) for variable in [*own, *super().trainable_variables]}
        return own + [variable for variable in recorder.model.variables if id(variable) not in known]

    def build(self, input_shape: Any) -> None:
        """Nothing: student and terms build themselves."""
        self.built = True

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; the terms are built first: the call before training finds the variables to optimize."""
        if current_step(self) is None:
            self._build_terms(inputs, None)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's output; within a step of training its tapped layers are read on the way."""
        step = current_step(self)
        if step is None:
            return self.student(inputs, training=training)
        step.student = self._student_recorder.forward(inputs, training=training)
        return step.student.output

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; schedules are followed, and data of a :class:`TeacherCache` is told which view to show."""
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        check_class_weight(given)
        return with_callbacks(super().fit, [*schedule_followers(self), *epoch_tellers(given.get("x"))], given)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; the student alone, as which this model predicts."""
        return self.student.export(*args, **kwargs)

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of training, as the backend does it."""
        with self._recording(args[-1]):
            return super().train_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of evaluation, as the backend does it."""
        with self._recording(args[-1]):
            return super().test_step(*args, **kwargs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The task loss, the terms and the regularisers, weighted and added up.

        Args:
            x: Inputs of the batch.
            y: Labels, :class:`DistillTargets`, or None.
            y_pred: The student's output.
            sample_weight: Weights of the examples.
            training: Whether this is a step of training.

        Returns:
            A scalar.

        Raises:
            ValueError: If there is nothing to learn from: neither a teacher nor targets that carry its outputs.
        """
        labels, teacher = split_targets(y)
        sample_weight = weights_of(sample_weight)
        step = current_step(self)
        if step is None:
            self._build_terms(x, teacher)  # here too Keras only looks for variables
            step = Step(self)
        step.training = training
        total = self._regularizers()
        if self.loss is not None and labels is not None:
            task = self._task_loss(x, labels, y_pred, sample_weight, training)
            self._track("task", task, x, step)
            total = total + ops.convert_to_tensor(self._task_weight) * task
        if not training and not self.evaluate_distillation:
            return total
        source = self._teacher_recorder if teacher is None else teacher
        if source is None:
            if not training:
                return total
            remedy = "Pass teacher=..., set `model.teacher`, or train on DistillTargets(labels, teacher)."
            raise ValueError(checks.message("a teacher to learn from", "teacher=None", remedy))
        if step.student is None:
            if self._student_recorder.taps and training:
                remedy = "Override `train_step` by calling super().train_step(...)."
                raise ValueError(checks.message("`compute_loss` to be called within a step", "a call outside", remedy))
            if self._student_recorder.taps:
                return total  # Keras is only building the compiled loss
            step.student = Call(y_pred)
        ask = functools.partial(self._teacher_call, source, x)
        found = compare(self.terms, step.student, ask, labels, sample_weight, training=training)
        for term, value, computed in zip(self.terms, found.values, found.computed, strict=True):
            self._track(term.name, value, x, step, computed)
        self._track("distillation", found.total, x, step)
        if self.track_agreement and found.rows is not None:
            self._parts["teacher_agreement"].add(found.agreement, found.rows)
            step.tracked.add("teacher_agreement")
        return total + found.total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The compiled metrics on the labels, and this model's own.

        Args:
            x: Inputs of the batch.
            y: Labels, :class:`DistillTargets`, or None.
            y_pred: The student's output.
            sample_weight: Weights of the examples.

        Returns:
            The logs.
        """
        labels, _ = split_targets(y)
        if labels is None:
            logs = self.get_metrics_result()
        else:
            logs = super().compute_metrics(x, labels, y_pred, weights_of(sample_weight))
        step = current_step(self)
        if step is None:
            return logs
        # what this kind of step never computes would be a number that means nothing
        own = {metric.name for metric in self._parts.metrics}
        return {key: value for key, value in logs.items() if key not in own or key in step.tracked}

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of all metrics; those that have never seen a label are left out."""
        logs: dict[str, Any] = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                logs.update(result if isinstance(result, dict) else {metric.name: result})
        return logs

    def teacher_targets(self, inputs: Any, labels: Any = None) -> DistillTargets:
        """Targets that carry what the teacher gives for some inputs, so that it runs once and not in every epoch.

        Use it on each batch of a data set: ``data.map(lambda x, y: (x, model.teacher_targets(x, y))).cache()``.

        Args:
            inputs: Inputs of a batch.
            labels: Its labels, if there are any.

        Returns:
            Labels, and the teacher's output and features.

        Raises:
            ValueError: If there is no teacher.
        """
        if self._teacher_recorder is None:
            raise ValueError(checks.message("a teacher to ask", "teacher=None", "Set `model.teacher`."))
        call = self._teacher_call(self._teacher_recorder, inputs)
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        if not taps and not carries_features(call.output):
            return DistillTargets(labels, call.output)
        return DistillTargets(labels, {"output": call.output, "features": {tap.key: call.feature(tap) for tap in taps}})

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; without the teacher unless ``save_teacher``."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "student": serialize(self.student),
            "teacher": serialize(self.teacher) if self.save_teacher and self.teacher is not None else None,
            "terms": [serialize(term) for term in self.terms],
            "task_weight": serialized(self.schedules.get("task_weight"), self._task_weight),
            "evaluate_distillation": self.evaluate_distillation,
            "track_agreement": self.track_agreement,
            "save_teacher": self.save_teacher,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> DistillModel:
        """The model that :meth:`get_config` describes."""
        restored = {
            key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            for key, value in config.items()
            if key in ("student", "teacher", "terms") and value is not None
        }
        return cls(**deserialized({key: value for key, value in config.items() if key not in restored}), **restored)

    def _build_from_specifications(self) -> None:
        """Build the terms where both models know their inputs already, so that errors come here."""
        student, teacher = self.student, self.teacher
        if student.built and getattr(student, "inputs", None):
            # functional models remember how their inputs were nested, sequential ones have a single input
            inputs = getattr(student, "_inputs_struct", student.inputs[0])
            if teacher is not None and teacher.built:
                self._build_terms(inputs, None)
            self.build(None)

    def _build_terms(self, inputs: Any, teacher: Call | None) -> None:
        source = self._teacher_recorder if teacher is None else teacher
        if source is None or all(term.built for term in self.terms):
            return
        student = probed(self._student_recorder, inputs)
        teacher = probed(source, inputs) if isinstance(source, Recorder) else source
        for term in self.terms:
            if not term.built:
                term.build_from_calls(student, teacher)

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """As in Keras; the terms first, for which a step of JAX comes too late: it cannot create variables."""
        if keras.backend.backend() == "jax" and not all(term.built for term in self.terms):
            data_batch = data_batch or backends.first_batch(iterator)
            inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data_batch)
            self._build_terms(inputs, split_targets(targets)[1])
        super()._symbolic_build(iterator, data_batch)

    @contextlib.contextmanager
    def _recording(self, data: Any) -> Iterator[None]:
        """The context of one step on this thread: ``call`` leaves the student's call in it for ``compute_loss``."""
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._build_terms(inputs, split_targets(targets)[1])
        with in_step(Step(self)):
            yield

    def _teacher_call(self, source: Recorder | Call, inputs: Any) -> Call:
        if isinstance(source, Call):
            return source
        with backends.no_gradient():
            call = source.forward(inputs, training=False)
        output, runs = keras.tree.map_structure(ops.stop_gradient, (call.output, list(call.runs.values())))
        return Call(output, dict(zip(call.runs, runs, strict=True)), who="teacher")

    def _task_loss(self, x: Any, labels: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        """The compiled loss without the regularisers, which must not be multiplied by the task's weight."""
        # a copy: on torch Keras multiplies the weights by the mask in place, and the terms want them as they came
        weights = keras.tree.map_structure(lambda one: None if one is None else ops.copy(one), sample_weight)
        with in_step(Step(self, task_alone=True)):
            return super().compute_loss(x, labels, y_pred, weights, training=training)

    def _regularizers(self) -> Any:
        losses = [ops.sum(ops.cast(loss, keras.config.floatx())) for loss in self.losses]
        return sum(losses) / backends.replicas() if losses else 0.0

    def _track(self, part: str, value: Any, x: Any, step: Step, computed: Any = 1.0) -> None:
        examples = ops.shape(next(one for one in keras.tree.flatten(x) if one is not None))[0]
        weight = computed * ops.cast(examples, "float32")
        self._parts[f"{part}_loss"].update_state(value * backends.replicas(), sample_weight=weight)
        step.tracked.add(f"{part}_loss")
