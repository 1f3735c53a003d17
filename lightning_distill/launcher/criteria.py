"""The launcher's criteria: the older API's names for a task weight and some terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_core.launcher.criteria import CriterionChecks, Place, configured, distinct, weighted_total
from lightning_distill import checks
from lightning_distill.losses import FeatureDistance, LogitMSELoss, SoftCrossEntropyLoss, SoftTargetLoss
from lightning_distill.recording import Tap, select
from lightning_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation, SelfDistillation

Loss = Callable[[Tensor, Tensor], Tensor]
_TASK_LOSSES: dict[str, Loss] = {"CE": F.cross_entropy, "MSE": F.mse_loss}
_CHECKS = CriterionChecks(checks, (str, Tap), lambda output: isinstance(output, (int, str)) or callable(output))


class KnowledgeDistillationLoss:
    r"""The student's own loss and the divergence of its soft targets from the teacher's.

    .. math:: w_0 \, L_{student} + w_1 \, T^2 \, D(z_s / T, z_t / T)

    D is CE (cross entropy under the soft targets), KL (in nats, summed over the classes) or MSE (mean over the
    classes), averaged over the examples. A weight of 0 leaves its part out: at :math:`w_1 = 0` the teacher never runs.

    Args:
        temperature: Softening of both models' outputs, greater than 0.
        loss_types: The student's own loss in built-in training, ``"CE"`` or ``"MSE"``; and D.
        loss_weights: :math:`w_0` and :math:`w_1`, 0 or greater. If they do not sum to 1, which the older API required,
            a warning is issued.
        reference_reduction: Whether KL is divided by the number of classes too, as it was in the older API.

    Raises:
        TypeError: If a setting has the wrong type.
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
        settings = _CHECKS.knowledge(temperature, loss_types, loss_weights, reference_reduction)
        self.temperature, self.loss_types, self.loss_weights = settings
        self.reference_reduction = reference_reduction
        self.task_weight, self.task_loss = self.loss_weights[0], _TASK_LOSSES[self.loss_types[0]]
        self.loss: Any = {
            "CE": SoftCrossEntropyLoss(temperature=self.temperature),
            "KL": SoftTargetLoss(temperature=self.temperature),
            "MSE": LogitMSELoss(),  # T^2 times the mean square of (z_s - z_t) / T: the temperature cancels
        }[self.loss_types[1]]
        if self.loss_types[1] == "KL" and reference_reduction:
            self.loss = _Divided(self.loss, by_classes=True)

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

        def divergence() -> Tensor:
            student = select(student_output, None, "student output")
            value: Tensor = self.loss(student, select(teacher_output, None, "teacher output"))
            return value

        total: Tensor = weighted_total(self.loss_weights, student_loss, divergence)
        return total


class IntermediateLayersKnowledgeDistillationLoss:
    """Distances between layers of the two models, through adapters where their shapes differ.

    Args:
        layer_mappings: One entry for each pair of layers: ``[student, teacher]``, ``[[student, output], [teacher,
            output]]``, ``[student, output, teacher, output]``, or the name alone where both models have it. An output
            is an index, a key or a function that picks a tensor; ``""`` is the whole model.
        loss_types: ``"MSE"``, ``"L1"`` or ``"KL"`` for each pair; ``None`` is MSE for all.
        loss_weights: Factor of each pair, 0 or greater; ``None`` gives all the same share of 1.
        add_origin_loss: Whether the student's own loss is added, at full weight.
        reference_reduction: Whether KL is computed as in the older API: over the last dimension, softened only if it
            does not sum to one yet, the mean over all elements.

    Raises:
        TypeError: If a setting has the wrong type.
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
        checks.boolean("add_origin_loss", add_origin_loss)
        checks.boolean("reference_reduction", reference_reduction)
        self.layer_mappings = [(_tap(student), _tap(teacher)) for student, teacher in _CHECKS.mappings(layer_mappings)]
        number = len(self.layer_mappings)
        self.loss_types, self.loss_weights = _CHECKS.each(number, loss_types, loss_weights, "MSE", ("MSE", "L1", "KL"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)
        self.reference_reduction = reference_reduction

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings."""
        terms: list[DistillationTerm] = []
        for (student, teacher), kind, weight in zip(
            self.layer_mappings, self.loss_types, self.loss_weights, strict=True
        ):
            loss = _reference_kl if kind == "KL" and self.reference_reduction else FeatureDistance(kind.lower())  # type: ignore[arg-type]
            name = distinct(student.layer or "output", [term.name for term in terms])
            terms.append(FeatureDistillation(student, teacher, loss, weight=weight, name=name))
        return terms


class SelfKnowledgeDistillationLoss:
    r"""Distances between shallow layers of a model and its deep ones, from which they learn.

    .. math:: \sum_g w_g \sum_{(s, d) \in g} D_g(F_s, F_d)

    In a loop of your own, ``student_output`` may be a dict of tensors that holds every name of ``layer_mappings``: then
    those tensors are compared, and gradients reach the adaptation layers that you put between. Otherwise the names are
    layers of the student. The deep side of a pair is the target and gets no gradient.

    Args:
        layer_mappings: Groups of pairs ``[shallow, deep]`` of layers of the one model, or of keys of its output, one
            group for each loss.
        temperature: Softening of the soft targets in KL and CE, greater than 0.
        loss_types: ``"L2"`` (the Frobenius norm of the difference), ``"KL"`` (in nats, summed over the classes, mean
            over the examples) or ``"CE"`` (the same with cross entropy) for each group; ``None`` is CE for all. Like
            the older API's, this criterion has no factor T² for KL and CE: multiply ``loss_weights`` by it to have it.
        loss_weights: Factor of each group, 0 or greater; ``None`` gives all the same share of 1.
        add_origin_loss: Whether the student's own loss is added, at full weight.
        reference_reduction: Whether KL is divided by the number of classes too, as it was in the older API.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a mapping has another form, a type is unknown, a weight is negative, or their numbers differ.

    Example:
        >>> criterion = SelfKnowledgeDistillationLoss([[["exit1", "exit3"], ["exit2", "exit3"]]], 3.0, ["KL"], [0.5])
        >>> [term.name for term in criterion.terms()]
        ['exit1', 'exit2']
        >>> criterion = SelfKnowledgeDistillationLoss([[["shallow", "deep"]]], loss_types=["L2"])
        >>> features = {"shallow": torch.tensor([[3.0, 0.0]]), "deep": torch.tensor([[0.0, 4.0]])}
        >>> criterion(features, None, torch.tensor(1.0))
        tensor(5.)

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
        *,
        reference_reduction: bool = False,
    ) -> None:
        checks.positive("temperature", temperature)
        checks.boolean("add_origin_loss", add_origin_loss)
        checks.boolean("reference_reduction", reference_reduction)
        self.temperature, self.reference_reduction = float(temperature), reference_reduction
        self.layer_mappings = [
            [(_tap(shallow), _tap(deep)) for shallow, deep in group] for group in _CHECKS.groups(layer_mappings)
        ]
        number = len(self.layer_mappings)
        self.loss_types, self.loss_weights = _CHECKS.each(number, loss_types, loss_weights, "CE", ("L2", "KL", "CE"))
        self.add_origin_loss, self.task_weight = add_origin_loss, float(add_origin_loss)

    @property
    def names(self) -> list[str]:
        """The names in the mappings, each once: layers of the student, or keys of its output."""
        taps = [tap for group in self.layer_mappings for pair in group for tap in pair]
        return list(dict.fromkeys(tap.layer for tap in taps))

    def reads(self, student_output: Any) -> bool:
        """Whether an output is a dict that holds every name in the mappings."""
        return isinstance(student_output, Mapping) and all(name in student_output for name in self.names)

    def terms(self) -> list[DistillationTerm]:
        """New terms with these settings, which read layers of the student."""
        losses = self._losses()
        terms: list[DistillationTerm] = []
        for group, kind, weight in zip(self.layer_mappings, self.loss_types, self.loss_weights, strict=True):
            for shallow, deep in group:
                name = distinct(shallow.layer or "output", [term.name for term in terms])
                terms.append(SelfDistillation(shallow, deep, losses[kind], weight=weight, name=name))
        return terms

    def __call__(self, student_output: Mapping[str, Any], teacher_output: Any, student_loss: Tensor) -> Tensor:
        """The total loss of a dict of tensors.

        Args:
            student_output: The tensors by the names in the mappings, each of shape ``(N, ...)``; logits ``(N, C)`` for
                KL and CE.
            teacher_output: Not used.
            student_loss: The student's own loss, a scalar.

        Returns:
            A scalar.

        Raises:
            ValueError: If a name is missing, or the shapes of a pair differ.
        """
        losses = self._losses()
        parts = [student_loss] if self.add_origin_loss else []
        for group, kind, weight in zip(self.layer_mappings, self.loss_types, self.loss_weights, strict=True):
            for shallow, deep in group if weight else []:
                feature, target = self._feature(student_output, shallow), self._feature(student_output, deep).detach()
                remedy = "Put an adaptation layer between them."
                checks.same_shape(feature, target, names=(shallow.layer, deep.layer), remedy=remedy)
                parts.append(weight * losses[kind](feature, target))
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())

    def _feature(self, output: Mapping[str, Any], tap: Tap) -> Tensor:
        if tap.layer not in output:
            keys = [str(key) for key in output]
            expected = f"`student_output` to be a dict that holds {tap.layer!r}, a name in `layer_mappings`"
            raise ValueError(checks.message(expected, f"keys {keys}", checks.closest(tap.layer, keys)))
        return select(output[tap.layer], tap.output, f"student_output[{tap.layer!r}]")

    def _losses(self) -> dict[str, Any]:
        square = self.temperature**2  # by which the losses on logits multiply
        soft = SoftTargetLoss(temperature=self.temperature)
        return {
            "L2": torch.dist,
            "KL": _Divided(soft, square, by_classes=self.reference_reduction),
            "CE": _Divided(SoftCrossEntropyLoss(temperature=self.temperature), square),
        }


def criterion_of(section: Any) -> Any:
    """The criterion of a configuration's section ``distillation.train.criterion``.

    Args:
        section: The section; None is ``KnowledgeDistillationLoss()``.

    Returns:
        The criterion.

    Raises:
        ValueError: If the settings are inconsistent; the message names their path.

    Example:
        >>> from lightning_distill import DistillationConf
        >>> settings = {"KnowledgeDistillationLoss": {"temperature": 2}}
        >>> train = DistillationConf(distillation={"train": {"criterion": settings}}).distillation.train
        >>> criterion_of(train.criterion).temperature
        2.0
    """
    return configured(
        section,
        (
            KnowledgeDistillationLoss,
            IntermediateLayersKnowledgeDistillationLoss,
            SelfKnowledgeDistillationLoss,
        ),
    )


class _Divided(nn.Module):
    """A loss divided by a number, and perhaps by the number of classes."""

    def __init__(self, loss: nn.Module, divisor: float = 1.0, *, by_classes: bool = False) -> None:
        super().__init__()
        self.loss, self.divisor, self.by_classes = loss, divisor, by_classes

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value: Tensor = self.loss(student_logits, teacher_logits)
        return value / (self.divisor * (student_logits.shape[-1] if self.by_classes else 1))


def _reference_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence along the last dimension as in the older API: the mean over all elements."""

    def probabilities(values: Tensor) -> Tensor:
        normalized = ((values.sum(-1) - 1.0).abs() < 0.2).all()  # the older API's tolerance
        return values if normalized else values.softmax(-1)

    target = probabilities(teacher)
    return (target * ((target + 1e-9).log() - (probabilities(student) + 1e-9).log())).mean()


def _tap(place: Place) -> Tap:
    return place.layer if isinstance(place.layer, Tap) else Tap(place.layer, output=place.output)
