"""The launcher's criteria: the older API's names for a task weight and some terms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.losses import FeatureDistance, LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from lightning_distill.recording import Tap, select
from lightning_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation, SelfDistillation

Loss = Callable[[Tensor, Tensor], Tensor]
_TASK_LOSSES: dict[str, Loss] = {"CE": F.cross_entropy, "MSE": F.mse_loss}


class KnowledgeDistillationLoss:
    r"""The student's own loss and the divergence of its soft targets from the teacher's.

    .. math:: w_0 \, L_{student} + w_1 \, T^2 \, D(z_s / T, z_t / T)

    D is CE (cross entropy under the soft targets), KL (in nats, summed over the classes) or MSE (mean over the
    classes), averaged over the examples. A weight of 0 leaves its part out: at :math:`w_1 = 0` the teacher never runs.

    Args:
        temperature: Softening of both models' outputs, greater than 0.
        loss_types: The student's own loss in built-in training, ``"CE"`` or ``"MSE"``; and D.
        loss_weights: :math:`w_0` and :math:`w_1`, 0 or greater. They need not sum to 1; a warning says so, because the
            older API demanded it.
        reference_reduction: Whether KL is divided by the number of classes too, as it was in the older API.

    Raises:
        ValueError: If a type is unknown, a weight is negative, or the temperature is not greater than 0.

    Example:
        >>> criterion = KnowledgeDistillationLoss(temperature=2.0, loss_types=["CE", "KL"], loss_weights=[0.5, 0.5])
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]])
        >>> criterion(student, teacher, torch.tensor(1.0))
        tensor(0.7847)

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        loss_types: Sequence[str] = ("CE", "CE"),
        loss_weights: Sequence[float] = (0.5, 0.5),
        *,
        reference_reduction: bool = False,
    ) -> None:
        checks.positive("temperature", temperature)
        task, distillation = _pair_of("loss_types", loss_types)
        checks.one_of("loss_types[0]", task, tuple(_TASK_LOSSES))
        checks.one_of("loss_types[1]", distillation, ("CE", "KL", "MSE"))
        weights = _weights(_pair_of("loss_weights", loss_weights))
        if abs(sum(weights) - 1.0) > 1e-6:
            told = "They are used as they are; the older API refused them."
            warnings.warn(f"The loss weights {[*weights]} do not sum to 1. {told}", stacklevel=2)
        self.temperature, self.loss_types, self.loss_weights = float(temperature), (task, distillation), weights
        self.reference_reduction = reference_reduction
        self.task_weight, self.task_loss = weights[0], _TASK_LOSSES[task]
        self.loss: Any = {
            "CE": SoftCrossEntropyLoss(temperature=self.temperature),
            "KL": SoftTargetLoss(temperature=self.temperature),
            "MSE": LogitMSELoss(),  # T^2 times the mean square of (z_s - z_t) / T: the temperature cancels
        }[distillation]
        if distillation == "KL" and reference_reduction:
            self.loss = _DividedByClasses(self.loss)

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings."""
        return [LogitsDistillation(self.loss, weight=self.loss_weights[1], name="knowledge")]

    def __call__(self, student_output: Any, teacher_output: Any, student_loss: Tensor) -> Tensor:
        """The total loss.

        Args:
            student_output: The student's output, with logits ``(N, C)`` in it.
            teacher_output: The teacher's.
            student_loss: The student's own loss, a scalar.

        Returns:
            A scalar.
        """
        task, distillation = self.loss_weights
        parts = [] if task == 0 else [task * student_loss]
        if distillation != 0 or not parts:
            logits = (select(student_output, None, "student output"), select(teacher_output, None, "teacher output"))
            parts.append(distillation * self.loss(*logits))
        return sum(parts[1:], parts[0])


class IntermediateLayersKnowledgeDistillationLoss:
    """Distances between layers of the two models, through adapters where their shapes differ.

    Args:
        layer_mappings: One entry for each pair of layers: ``[student, teacher]``, ``[[student, output], [teacher,
            output]]``, ``[student, output, teacher, output]``, or the name alone where both models have it. An output
            is an index, a key or a function that picks a tensor; ``""`` is the whole model.
        loss_types: ``"MSE"``, ``"L1"`` or ``"KL"`` for each pair; ``None`` is MSE for all.
        loss_weights: Factor of each pair, 0 or greater; ``None`` shares 1 equally.
        add_origin_loss: Whether the student's own loss is added, at full weight.
        reference_reduction: Whether KL is computed as in the older API: over the last dimension, softened only if it
            does not sum to one yet, the mean over all elements.

    Raises:
        ValueError: If a mapping has another form, a type is unknown, a weight is negative, or their numbers differ.

    Example:
        >>> criterion = IntermediateLayersKnowledgeDistillationLoss([["layer1", "layer2"], "head"], ["MSE", "KL"])
        >>> [(term.student_taps[0].layer, term.teacher_taps[0].layer, term.weight) for term in criterion.terms()]
        [('layer1', 'layer2', 0.5), ('head', 'head', 0.5)]
    """

    task_loss: Loss = staticmethod(F.cross_entropy)

    def __init__(
        self,
        layer_mappings: Sequence[Any],
        loss_types: Sequence[str] | None = None,
        loss_weights: Sequence[float] | None = None,
        add_origin_loss: bool = False,
        *,
        reference_reduction: bool = False,
    ) -> None:
        self.layer_mappings = [_mapping(index, entry) for index, entry in enumerate(_filled(layer_mappings))]
        number = len(self.layer_mappings)
        self.loss_types, self.loss_weights = _each(number, loss_types, loss_weights, "MSE", ("MSE", "L1", "KL"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)
        self.reference_reduction = reference_reduction

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings."""
        terms: list[DistillationTerm] = []
        for (student, teacher), kind, weight in zip(
            self.layer_mappings, self.loss_types, self.loss_weights, strict=True
        ):
            loss = _reference_kl if kind == "KL" and self.reference_reduction else FeatureDistance(kind.lower())  # type: ignore[arg-type]
            name = _name(student.layer, terms)
            terms.append(FeatureDistillation(student, teacher, loss, weight=weight, name=name))
        return terms


class SelfKnowledgeDistillationLoss:
    """Distances between shallow layers of a model and its deep ones, from which they learn.

    Args:
        layer_mappings: Groups of pairs ``[shallow, deep]`` of layers of the one model, one group for each loss.
        temperature: Softening of the soft targets in KL and CE, greater than 0.
        loss_types: ``"L2"`` (the Frobenius norm of the difference), ``"KL"`` (summed over the classes, mean over the
            examples, times T²) or ``"CE"`` (the same with cross entropy) for each group; ``None`` is CE for all.
        loss_weights: Factor of each group, 0 or greater; ``None`` shares 1 equally.
        add_origin_loss: Whether the student's own loss is added, at full weight.

    Raises:
        ValueError: If a mapping has another form, a type is unknown, a weight is negative, or their numbers differ.

    Example:
        >>> criterion = SelfKnowledgeDistillationLoss([[["exit1", "exit3"], ["exit2", "exit3"]]], 3.0, ["KL"], [0.5])
        >>> [term.name for term in criterion.terms()]
        ['exit1', 'exit2']

    References:
        Zhang et al. (2019). Be Your Own Teacher, arXiv:1905.08094.
    """

    task_loss: Loss = staticmethod(F.cross_entropy)

    def __init__(
        self,
        layer_mappings: Sequence[Sequence[Sequence[str]]],
        temperature: float = 1.0,
        loss_types: Sequence[str] | None = None,
        loss_weights: Sequence[float] | None = None,
        add_origin_loss: bool = False,
    ) -> None:
        checks.positive("temperature", temperature)
        self.temperature = float(temperature)
        self.layer_mappings = [
            [_mapping(index, pair) for pair in _group(index, group)]
            for index, group in enumerate(_filled(layer_mappings))
        ]
        number = len(self.layer_mappings)
        self.loss_types, self.loss_weights = _each(number, loss_types, loss_weights, "CE", ("L2", "KL", "CE"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings."""
        losses: dict[str, Any] = {
            "L2": torch.dist,
            "KL": SoftTargetLoss(temperature=self.temperature),
            "CE": SoftCrossEntropyLoss(temperature=self.temperature),
        }
        terms: list[DistillationTerm] = []
        for group, kind, weight in zip(self.layer_mappings, self.loss_types, self.loss_weights, strict=True):
            for shallow, deep in group:
                name = _name(shallow.layer, terms)
                terms.append(SelfDistillation(shallow, deep, losses[kind], weight=weight, name=name))
        return terms


class _DividedByClasses(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value: Tensor = self.loss(student_logits, teacher_logits)
        return value / student_logits.shape[-1]


def _reference_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all elements of the divergence along the last dimension, as the older API has it."""

    def probabilities(values: Tensor) -> Tensor:
        given = ((values.sum(-1) - 1.0).abs() < 0.2).all()  # its own tolerance
        return values if given else values.softmax(-1)

    target = probabilities(teacher)
    return (target * ((target + 1e-9).log() - (probabilities(student) + 1e-9).log())).mean()


def _pair_of(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    if isinstance(values, str) or len(values) != 2:
        raise ValueError(
            f"Expected `{name}` to hold two entries, the student's own and the teacher's, but got {values!r}."
        )
    return values[0], values[1]


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    for index, weight in enumerate(weights):
        checks.non_negative(f"loss_weights[{index}]", weight)
    return tuple(float(weight) for weight in weights)


def _each(
    number: int, types: Sequence[str] | None, weights: Sequence[float] | None, default: str, known: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """A type and a weight for each of ``number`` entries."""
    types = [default] * number if types is None else [*types]
    weights = [1.0 / number] * number if weights is None else [*weights]
    for name, values in (("loss_types", types), ("loss_weights", weights)):
        if len(values) != number:
            raise ValueError(
                f"Expected `{name}` to hold {number} entries, as `layer_mappings` does, but got {len(values)}."
            )
    for index, kind in enumerate(types):
        checks.one_of(f"loss_types[{index}]", kind, known)
    return tuple(types), _weights(weights)


def _filled(mappings: Sequence[Any]) -> Sequence[Any]:
    if isinstance(mappings, str) or not len(mappings):
        raise ValueError(f"Expected `layer_mappings` to be a list of pairs, but got layer_mappings={mappings!r}.")
    return mappings


def _group(index: int, group: Any) -> Sequence[Any]:
    pairs = [] if isinstance(group, str) else [*group]
    if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"Expected `layer_mappings[{index}]` to be a group of pairs, [[shallow, deep], ...], but got {group!r}."
        )
    return pairs


def _mapping(index: int, entry: Any) -> tuple[Tap, Tap]:
    """The two places that an entry of ``layer_mappings`` names, in any of its forms."""
    sides: list[Any] = [entry] if isinstance(entry, str) else [*entry]
    if len(sides) == 1:
        sides *= 2
    elif len(sides) == 4 and not any(isinstance(side, (list, tuple)) for side in sides):
        sides = [sides[:2], sides[2:]]
    if len(sides) != 2:
        raise ValueError(
            f"Expected `layer_mappings[{index}]` to be [student_layer, teacher_layer], but got {entry!r}. Write"
            " [[student_layer, output], [teacher_layer, output]] to pick one of a layer's outputs."
        )
    return _tap(index, sides[0]), _tap(index, sides[1])


def _tap(index: int, side: Any) -> Tap:
    layer, *rest = [side] if isinstance(side, (str, Tap)) else [*side]
    if isinstance(layer, Tap):
        return layer
    if not isinstance(layer, str) or len(rest) > 1:
        raise ValueError(
            f"Expected each side of `layer_mappings[{index}]` to be a layer's name and perhaps one output, but got"
            f" {side!r}."
        )
    output: Any = rest[0] if rest else None
    if isinstance(output, str):
        output = int(output) if output.isdigit() else output or None  # YAML files of the older API write "0"
    return Tap(layer, output=output)


def _name(layer: str, terms: Sequence[DistillationTerm]) -> str:
    """A name that no earlier term has."""
    layer = layer or "output"
    same = sum(term.name.partition("#")[0] == layer for term in terms)
    return f"{layer}#{same + 1}" if same else layer
