"""The launcher's criteria: the older API's names for a task weight and some terms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import backends, checks
from keras_distill.launcher.conf import Criterion
from keras_distill.losses import DistillationLoss, LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from keras_distill.recording import Call, Tap, select
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation


class KnowledgeDistillationLoss:
    r"""The student's own loss and the divergence of its soft targets from the teacher's.

    .. math:: w_0 \, L_{student} + w_1 \, T^2 \, D(z_s / T, z_t / T)

    D is CE (cross entropy under the soft targets), KL (in nats, summed over the classes) or MSE (mean over the
    classes), averaged over the examples. A weight of 0 leaves its part out: at :math:`w_1 = 0` the teacher never runs.

    Args:
        temperature: Softening of both models' outputs, greater than 0.
        loss_types: The student's own loss in built-in training, ``"CE"`` (labels may be numbers of classes or one-hot)
            or ``"MSE"``; and D.
        loss_weights: :math:`w_0` and :math:`w_1`, 0 or greater. They need not sum to 1; a warning says so, because the
            older API demanded it.
        from_logits: Whether the models give logits; if False they give probabilities, and z is their logarithm.
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
        from_logits: bool = True,
        reference_reduction: bool = False,
    ) -> None:
        checks.positive("temperature", temperature)
        checks.boolean("from_logits", from_logits)
        checks.boolean("reference_reduction", reference_reduction)
        task, distillation = _pair_of("loss_types", loss_types)
        checks.one_of("loss_types[0]", task, ("CE", "MSE"))
        checks.one_of("loss_types[1]", distillation, ("CE", "KL", "MSE"))
        weights = _weights(_pair_of("loss_weights", loss_weights))
        if abs(sum(weights) - 1.0) > 1e-6:
            told = "They are used as they are; the older API refused them."
            warnings.warn(f"The loss weights {[*weights]} do not sum to 1. {told}", stacklevel=2)
        self.temperature, self.loss_types, self.loss_weights = float(temperature), (task, distillation), weights
        self.from_logits, self.reference_reduction = from_logits, reference_reduction
        self.task_weight = weights[0]
        self.task_loss = LabelCrossEntropy(from_logits) if task == "CE" else keras.losses.MeanSquaredError()
        self.loss: DistillationLoss = {
            "CE": SoftCrossEntropyLoss(temperature=self.temperature, from_logits=from_logits),
            "KL": SoftTargetLoss(temperature=self.temperature, from_logits=from_logits),
            # T^2 times the mean square of (z_s - z_t) / T: the temperature cancels
            "MSE": LogitMSELoss(from_logits=from_logits),
        }[distillation]
        if distillation == "KL" and reference_reduction:
            self.loss = _DividedByClasses(self.loss)

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings; none where the teacher has no weight."""
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
        student = select(student_output, None, "the student's output")
        teacher = select(teacher_output, None, "the teacher's output")
        return self.task_weight * student_loss + self.loss_weights[1] * self.loss(teacher, student)


class IntermediateLayersKnowledgeDistillationLoss:
    """Distances between layers of the two models, through adapters where their shapes differ.

    Args:
        layer_mappings: One entry for each pair of layers: ``[student, teacher]``, ``[[student, output], [teacher,
            output]]``, ``[student, output, teacher, output]``, or the name alone where both models have it. An output
            is an index or a key that picks a tensor; ``""`` is the whole model.
        loss_types: ``"MSE"``, ``"L1"`` or ``"KL"`` for each pair; ``None`` is MSE for all.
        loss_weights: Factor of each pair, 0 or greater; ``None`` shares 1 equally.
        add_origin_loss: Whether the student's own loss is added, at full weight.
        from_logits: Whether the student gives logits; counts for its own loss in built-in training.

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
        from_logits: bool = True,
    ) -> None:
        checks.boolean("add_origin_loss", add_origin_loss)
        checks.boolean("from_logits", from_logits)
        if isinstance(layer_mappings, str) or not len(layer_mappings):
            raise ValueError(checks.message("`layer_mappings` to be a list of pairs", f"{layer_mappings!r}"))
        self.layer_mappings = [_mapping(index, entry) for index, entry in enumerate(layer_mappings)]
        number = len(self.layer_mappings)
        self.loss_types = tuple(["MSE"] * number if loss_types is None else loss_types)
        self.loss_weights = _weights([1.0 / number] * number if loss_weights is None else loss_weights)
        for name, values in (("loss_types", self.loss_types), ("loss_weights", self.loss_weights)):
            if len(values) != number:
                expected = f"`{name}` to hold {number} entries, as `layer_mappings` does"
                raise ValueError(checks.message(expected, f"{len(values)} entries"))
        for index, kind in enumerate(self.loss_types):
            checks.one_of(f"loss_types[{index}]", kind, ("MSE", "L1", "KL"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)
        self.task_loss = LabelCrossEntropy(from_logits)

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings, numbered where a layer stands in several pairs."""
        terms: list[FeatureDistillation] = []
        for (student, teacher), kind, weight in zip(
            self.layer_mappings, self.loss_types, self.loss_weights, strict=True
        ):
            term = FeatureDistillation(student, teacher, kind.lower(), weight=weight)
            same = sum(other.name.partition("#")[0] == term.name for other in terms)
            if same:
                name = f"{term.name}#{same + 1}"
                term = FeatureDistillation(student, teacher, kind.lower(), weight=weight, name=name)
            terms.append(term)
        return [*terms]


@keras.saving.register_keras_serializable(package="keras_distill")
class CriterionTerm(DistillationTerm):
    """A user's criterion, which makes the total itself from both outputs and the student's own loss.

    Args:
        criterion: Called with ``(student_output, teacher_output, student_loss)``, gives a scalar.
        task_loss: The student's own loss, called with the labels and its output; ``None`` where that loss itself is
            given in place of the labels, as in a loop of the user's own.
    """

    needs_labels = True

    def __init__(self, criterion: Any, task_loss: Any = None) -> None:
        super().__init__(name="criterion")
        self.criterion, self._task_loss = criterion, task_loss

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The total, a scalar."""
        loss = labels
        if self._task_loss is not None and labels is not None:
            output = select(student.output, None, "the student's output")
            loss = keras.ops.mean(self._task_loss(labels, output))
        return self.criterion(student.output, teacher.output, loss) / backends.replicas()


@keras.saving.register_keras_serializable(package="keras_distill")
class LabelCrossEntropy(keras.losses.Loss):
    """Cross entropy of labels that are numbers of classes or one-hot, as their shape says.

    Args:
        from_logits: Whether the student gives logits; if False it gives probabilities.

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
        if one_hot(y_true, y_pred):
            return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=self.from_logits)
        if len(y_true.shape) == len(y_pred.shape):
            y_true = keras.ops.squeeze(y_true, axis=-1)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {"from_logits": self.from_logits}


def one_hot(labels: Any, output: Any) -> bool:
    """Whether labels have one entry for each class of an output, rather than the number of one."""
    return len(labels.shape) == len(output.shape) and labels.shape[-1] == output.shape[-1]


def criterion_of(settings: Criterion | None) -> Any:
    """The criterion that a configuration means.

    Args:
        settings: The criterion's section, if there is one.

    Returns:
        The criterion; ``KnowledgeDistillationLoss()`` where there is no section.

    Raises:
        ValueError: If the settings do not fit each other, with their path.

    Example:
        >>> criterion_of(Criterion(KnowledgeDistillationLoss={"temperature": 2})).temperature
        2.0
    """
    if settings is None:
        return KnowledgeDistillationLoss()
    known = (KnowledgeDistillationLoss, IntermediateLayersKnowledgeDistillationLoss)
    kind, section = next((kind, found) for kind in known if (found := getattr(settings, kind.__name__)) is not None)
    try:
        return kind(**section.model_dump())
    except (TypeError, ValueError) as error:
        raise ValueError(f"distillation.train.criterion.{kind.__name__}: {error}") from None


class _DividedByClasses(DistillationLoss):
    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__(name="divided_by_classes")
        self.loss = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.loss.call(y_true, y_pred) / y_pred.shape[-1]

    @property
    def from_logits(self) -> bool:
        """As the loss has it: the term checks the outputs by it."""
        return bool(self.loss.from_logits)


def _pair_of(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    if isinstance(values, str) or len(values) != 2:
        expected = f"`{name}` to hold two entries, the student's own and the teacher's"
        raise ValueError(checks.message(expected, f"{values!r}"))
    return values[0], values[1]


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    for index, weight in enumerate(weights):
        checks.non_negative(f"loss_weights[{index}]", weight)
    return tuple(float(weight) for weight in weights)


def _mapping(index: int, entry: Any) -> tuple[Tap, Tap]:
    """The two places that an entry of ``layer_mappings`` names, in any of its forms."""
    sides: list[Any] = [*entry] if isinstance(entry, (list, tuple)) else [entry]
    if len(sides) == 1:
        sides *= 2
    elif len(sides) == 4 and not any(isinstance(side, (list, tuple)) for side in sides):
        sides = [sides[:2], sides[2:]]
    if len(sides) != 2:
        remedy = "Write [[student_layer, output], [teacher_layer, output]] to pick one of a layer's outputs."
        expected = f"`layer_mappings[{index}]` to be [student_layer, teacher_layer]"
        raise ValueError(checks.message(expected, f"{entry!r}", remedy))
    return _tap(index, sides[0]), _tap(index, sides[1])


def _tap(index: int, side: Any) -> Tap:
    layer, *rest = side if isinstance(side, (list, tuple)) and side else [side]
    if isinstance(layer, Tap):
        return layer
    output: Any = rest[0] if rest else None
    if (
        not isinstance(layer, (str, keras.layers.Layer))
        or len(rest) > 1
        or not isinstance(output, (str, int, type(None)))
    ):
        expected = f"each side of `layer_mappings[{index}]` to be a layer and perhaps an index or a key of its outputs"
        raise ValueError(checks.message(expected, f"{side!r}"))
    if isinstance(output, str):
        output = int(output) if output.isdigit() else output or None  # YAML files of the older API write "0"
    return Tap(layer, output=output)
