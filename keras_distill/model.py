"""DistillModel: a student that learns from a teacher in ``compile`` and ``fit``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.callbacks import fit_callbacks, with_callbacks
from keras_distill.execution import StepFunction, leave_out_xla
from keras_distill.metrics import LossParts
from keras_distill.recording import Call
from keras_distill.schedules import Schedule, deserialized, first_value, serialized
from keras_distill.step import DistillStep
from keras_distill.students import check_arguments, check_student, check_term_names, warn_of_augmentation
from keras_distill.targets import (
    DistillTargets,
    check_class_weight,
    check_stored_logits,
    split_targets,
    stored_targets,
    weights_of,
)
from keras_distill.terms import DistillationTerm
from keras_distill.untracked import ModelWithTeacher


@keras.saving.register_keras_serializable(package="keras_distill")
class DistillModel(ModelWithTeacher):
    r"""A student that learns from a teacher, trained like any Keras model.

    .. math:: L = w_{task} L_{task} + \sum_i w_i D_i(A_i(F^s_i), F^t_i) + R

    L_task is the loss given to ``compile``, D_i are the distances of the terms, A_i their adapters, and R the student's
    regularisers at full weight. The model predicts, and is called, as the student. The teacher runs in inference mode,
    without gradient; it is not part of this model: neither counted, nor changed, nor saved.

    The logs hold ``loss``, ``task_loss``, ``distillation_loss``, ``<term>_loss`` for each term without its weight,
    ``teacher_agreement``, the compiled metrics, and their ``val_`` forms. Like every Keras model with several numbers
    to tell, ``evaluate`` returns a list of all of them: pass ``return_dict=True``, or write
    ``loss, *rest = model.evaluate(...)``.

    Args:
        student: The model to train.
        teacher: A trained model that takes the same inputs; a list of several, over which each term is averaged; or
            None where no term reads a teacher or the data carries :class:`DistillTargets`. It may be set later:
            ``model.teacher = teacher``.
        terms: What the student imitates; ``None`` is ``[LogitsDistillation()]``. The model makes copies, in
            ``model.terms``, that share the settings with the terms it is given.
        task_weight: Factor of the compiled loss, 0 or greater, a number or a schedule; a number may be assigned while
            training.
        evaluate_distillation: Whether ``evaluate`` and validation run the teacher. If not, their loss is the task's,
            times ``task_weight`` unless that is 0.
        track_agreement: Whether the logs hold the share of examples where student and teacher choose the same class,
            if a term compares scores of classes.
        teacher_dtype: Precision that the teacher computes in, such as ``"bfloat16"``; None leaves it to the model.
        save_teacher: Whether the teacher is kept in the files of this model.
        name: Name of the model.
        **kwargs: Further settings of ``keras.Model``.

    Attributes:
        student: The model to train; save it with ``model.student.save(...)``.
        terms: The terms.
        step: The :class:`keras_distill.step.DistillStep` that does the work.

    Raises:
        TypeError: If student or teacher is not a Keras model, or an entry of ``terms`` is not a term.
        ValueError: If the teacher is the student, terms share a name, a layer is unknown, shapes do not fit, or the
            student has a ``train_step`` or another method of its own that would not be called.

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
        teacher: keras.Model | Sequence[keras.Model] | None = None,
        terms: DistillationTerm | Sequence[DistillationTerm] | None = None,
        *,
        task_weight: float | Schedule = 1.0,
        evaluate_distillation: bool = True,
        track_agreement: bool = True,
        teacher_dtype: Any = None,
        save_teacher: bool = False,
        name: str = "distill_model",
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        check_student(student, teacher)
        schedules: dict[str, Schedule] = {}
        task_weight = first_value("task_weight", task_weight, checks.non_negative, schedules)
        switches = {"evaluate_distillation": evaluate_distillation, "track_agreement": track_agreement}
        for switch, value in {**switches, "save_teacher": save_teacher}.items():
            checks.boolean(switch, value)
        kwargs.setdefault("dtype", student.dtype_policy)  # so that compile() scales the loss for mixed_float16
        kwargs.setdefault("autocast", False)  # the inputs reach both models as they are
        super().__init__(name=name, **kwargs)
        self.student = student
        hook = self.teacher_inputs if type(self).teacher_inputs is not DistillModel.teacher_inputs else None
        if hook is None and teacher is not None:
            warn_of_augmentation(student)
        self.step = DistillStep(student, teacher, terms, teacher_dtype=teacher_dtype, teacher_inputs=hook)
        check_term_names(self.step.terms, student)
        self.terms, self.term_states, self.schedules = self.step.terms, self.step.states, schedules
        self.evaluate_distillation, self.track_agreement = evaluate_distillation, track_agreement
        self.save_teacher = save_teacher
        self._task_weight, self.fitting = float(task_weight), False
        self.task_weight_variable = self.add_weight(
            name="task_weight", shape=(), dtype="float32", trainable=False, autocast=False,
            initializer=keras.initializers.Constant(float(task_weight)),
        )  # fmt: skip
        names = ("task", "distillation", *(term.name for term in self.terms))
        self.loss_parts = LossParts(names, agreement=track_agreement)
        self.built = self.step.built  # a file builds only a model that is not built yet

    @property
    def task_weight(self) -> float:
        """Factor of the compiled loss; assign a number to change it from the next step on."""
        return self._task_weight

    @task_weight.setter
    def task_weight(self, value: float) -> None:
        if "task_weight" in self.schedules:
            expected = "`task_weight` not to be assigned while it has a schedule"
            received = f"task_weight={value!r}, and {self.schedules['task_weight']!r}"
            raise ValueError(checks.message(expected, received, "Give the model a number in place of the schedule."))
        self.follow("task_weight", value)

    def follow(self, name: str, value: float) -> None:
        """Set a setting of the model to a number that came from its schedule."""
        checks.non_negative(name, value)
        self._task_weight = float(value)
        self.task_weight_variable.assign(value)

    @property
    def output_names(self) -> list[str]:
        """Names of the student's outputs, by which ``compile`` takes losses and metrics."""
        return list(self.student.output_names)

    # Hooks to override --------------------------------------------------------------------------------------------

    def teacher_inputs(self, x: Any, call: Call) -> Any:
        """What the teacher is shown; override it for another resolution, other tokens, or the student's augmentation.

        Args:
            x: Inputs of the batch.
            call: The student's call, with the features at the taps of its terms.

        Returns:
            The teacher's inputs; of a dict each model takes the entries that it has inputs for.
        """
        return x

    def task_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        """The compiled loss without the regularisers; override it for a loss of your own.

        Args:
            x: Inputs of the batch.
            y: Labels.
            y_pred: The student's output.
            sample_weight: Weights of the examples.
            training: Whether this is a step of training.

        Returns:
            A scalar, or None where there is no loss on labels.
        """
        if self.loss is None or y is None:
            return None
        # a copy: on torch Keras multiplies the weights by the mask in place, and the terms read them as they came
        weights = keras.tree.map_structure(lambda one: None if one is None else ops.copy(one), sample_weight)
        return compat.compiled_loss(self, y, y_pred, weights)

    # Keras' own methods -------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """No-op: the student and the terms build themselves."""
        self.built = True

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.__call__``; the terms are built first, whose errors Keras would wrap in its own words."""
        self.step.build(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's output, on which the record of its tapped layers hangs."""
        return self.step.forward(inputs, training)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.fit``; it also follows the schedules and sets the epoch of cached data."""
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        data = given.get("x")
        check_class_weight(given.get("class_weight"), given.get("y"), data)
        check_stored_logits(self.terms, given.get("y"), data)
        before, self.fitting = self.fitting, True
        try:
            return with_callbacks(super().fit, fit_callbacks(self, data), given)
        finally:
            self.fitting = before

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Like ``keras.Model.train_on_batch``; schedules over steps are followed, others refused."""
        check_class_weight(class_weight, y, x)
        return super().train_on_batch(x, y, sample_weight, class_weight, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.evaluate``; the numbers are floats on every version of Keras."""
        results = super().evaluate(*args, **kwargs)
        return keras.tree.map_structure(lambda value: value if value is None else float(value), results)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the student; this model predicts exactly as it does."""
        return self.student.export(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Make the function of a training step: one graph for each set of working terms."""
        if force or self.train_function is None:
            leave_out_xla(self)
            if self.loss is None or (self.task_weight == 0 and "task_weight" not in self.schedules):
                self.step.check_trained()
            function = StepFunction(self, super().make_train_function, "train_function", training=True)
            self.train_function = function
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Make the function of an evaluation step."""
        if force or self.test_function is None:
            leave_out_xla(self)
            function = StepFunction(self, super().make_test_function, "test_function", training=False)
            self.test_function = function
        return self.test_function

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The task loss, the terms and the regularisers, weighted and added up.

        Args:
            x: Inputs of the batch; None shows the teacher what the student was shown.
            y: Labels, :class:`DistillTargets`, or None.
            y_pred: The student's output, as calling the model returned it.
            sample_weight: Weights of the examples.
            training: Whether this is a step of training.

        Returns:
            A scalar.

        Raises:
            ValueError: If there is nothing to learn from: neither a teacher nor targets that carry its outputs.
        """
        labels, stored = split_targets(y)
        sample_weight = weights_of(sample_weight)
        total = sum((compat.additional_loss(self, loss) for loss in self.losses), ops.zeros(()))
        task = self.task_loss(x, labels, y_pred, sample_weight, training)
        knows_teacher = stored is not None or bool(self.step.teachers) or not self.step.needs_teacher
        unrecorded = self.step.recorder.record_of(y_pred) is None
        if unrecorded and compat.in_symbolic_scope():  # Keras only looks for variables
            if stored is not None or x is not None:
                self.step.build(x if x is not None else y_pred, stored)
            return total if task is None else total + task
        measures = training or (self.evaluate_distillation and knows_teacher)
        parts: dict[str, Any] = {} if task is None else {"task": task}
        if task is not None:
            weight = ops.cast(self.task_weight_variable, task.dtype)
            if not training and not self.evaluate_distillation:  # a weight of 0 would leave a loss that is always 0
                weight = ops.where(weight > 0, weight, ops.ones_like(weight))
            total = total + weight * task
        if measures:
            found = self.step.compare(
                y_pred, x, labels, sample_weight,
                teacher=stored, training=training, track_agreement=self.track_agreement,
            )  # fmt: skip
            total = total + found.total
            parts |= {"distillation": found.total, **found.values}
            if found.rows is not None:
                self.loss_parts.add("teacher_agreement", found.agreement, found.rows)
            if training and task is None and not found.values:
                total = total + ops.cast(backends.zero_gradient(keras.tree.flatten(y_pred)), total.dtype)
        rows = ops.shape(keras.tree.flatten(y_pred)[0])[0]
        for name, value in parts.items():
            self.loss_parts.add(f"{name}_loss", compat.unscale_loss_for_distribution(value), rows)
        return total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The logs: the compiled metrics on the labels, where there are any, and this model's own numbers."""
        labels, _ = split_targets(y)
        if labels is None:
            return self.get_metrics_result()
        logs: dict[str, Any] = super().compute_metrics(x, labels, y_pred, weights_of(sample_weight))
        return logs

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of all metrics; those that have never seen a label are left out."""
        logs: dict[str, Any] = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                logs.update(result if isinstance(result, dict) else {metric.name: result})
        return logs

    def teacher_targets(self, inputs: Any, labels: Any = None) -> DistillTargets:
        """Targets that carry the teacher's outputs for some inputs, so that it runs once and not in every epoch.

        Use it on each batch of a data set: ``data.map(lambda x, y: (x, model.teacher_targets(x, y))).cache()``.

        Args:
            inputs: Inputs of a batch, as the teacher takes them.
            labels: Its labels, if there are any.

        Returns:
            Labels, and the teacher's output and features.

        Raises:
            ValueError: If there is not exactly one teacher.
        """
        if len(self.step.teachers) != 1:
            received = f"{len(self.step.teachers)} teachers" if self.step.teachers else "teacher=None"
            remedy = "Set `model.teacher`." if not self.step.teachers else "Keep the targets of each teacher by itself."
            raise ValueError(checks.message("a teacher to ask", received, remedy))
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        return stored_targets(labels, self.step.teachers[0].answer(inputs), taps)

    # Files --------------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; without the teacher unless ``save_teacher``."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "student": serialize(self.student),
            "teacher": serialize(self.teacher) if self.save_teacher and self.teacher is not None else None,
            "terms": [serialize(term) for term in self.terms],
            "task_weight": serialized(self.schedules.get("task_weight"), self._task_weight),
            "evaluate_distillation": self.evaluate_distillation,
            "track_agreement": self.track_agreement,
            "teacher_dtype": self.step.teacher_dtype,
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

    def get_build_config(self) -> dict[str, Any] | None:
        """What the terms need to make their adapters without a teacher."""
        return {"terms": {term.name: term.get_shapes() for term in self.terms if term.built}}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Make the adapters of a saved model."""
        self.step.build_from_config((config or {}).get("terms", {}))
        self.built = True

    # Inside -------------------------------------------------------------------------------------------------------

    def load_own_variables(self, store: Any) -> None:
        """Load this model's own number, the weight of the task."""
        super().load_own_variables(store)
        self._task_weight = backends.same_or_loaded(self._task_weight, self.task_weight_variable)

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """As in Keras; the terms first, for which a step of JAX comes too late: it cannot create variables."""
        if keras.backend.backend() == "jax" and not self.step.built:
            data_batch = data_batch or compat.first_batch(iterator)
            inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data_batch)
            self.step.build(inputs, split_targets(targets)[1])
        super()._symbolic_build(iterator, data_batch)
