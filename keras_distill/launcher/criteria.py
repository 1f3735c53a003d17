"""The launcher's criteria: the older API's names for a task weight and some terms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import keras

from distill_core.launcher.criteria import CriterionChecks, Place, configured, distinct, weighted_total
from keras_distill import backends, checks
from keras_distill.losses import DistillationLoss, LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from keras_distill.recording import Call, Tap, select
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation

_CHECKS = CriterionChecks(
    checks, (str, keras.layers.Layer, Tap), lambda output: type(output) is int or isinstance(output, str)
)


class KnowledgeDistillationLoss:
    r"""The student's own loss and the divergence of its soft targets from the teacher's.

    .. math:: w_0 \, L_{student} + w_1 \, T^2 \, D(z_s / T, z_t / T)

    D is CE (cross entropy under the soft targets), KL (in nats, summed over the classes) or MSE (mean over the
    classes), averaged over the examples. A weight of 0 leaves its part out: at :math:`w_1 = 0` the teacher never runs.

    Args:
        temperature: Softening of both models' outputs, greater than 0.
        loss_types: The student's own loss in built-in training, ``"CE"`` (labels may be class numbers or one-hot)
            or ``"MSE"``; and D.
        loss_weights: :math:`w_0` and :math:`w_1`, 0 or greater. If they do not sum to 1, which the older API required,
            a warning is issued.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
            ``None`` looks at the models: probabilities if both end in a softmax, logits otherwise.
        reference_reduction: Whether KL is divided by the number of classes too, as it was in the older API.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a type is unknown, a weight is negative, or the temperature is not greater than 0.

    Example:
        >>> criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"], loss_weights=[0.5, 0.5])
        >>> student, teacher = keras.ops.array([[2.0, 0.0, 1.0]]), keras.ops.array([[4.0, 1.0, 0.0]])
        >>> round(float(criterion(student, teacher, 1.0)), 4)
        0.7847

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        loss_types: Sequence[str] = ("CE", "CE"),
        loss_weights: Sequence[float] = (0.5, 0.5),
        *,
        from_logits: bool | None = None,
        reference_reduction: bool = False,
    ) -> None:
        _check_from_logits(from_logits)
        settings = _CHECKS.knowledge(temperature, loss_types, loss_weights, reference_reduction)
        self.temperature, self.loss_types, self.loss_weights = settings
        self.reference_reduction = reference_reduction
        self.task_weight = self.loss_weights[0]
        self._set_outputs(from_logits)

    def _set_outputs(self, from_logits: bool | None) -> None:
        self.from_logits, logits = from_logits, from_logits is not False
        self.task_loss = LabelCrossEntropy(logits) if self.loss_types[0] == "CE" else keras.losses.MeanSquaredError()
        self.loss: DistillationLoss = {
            "CE": SoftCrossEntropyLoss(temperature=self.temperature, from_logits=logits),
            "KL": SoftTargetLoss(temperature=self.temperature, from_logits=logits),
            # T^2 times the mean square of (z_s - z_t) / T: the temperature cancels
            "MSE": LogitMSELoss(from_logits=logits),
        }[self.loss_types[1]]
        if self.loss_types[1] == "KL" and self.reference_reduction:
            self.loss = _DividedByClasses(self.loss)

    @property
    def compares_outputs(self) -> bool:
        """Whether the outputs of both models must be of the same kind."""
        return self.loss_weights[1] != 0

    def with_outputs(self, from_logits: bool) -> KnowledgeDistillationLoss:
        """A copy of the criterion for logits or for probabilities."""
        criterion = copy.copy(self)
        criterion._set_outputs(from_logits)
        return criterion

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings; an empty list if the teacher's weight is 0."""
        weight = self.loss_weights[1]
        return [LogitsDistillation(self.loss, weight=weight, name="knowledge")] if weight else []

    def __call__(self, student_output: Any, teacher_output: Any, student_loss: Any) -> Any:
        """The total loss.

        Args:
            student_output: The student's output, with logits ``(N, C)`` in it.
            teacher_output: The teacher's.
            student_loss: The student's own loss, a scalar.

        Returns:
            A scalar.
        """

        def divergence() -> Any:
            student = select(student_output, None, "the student's output")
            return self.loss(select(teacher_output, None, "the teacher's output"), student)

        return weighted_total(self.loss_weights, student_loss, divergence)


class IntermediateLayersKnowledgeDistillationLoss:
    """Distances between layers of the two models, through adapters where their shapes differ.

    Args:
        layer_mappings: One entry for each pair of layers: ``[student, teacher]``, ``[[student, output], [teacher,
            output]]``, ``[student, output, teacher, output]``, or the name alone where both models have it. An output
            is an index or a key that picks a tensor; ``""`` is the whole model.
        loss_types: ``"MSE"``, ``"L1"`` or ``"KL"`` for each pair; ``None`` is MSE for all.
        loss_weights: Factor of each pair, 0 or greater; ``None`` gives all the same share of 1.
        add_origin_loss: Whether the student's own loss is added, at full weight.
        from_logits: Whether the student returns logits, for its own loss in built-in training. ``None`` looks at the
            student: probabilities if it ends in a softmax, logits otherwise.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a mapping has another form, a type is unknown, a weight is negative, or their numbers differ.

    Example:
        >>> criterion = IntermediateLayersKnowledgeDistillationLoss([["block1", "block2"], "head"], ["MSE", "KL"])
        >>> [(term.student_taps[0].layer, term.teacher_taps[0].layer, float(term.weight)) for term in criterion.terms()]
        [('block1', 'block2', 0.5), ('head', 'head', 0.5)]
    """

    def __init__(
        self,
        layer_mappings: Sequence[Any],
        loss_types: Sequence[str] | None = None,
        loss_weights: Sequence[float] | None = None,
        add_origin_loss: bool = False,
        *,
        from_logits: bool | None = None,
    ) -> None:
        checks.boolean("add_origin_loss", add_origin_loss)
        _check_from_logits(from_logits)
        self.layer_mappings = [(_tap(student), _tap(teacher)) for student, teacher in _CHECKS.mappings(layer_mappings)]
        number = len(self.layer_mappings)
        self.loss_types, self.loss_weights = _CHECKS.each(number, loss_types, loss_weights, "MSE", ("MSE", "L1", "KL"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)
        self.from_logits = from_logits
        self.task_loss = LabelCrossEntropy(from_logits is not False)

    compares_outputs = False  # only the student's output is read, for its own loss

    def with_outputs(self, from_logits: bool) -> IntermediateLayersKnowledgeDistillationLoss:
        """A copy of the criterion for a student that returns logits, or one that returns probabilities."""
        criterion = copy.copy(self)
        criterion.from_logits, criterion.task_loss = from_logits, LabelCrossEntropy(from_logits)
        return criterion

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings; their names are numbered if a layer is part of several pairs."""
        terms: list[DistillationTerm] = []
        for (student, teacher), kind, weight in zip(
            self.layer_mappings, self.loss_types, self.loss_weights, strict=True
        ):
            term = FeatureDistillation(student, teacher, kind.lower(), weight=weight)
            name = distinct(term.name, [earlier.name for earlier in terms])
            if name != term.name:
                term = FeatureDistillation(student, teacher, kind.lower(), weight=weight, name=name)
            terms.append(term)
        return terms


@keras.saving.register_keras_serializable(package="keras_distill")
class CriterionTerm(DistillationTerm):
    """A user's criterion, which makes the total itself from both outputs and the student's own loss.

    Args:
        criterion: Called with ``(student_output, teacher_output, student_loss)``, returns a scalar. The sample weights
            are in ``student_loss``.
        task_loss: The student's own loss, called with the labels and its output.
    """

    needs_labels = True

    def __init__(self, criterion: Any, task_loss: Any) -> None:
        super().__init__(name="criterion")
        self.criterion = criterion
        self._task_loss = task_loss if isinstance(task_loss, keras.losses.Loss) else _WeighedFunction(task_loss)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The total, a scalar."""
        output = select(student.output, None, "the student's output")
        loss = None if labels is None else keras.ops.mean(self._task_loss(labels, output, sample_weight))
        return self.criterion(student.output, teacher.output, loss) / backends.replicas()


@keras.saving.register_keras_serializable(package="keras_distill")
class LabelCrossEntropy(keras.losses.Loss):
    """Cross entropy of labels that are class numbers or one-hot, depending on their shape.

    Args:
        from_logits: Whether the student returns logits; if False, it returns probabilities.

    Example:
        >>> loss, ops, logits = LabelCrossEntropy(), keras.ops, keras.ops.array([[2.0, 0.0, 1.0]])
        >>> [round(float(loss(labels, logits)), 4) for labels in (ops.array([1]), ops.array([[0, 1, 0]]))]
        [2.4076, 2.4076]
    """

    def __init__(self, from_logits: bool = True) -> None:
        super().__init__(name="label_cross_entropy")
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value for each label."""
        check_several_classes(y_pred, "Set `task_loss`, such as keras.losses.BinaryCrossentropy(from_logits=True).")
        if one_hot(y_true, y_pred):
            return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=self.from_logits)
        if len(y_true.shape) == len(y_pred.shape):
            y_true = keras.ops.squeeze(y_true, axis=-1)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {"from_logits": self.from_logits}


def one_hot(labels: Any, output: Any) -> bool:
    """Whether labels have an entry for each class of an output, and are not class numbers."""
    return len(labels.shape) == len(output.shape) and labels.shape[-1] == output.shape[-1]


def check_several_classes(output: Any, remedy: str) -> None:
    """Raise if an output has a single score, of which cross entropy is always 0, and the likeliest class always right.

    Args:
        output: The model's output.
        remedy: The last sentence of the message.

    Raises:
        ValueError: If so.
    """
    if output.shape[-1] == 1:
        expected = "the model to score at least 2 classes"
        raise ValueError(checks.message(expected, f"an output of shape {tuple(output.shape)}", remedy))


def criterion_of(section: Any) -> Any:
    """The criterion of a configuration's section ``distillation.train.criterion``.

    Args:
        section: The section; None is ``KnowledgeDistillationLoss()``.

    Returns:
        The criterion.

    Raises:
        ValueError: If the settings are inconsistent; the message names their path.

    Example:
        >>> from keras_distill import DistillationConf
        >>> settings = {"KnowledgeDistillationLoss": {"temperature": 2}}
        >>> train = DistillationConf(distillation={"train": {"criterion": settings}}).distillation.train
        >>> criterion_of(train.criterion).temperature
        2.0
    """
    return configured(section, (KnowledgeDistillationLoss, IntermediateLayersKnowledgeDistillationLoss))


class _WeighedFunction(keras.losses.Loss):
    """A function of labels and outputs, such as ``keras.losses.mean_squared_error``, as a loss with sample weights."""

    def __init__(self, function: Any) -> None:
        super().__init__(name="weighed_function")
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


class _DividedByClasses(DistillationLoss):
    """A loss divided by the number of classes."""

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__(name="divided_by_classes")
        self.loss = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.loss.call(y_true, y_pred) / y_pred.shape[-1]

    @property
    def from_logits(self) -> bool:
        """The setting of the loss, with which the term checks the outputs."""
        return bool(self.loss.from_logits)


def _check_from_logits(from_logits: bool | None) -> None:
    if from_logits is not None:
        checks.boolean("from_logits", from_logits)


def _tap(place: Place) -> Tap:
    return place.layer if isinstance(place.layer, Tap) else Tap(place.layer, output=place.output)
