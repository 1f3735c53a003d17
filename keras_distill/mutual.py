"""Mutual learning: several students that teach each other while they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.losses import SoftTargetLoss
from keras_distill.recording import Call, probed
from keras_distill.step import DistillStep
from keras_distill.students import check_student
from keras_distill.teachers import chosen_inputs
from keras_distill.terms import DistillationTerm, LogitsDistillation
from keras_distill.whole_steps import ModelOfWholeSteps


@keras.saving.register_keras_serializable(package="keras_distill")
class MutualLearning(ModelOfWholeSteps):
    r"""Students that learn from labels and from each other's outputs, with ``compile`` and ``fit``.

    .. math:: L = \sum_i \Big( L_{task}(z_i, y) + \frac{1}{K - 1} \sum_{j \ne i} \sum_t w_t D_t(z_i, z_j) \Big)

    The outputs of the other students have no gradient, so that each student is trained by its own loss alone. An
    optimizer of Keras updates each weight by itself: one optimizer for all students does the same as one for each.
    Calling the model, and ``predict``, return a dict of the students' outputs by their names. Loss and metrics of
    ``compile`` hold for every student, and are logged as ``<student>_loss`` and so on.

    Args:
        students: Two or more models with the same inputs and classes, each with a name of its own.
        terms: Terms on outputs; None is a ``LogitsDistillation`` at temperature 1, as in the paper. Their weights and
            temperatures are numbers, which can be assigned during training: ``model.terms[0].weight = 0.5``.
        name: Name of the model.
        **kwargs: Further settings of ``keras.Model``.

    Attributes:
        students: The students; save each with ``model.students[0].save(...)``.
        terms: The terms of the first student; they share their settings with those of the others.

    Raises:
        TypeError: If a student is not a Keras model.
        ValueError: If there are fewer than two students, two are the same, share a name or trained weights, a term
            reads layers or has a schedule, or the students' outputs do not fit.

    Example:
        >>> def network(name):
        ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name=name)
        >>> model = MutualLearning([network("a"), network("b")])
        >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> sorted(model.fit(ops.ones((8, 4)), ops.zeros((8,)), verbose=0).history)
        ['a_loss', 'b_loss', 'loss', 'mutual_loss']

    References:
        Zhang, Xiang, Hospedales, Lu (2018). Deep Mutual Learning. arXiv:1706.00384. There the students are updated in
        turn, here all at once from the outputs of the same step.
    """

    def __init__(
        self,
        students: Sequence[keras.Model],
        terms: DistillationTerm | Sequence[DistillationTerm] | None = None,
        *,
        name: str = "mutual_learning",
        **kwargs: Any,
    ) -> None:
        models = _checked_students(students)
        policies = [student.dtype_policy for student in models]  # compile() scales the loss for mixed_float16
        half = (policy for policy in policies if policy.name == "mixed_float16")
        kwargs.setdefault("dtype", next(half, policies[0]))
        kwargs.setdefault("autocast", False)
        super().__init__(name=name, **kwargs)
        self.students = models
        terms = LogitsDistillation(SoftTargetLoss(temperature=1.0)) if terms is None else terms
        self._steps = [DistillStep(student, None, terms) for student in models]
        self.term_states = [state for step in self._steps for state in step.states]
        for term in self.terms:
            _check_term(term)
        self._mutual = keras.metrics.Mean(name="mutual_loss")
        inputs = [compat.input_structure(student) for student in models]
        if all(structure is not None for structure in inputs):
            self._build_terms(inputs[0])
        self.built = self._steps[0].built

    @property
    def terms(self) -> list[DistillationTerm]:
        """The terms of the first student, which share their settings with those of the others."""
        return self._steps[0].terms

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, **kwargs: Any) -> None:
        """As in Keras; loss and metrics hold for each student, unless they are dicts by the students' names.

        Args:
            optimizer: One optimizer for the weights of all students.
            loss: The loss of each student on the labels, or None.
            metrics: Metrics of each student.
            **kwargs: Further arguments of ``keras.Model.compile``.

        Raises:
            ValueError: If the optimizer clips the gradient of all weights together.
        """
        optimizer = keras.optimizers.get(optimizer)
        clipnorm = getattr(getattr(optimizer, "inner_optimizer", optimizer), "global_clipnorm", None)
        if clipnorm is not None:
            expected = "an optimizer that treats each weight by itself, for several students"
            remedy = "Pass clipnorm=... instead."
            raise ValueError(checks.message(expected, f"global_clipnorm={clipnorm}", remedy))
        if loss is not None and not isinstance(loss, dict):
            loss = {student.name: loss for student in self.students}
        if metrics is not None and not isinstance(metrics, dict):
            metrics = {student.name: [_copied(metric) for metric in metrics] for student in self.students}
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a loaded model with the settings of its file, which hold a loss for each student."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape: Any) -> None:
        """No-op: the students and the terms build themselves."""
        self.built = True

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Like ``keras.Model.__call__``; it builds the terms first, because Keras would wrap their errors."""
        self._build_terms(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> dict[str, Any]:
        """The outputs of all students by their names."""
        pairs = zip(self.students, self._steps, strict=True)
        return {student.name: step.forward(inputs, training) for student, step in pairs}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The losses of all students on the labels and on each other, and the regularisers.

        Args:
            x: Inputs of the batch.
            y: Labels, or None.
            y_pred: The outputs of all students.
            sample_weight: Weights of the examples.
            training: Whether this is a training step.

        Returns:
            A scalar.
        """
        total = sum((compat.additional_loss(self, loss) for loss in self.losses), ops.zeros(()))
        if y is not None and self.loss is not None:
            weights = None if sample_weight is None else self._for_each(sample_weight, copies=True)
            total = total + compat.compiled_loss(self, self._for_each(y), y_pred, weights)
        mutual = 0.0
        for student, step in zip(self.students, self._steps, strict=True):
            own = y_pred[student.name]
            for other in self.students:
                if other is not student:
                    peer = Call(y_pred[other.name], who="teacher").without_gradient()
                    losses = step.compare(own, x, y, sample_weight, teacher=peer, training=training)
                    mutual = mutual + losses.total / (len(self.students) - 1)
        rows = ops.shape(keras.tree.flatten(y_pred)[0])[0]
        self._mutual.update_state(compat.unscale_loss_for_distribution(mutual), sample_weight=rows)
        return total + mutual

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The logs: the metrics of each student, if the batch has labels."""
        if y is None:
            return dict(self.get_metrics_result())
        weights = None if sample_weight is None else self._for_each(sample_weight, copies=True)
        return dict(super().compute_metrics(x, self._for_each(y), y_pred, weights))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """On torch: clear the gradients of all weights, also of layers that have one name in several students."""
        backends.clear_gradients(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "students": [serialize(student) for student in self.students],
            "terms": [serialize(term) for term in self.terms],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> MutualLearning:
        """The model that :meth:`get_config` describes."""
        objects = {
            key: [keras.saving.deserialize_keras_object(part, custom_objects=custom_objects) for part in config[key]]
            for key in ("students", "terms")
        }
        return cls(**{**config, **objects})

    def _for_each(self, value: Any, copies: bool = False) -> dict[str, Any]:
        """The same value for each student, or copies of it: on torch Keras multiplies weights by a mask in place."""
        return {student.name: ops.copy(value) if copies else value for student in self.students}

    def _build_terms(self, inputs: Any) -> None:
        if all(step.built for step in self._steps):
            return
        calls = [probed(step.recorder, chosen_inputs(step.student, inputs)) for step in self._steps]
        for index, step in enumerate(self._steps):
            first, *others = calls[:index] + calls[index + 1 :]
            step.build(inputs, first)
            for term in step.terms:
                for other in others:
                    term.check_calls(calls[index], other)


def _checked_students(students: Any) -> list[keras.Model]:
    if not isinstance(students, (list, tuple)) or len(students) < 2:
        raise ValueError(checks.message("`students` to be a list of two or more models", f"{students!r}"))
    for student in students:
        check_student(student, None)
    names = [student.name for student in students]
    if len(set(names)) < len(names):
        remedy = "Pass name=... to the models."
        raise ValueError(checks.message("students with names of their own", f"names {names}", remedy))
    owners: dict[int, str] = {}
    for student in students:
        for variable in student.trainable_variables:
            if id(variable) in owners:
                expected = "students that share only frozen weights"
                received = f"{variable.path!r} in {owners[id(variable)]!r} and {student.name!r}"
                raise ValueError(checks.message(expected, received, "Set layer.trainable = False."))
        owners.update({id(variable): student.name for variable in student.trainable_variables})
    return list(students)


def _check_term(term: DistillationTerm) -> None:
    if not isinstance(term, LogitsDistillation):
        expected = "terms on outputs for students that teach each other"
        received = f"{type(term).__name__} {term.name!r}"
        raise ValueError(checks.message(expected, received, "Use LogitsDistillation or SequenceDistillation."))
    if term.schedules:
        expected = f"numbers in term {term.name!r} of MutualLearning"
        remedy = "Assign new numbers in a callback: model.terms[0].weight = 0.5."
        raise ValueError(checks.message(expected, f"schedules of {sorted(term.schedules)}", remedy))


def _copied(metric: Any) -> Any:
    """A metric for one student: an object of its own."""
    return type(metric).from_config(metric.get_config()) if isinstance(metric, keras.metrics.Metric) else metric
