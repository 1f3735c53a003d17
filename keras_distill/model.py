"""DistillModel: a student that learns from a teacher in ``compile`` and ``fit``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.callbacks import fit_callbacks, with_callbacks
from keras_distill.comparison import chosen_metrics, refuse_compiled
from keras_distill.execution import (
    StepFunction,
    followed_by_average,
    leave_out_xla,
    position_of,
    warn_of_accumulation,
)
from keras_distill.files import ModelInFiles
from keras_distill.first_labels import FirstLabels
from keras_distill.metrics import LossParts, TeacherMetric
from keras_distill.recording import Call
from keras_distill.schedules import Schedule, first_value
from keras_distill.step import DistillStep
from keras_distill.students import (
    check_arguments,
    check_route,
    check_saved,
    check_student,
    check_term_names,
    check_trained,
    warn_of_augmentation,
)
from keras_distill.targets import (
    EpochData,
    check_class_weight,
    check_stored_logits,
    split_targets,
    targets_of_outputs,
    weights_of,
)
from keras_distill.teachers import checked_hook, with_call
from keras_distill.terms import DistillationTerm


@keras.saving.register_keras_serializable(package="keras_distill")
class DistillModel(ModelInFiles):
    r"""A student that learns from a teacher, trained like any Keras model.

    .. math:: L = w_{task} L_{task} + \sum_i w_i D_i(A_i(F^s_i), F^t_i) + R

    L_task is the loss passed to ``compile``, D_i are the distances of the terms, A_i their adapters, and R are the
    student's regularisers at full weight. Calling the model returns the student's output, and so does ``predict``. The
    teacher runs in inference mode, without gradient. It is not part of this model: its weights are not counted, changed
    or saved.

    The logs hold ``loss``, ``task_loss``, ``distillation_loss``, ``<term>_loss`` for each term without its weight,
    the ``teacher_metrics``, the compiled metrics, and their ``val_`` forms. As with every Keras model that has several
    metrics, ``evaluate`` returns a list of all of them: pass ``return_dict=True``, or write
    ``loss, *rest = model.evaluate(...)``.

    Args:
        student: The model to train.
        teacher: A trained model that takes the same inputs, a :class:`CallableTeacher`, an :class:`EMATeacher`, a
            :class:`SelfTeacher`, or a list of several, which may hold a :class:`TeacherCache` whose outputs the data
            holds. None if no term needs a teacher, or if the data holds :class:`DistillTargets`. It can be set
            later, ``model.teacher = teacher``; an EMATeacher stays where it is.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``. The model makes copies, in ``model.terms``, that share
            their settings with the terms that you pass.
        task_weight: Factor of the compiled loss, 0 or greater, a number or a schedule; a number can be assigned during
            training.
        evaluate_distillation: Whether ``evaluate`` and validation run the teacher. If not, their loss is the task's,
            times ``task_weight`` unless that is 0.
        teacher_metrics: Metrics that compare the student with the teacher, such as ``[TeacherDivergence()]``. They get
            the outputs, masks and sample weights of the first term that compares class scores. None is
            ``[TeacherAgreement()]`` if there is such a term; ``[]`` measures nothing.
        teacher_inputs: Makes the teacher's inputs from the batch's: a function such as ``Normalize.between(...)``,
            called with the inputs and, if it takes a second argument, the student's call. A subclass may override the
            method of this name instead. With None the teacher gets the student's inputs.
        teacher_dtype: Precision that the teacher computes in, such as ``"bfloat16"``; None keeps the model's own.
        teacher_weights: Weights of several teachers, a list of numbers or schedules, which are divided by their sum;
            ``"entropy"`` weighs the teachers in each example by their confidence; None weighs all alike.
        mix: The average over several teachers, of ``"losses"`` or, for terms on logits, ``"probabilities"`` (one
            loss to the mean of the softened probabilities) or ``"logits"`` (one loss to the mean of the logits).
        route: A key or an index of the inputs, or a function of them: the index of each example's teacher, integers
            ``(N,)``. The loss of an example is then that to its own teacher. All teachers run on the whole batch.
        save_teacher: Whether files of this model contain the teacher.
        name: Name of the model.
        **kwargs: Further settings of ``keras.Model``.

    Attributes:
        student: The model to train; save it with ``model.student.save(...)``.
        terms: The terms.
        step: The :class:`keras_distill.step.DistillStep` that computes the terms.

    Raises:
        TypeError: If student or teacher is not a Keras model, or an entry of ``terms`` is not a term.
        ValueError: If the teacher is the student, terms share a name, a layer is unknown, shapes do not fit, or the
            student has a custom ``train_step`` or another method that would not be called.

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
        teacher_metrics: TeacherMetric | Sequence[TeacherMetric] | None = None,
        teacher_inputs: Callable[..., Any] | None = None,
        teacher_dtype: Any = None,
        teacher_weights: Sequence[float | Schedule] | str | None = None,
        mix: str = "losses",
        route: str | int | Callable[[Any], Any] | None = None,
        save_teacher: bool = False,
        name: str = "distill_model",
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        check_student(student, teacher)
        check_saved(save_teacher, teacher)
        schedules: dict[str, Schedule] = {}
        task_weight = first_value("task_weight", task_weight, checks.non_negative, schedules)
        for switch, value in {"evaluate_distillation": evaluate_distillation, "save_teacher": save_teacher}.items():
            checks.boolean(switch, value)
        kwargs.setdefault("dtype", student.dtype_policy)  # so that compile() scales the loss for mixed_float16
        kwargs.setdefault("autocast", False)  # the inputs reach both models as they are
        super().__init__(name=name, **kwargs)
        self.student = student
        overridden = self.teacher_inputs if type(self).teacher_inputs is not DistillModel.teacher_inputs else None
        hook, self._given_inputs = checked_hook(teacher_inputs, overridden), teacher_inputs
        if hook is None and teacher is not None:
            warn_of_augmentation(student)
        self.step = DistillStep(
            student, teacher, terms, teacher_dtype=teacher_dtype, teacher_inputs=hook,
            teacher_weights=teacher_weights, mix=mix, route=route,
        )  # fmt: skip
        check_term_names(self.step.terms, student)
        self.terms, self.term_states, self.schedules = self.step.terms, self.step.states, schedules
        self.evaluate_distillation, self.save_teacher = evaluate_distillation, save_teacher
        self._task_weight, self.fitting = float(task_weight), False
        self.task_weight_variable = self.add_weight(
            name="task_weight", shape=(), dtype="float32", trainable=False, autocast=False,
            initializer=keras.initializers.Constant(float(task_weight)),
        )  # fmt: skip
        names = ("task", "distillation", *(term.name for term in self.terms))
        self.must_compare = bool(teacher_metrics)
        learned = [name for term in self.terms for name in term.learned_numbers()]
        self.loss_parts = LossParts(names, chosen_metrics(teacher_metrics, self.terms, names), learned)
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
            raise ValueError(checks.message(expected, received, "Pass a number instead of the schedule."))
        self.follow("task_weight", value)

    def follow(self, name: str, value: float) -> None:
        """Set the task weight, also if it has a schedule, which then called this.

        Args:
            name: ``"task_weight"``, the only setting of the model that may have a schedule.
            value: The number.

        Raises:
            ValueError: If the number is negative or not finite.
        """
        checks.non_negative(name, value)
        self._task_weight = float(value)
        self.task_weight_variable.assign(value)

    @property
    def distils_alone(self) -> bool:
        """Whether no task loss counts: the task weight is 0, without a schedule."""
        return self.task_weight == 0 and "task_weight" not in self.schedules

    @property
    def output_names(self) -> list[str]:
        """Names of the student's outputs, which ``compile`` accepts as keys of losses and metrics."""
        return list(self.student.output_names)

    # Hooks to override --------------------------------------------------------------------------------------------

    def teacher_inputs(self, x: Any, call: Call) -> Any:
        """The teacher's inputs; override it, or pass ``teacher_inputs``, if they are not the student's.

        Args:
            x: Inputs of the batch.
            call: The student's call, with the features at the taps of its terms.

        Returns:
            The teacher's inputs. From a dict each model takes the entries that it has inputs for.
        """
        return x if self._given_inputs is None else with_call(self._given_inputs, x, call)

    def task_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        """The compiled loss without the regularisers; override it for a custom loss.

        Args:
            x: Inputs of the batch.
            y: Labels.
            y_pred: The student's output.
            sample_weight: Weights of the examples.
            training: Whether this is a training step.

        Returns:
            A scalar, or None if no loss was compiled or the batch has no labels.
        """
        if self.loss is None or y is None:
            return None
        # a copy: on torch Keras multiplies the weights by the mask in place, and the terms need the original ones
        weights = keras.tree.map_structure(lambda weight: None if weight is None else ops.copy(weight), sample_weight)
        return compat.compiled_loss(self, targets_of_outputs(y, y_pred, self.terms), y_pred, weights)

    # Keras' own methods -------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """No-op: the student and the terms build themselves."""
        self.built = True

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.__call__``; it builds the terms first, because Keras would wrap their errors."""
        self.step.build(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Call the student; the record of its tapped layers is attached to the output."""
        return self.step.forward(inputs, training)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.fit``; it also follows the schedules and sets the epoch of cached data."""
        arguments = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        data, targets = arguments.get("x"), arguments.get("y")
        check_class_weight(arguments.get("class_weight"), targets, data)
        check_stored_logits(self.terms, targets, data)
        for term in self.terms:
            term.expect_new_labels()
        arguments["x"] = FirstLabels(self.student, self.terms).watched(data, targets)
        check_route(self.step.ensemble, data)
        self.build_from_data(data, targets)
        before, self.fitting = self.fitting, True
        try:
            return with_callbacks(super().fit, fit_callbacks(self, data), arguments)
        finally:
            self.fitting = before
            if isinstance(data, EpochData):
                data.end_fit()  # after an exception Keras does not call `on_train_end`

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Like ``keras.Model.train_on_batch``; it follows schedules over steps and refuses all others."""
        check_class_weight(class_weight, y, x)
        FirstLabels(self.student, self.terms).watched(x, y)
        return super().train_on_batch(x, y, sample_weight, class_weight, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.evaluate``; it returns floats with every version of Keras."""
        if not self.step.built:
            arguments = inspect.signature(super().evaluate).bind(*args, **kwargs).arguments
            if self.build_from_data(arguments.get("x"), arguments.get("y")):
                self.test_function = None  # TensorFlow can make adapters only in the first batch of a new function
        results = super().evaluate(*args, **kwargs)
        return keras.tree.map_structure(lambda value: value if value is None else float(value), results)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the student, whose predictions are those of this model."""
        return self.student.export(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Make the function of a training step, with one graph for each set of computed terms."""
        self.begin_average()
        if keras.backend.backend() == "jax":  # elsewhere the first step does it, and may raise
            self.build_optimizer()
        if force or self.train_function is None:
            leave_out_xla(self)
            warn_of_accumulation(self)
            if self.loss is None or self.distils_alone:
                check_trained(self.step)
            function = StepFunction(self, super().make_train_function, "train_function", training=True)
            self.train_function = function
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Make the function of an evaluation step."""
        self.begin_average()
        if force or self.test_function is None:
            leave_out_xla(self)
            function = StepFunction(self, super().make_test_function, "test_function", training=False)
            self.test_function = function
        return self.test_function

    def train_step(self, *args: Any) -> Any:
        """As in Keras; then an :class:`EMATeacher` follows the student."""
        with self.step.taped():
            return followed_by_average(self, super().train_step, args)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The task loss, the terms and the regularisers, weighted and added up.

        Args:
            x: Inputs of the batch; with None the teacher gets the student's inputs.
            y: Labels, :class:`DistillTargets`, or None.
            y_pred: The model's output, unchanged.
            sample_weight: Weights of the examples.
            training: Whether this is a training step.

        Returns:
            A scalar.

        Raises:
            ValueError: If a term needs a teacher, but the model has none and the targets do not hold its outputs; or if
                ``y_pred`` is not a recorded output of the model.
        """
        labels, stored = split_targets(y)
        sample_weight = targets_of_outputs(weights_of(sample_weight), y_pred, self.terms)
        total = sum((compat.additional_loss(self, loss) for loss in self.losses), ops.zeros(()))
        task = self.task_loss(x, labels, y_pred, sample_weight, training)
        knows_teacher = self.step.ensemble.can_answer(stored) or not self.step.needs_teacher
        unrecorded = self.step.recorder.record_of(y_pred) is None
        if unrecorded and compat.in_symbolic_scope():  # Keras runs this only to create variables
            if stored is not None or x is not None:
                self.step.build(x if x is not None else y_pred, stored)
            return total if task is None else total + task
        measures = training or (self.evaluate_distillation and knows_teacher)
        parts: dict[str, Any] = {} if task is None else {"task": task}
        if task is not None:
            weight = ops.cast(self.task_weight_variable, task.dtype)
            if not training and not self.evaluate_distillation:  # with a weight of 0 the loss would always be 0
                weight = ops.where(weight > 0, weight, ops.ones_like(weight))
            total = total + weight * task
        if measures:
            losses = self.step.compare(
                y_pred, x, labels, sample_weight,
                teacher=stored, training=training, with_scores=bool(self.loss_parts.teacher_metrics),
                task_loss=None if self.distils_alone else task, position=position_of(self) if training else None,
            )  # fmt: skip
            total = total + losses.total
            if training:
                self.check_optimizer()
            parts |= {"distillation": losses.total, **losses.values}
            if losses.scores == [] and self.must_compare:
                expected = "outputs that choose one class for `teacher_metrics`"
                received = "single scores, a sigmoid for each of several classes, or a cache of a part of the classes"
                raise ValueError(checks.message(expected, received))
            for scores in losses.scores or []:
                self.loss_parts.compare(*scores)
            if training and task is None and not losses.values:
                total = total + ops.cast(backends.zero_gradient(keras.tree.flatten(y_pred)), total.dtype)
        rows = ops.shape(keras.tree.flatten(y_pred)[0])[0]
        for name, value in parts.items():
            self.loss_parts.add(f"{name}_loss", compat.unscale_loss_for_distribution(value), rows)
        for term in self.terms if training else []:
            for name, value in term.learned_numbers().items():
                self.loss_parts.add(name, value, rows)
        return total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The logs: the compiled metrics, if the batch has labels, and this model's own metrics."""
        refuse_compiled(compat.compiled_metrics(self))
        labels, _ = split_targets(y)
        if labels is None:
            return self.get_metrics_result()
        labels, weights = (targets_of_outputs(each, y_pred, self.terms) for each in (labels, weights_of(sample_weight)))
        logs: dict[str, Any] = super().compute_metrics(x, labels, y_pred, weights)
        return logs

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of all metrics, without those that have not been updated yet for lack of labels."""
        logs: dict[str, Any] = {}
        for metric in self.metrics:
            if getattr(metric, "built", True):
                result = metric.result()
                logs.update(result if isinstance(result, dict) else {metric.name: result})
        return logs
