"""Checks and settings that the launchers' criteria share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from distill_core.launcher.conf import only_setting
from distill_core.launcher.words import Words, warn

_T = TypeVar("_T")


class Place(NamedTuple):
    """One side of an entry of ``layer_mappings``: a layer, and optionally one of its outputs."""

    layer: Any
    output: Any


class CriterionChecks:
    """Checks of the criteria's settings.

    Args:
        checks: The module ``checks`` of a half.
        layers: The types that can name a layer.
        outputs: Function that tells whether a value can name one of a layer's outputs.
    """

    def __init__(self, checks: Words, layers: tuple[type, ...], outputs: Callable[[Any], bool]) -> None:
        self._checks, self._layers, self._outputs = checks, layers, outputs

    def knowledge(
        self, temperature: float, loss_types: Sequence[str], loss_weights: Sequence[float], reference_reduction: bool
    ) -> tuple[float, tuple[str, str], tuple[float, float]]:
        """Check the settings of ``KnowledgeDistillationLoss``, and warn if the weights do not sum to 1.

        Returns:
            Temperature, types and weights.

        Raises:
            ValueError: If a type is unknown, a weight is negative, or the temperature is not greater than 0.
            TypeError: If a setting has the wrong type.
        """
        self._checks.positive("temperature", temperature)
        self._checks.boolean("reference_reduction", reference_reduction)
        task, distillation = self._two("loss_types", loss_types)
        self._checks.one_of("loss_types[0]", task, ("CE", "MSE"))
        self._checks.one_of("loss_types[1]", distillation, ("CE", "KL", "MSE"))
        weights = self._weights(self._two("loss_weights", loss_weights))
        if abs(sum(weights) - 1.0) > 1e-6:
            warn(f"The loss weights {[*weights]} do not sum to 1. They are used unchanged; the older API refused them.")
        return float(temperature), (task, distillation), (weights[0], weights[1])

    def each(
        self,
        number: int,
        types: Sequence[str] | None,
        weights: Sequence[float] | None,
        default: str,
        known: tuple[str, ...],
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """A type and a weight for each of ``number`` mappings.

        Raises:
            ValueError: If their numbers differ, a type is unknown, or a weight is negative.
        """
        types = [default] * number if types is None else [*types]
        weights = [1.0 / number] * number if weights is None else [*weights]
        for name, values in (("loss_types", types), ("loss_weights", weights)):
            if len(values) != number:
                expected = f"`{name}` to hold {number} entries, as `layer_mappings` does"
                raise ValueError(self._checks.message(expected, f"{len(values)} entries"))
        for index, kind in enumerate(types):
            self._checks.one_of(f"loss_types[{index}]", kind, known)
        return tuple(types), self._weights(weights)

    def mappings(self, mappings: Sequence[Any]) -> list[tuple[Place, Place]]:
        """The two places of each entry of ``layer_mappings``, in any of its forms.

        Raises:
            ValueError: If the list is empty, or an entry has another form.
        """
        return [self._mapping(f"layer_mappings[{index}]", entry) for index, entry in enumerate(self._filled(mappings))]

    def groups(self, mappings: Sequence[Any]) -> list[list[tuple[Place, Place]]]:
        """The two places of each pair in each group of ``layer_mappings``.

        Raises:
            ValueError: If the list is empty, or an entry is not a group of pairs.
        """
        groups = []
        for index, group in enumerate(self._filled(mappings)):
            pairs = [] if isinstance(group, str) else [*group]
            if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
                expected = f"`layer_mappings[{index}]` to be a group of pairs, [[shallow, deep], ...]"
                raise ValueError(self._checks.message(expected, f"{group!r}"))
            groups.append([self._mapping(f"layer_mappings[{index}]", pair) for pair in pairs])
        return groups

    def _mapping(self, name: str, entry: Any) -> tuple[Place, Place]:
        sides: list[Any] = [*entry] if isinstance(entry, (list, tuple)) else [entry]
        if len(sides) == 1:
            sides *= 2
        elif len(sides) == 4 and not any(isinstance(side, (list, tuple)) for side in sides):
            sides = [sides[:2], sides[2:]]
        if len(sides) != 2:
            remedy = "Write [[student_layer, output], [teacher_layer, output]] to pick one of a layer's outputs."
            expected = f"`{name}` to be [student_layer, teacher_layer]"
            raise ValueError(self._checks.message(expected, f"{entry!r}", remedy))
        return self._place(name, sides[0]), self._place(name, sides[1])

    def _place(self, name: str, side: Any) -> Place:
        layer, *rest = side if isinstance(side, (list, tuple)) and side else [side]
        output: Any = rest[0] if rest else None
        if isinstance(output, str):
            output = int(output) if output.isdigit() else output or None  # YAML files of the older API write "0"
        if not isinstance(layer, self._layers) or len(rest) > 1 or not (output is None or self._outputs(output)):
            expected = f"each side of `{name}` to be a layer, or a layer and one of its outputs"
            raise ValueError(self._checks.message(expected, f"{side!r}"))
        return Place(layer, output)

    def _two(self, name: str, values: Sequence[_T]) -> tuple[_T, _T]:
        if isinstance(values, str) or len(values) != 2:
            expected = f"`{name}` to hold two entries, the student's own and the teacher's"
            raise ValueError(self._checks.message(expected, f"{values!r}"))
        return values[0], values[1]

    def _weights(self, weights: Sequence[float]) -> tuple[float, ...]:
        for index, weight in enumerate(weights):
            self._checks.non_negative(f"loss_weights[{index}]", weight)
        return tuple(float(weight) for weight in weights)

    def _filled(self, mappings: Sequence[Any]) -> Sequence[Any]:
        if isinstance(mappings, str) or not len(mappings):
            received = f"layer_mappings={mappings!r}"
            raise ValueError(self._checks.message("`layer_mappings` to be a list of pairs", received))
        return mappings


def weighted_total(weights: tuple[float, float], student_loss: Any, divergence: Callable[[], Any]) -> Any:
    """The total of ``KnowledgeDistillationLoss``, without a part whose weight is 0, even if that part is not finite.

    Args:
        weights: Weights of the student's own loss and of the divergence.
        student_loss: The student's own loss, a scalar.
        divergence: Computes the divergence; called only if it is needed.

    Returns:
        A scalar.

    Example:
        >>> weighted_total((0.25, 0.5), 2.0, lambda: 3.0), weighted_total((0.0, 0.5), float("nan"), lambda: 3.0)
        (2.0, 1.5)
    """
    task, distillation = weights
    parts = [] if task == 0 else [task * student_loss]
    if distillation != 0 or not parts:
        parts.append(distillation * divergence())
    return sum(parts[1:], parts[0])


def distinct(name: str, taken: Iterable[str]) -> str:
    """A name for a term: a number is added if earlier terms already have the name.

    Example:
        >>> distinct("body", ["body", "body#2", "head"])
        'body#3'
    """
    same = sum(other.partition("#")[0] == name for other in taken)
    return f"{name}#{same + 1}" if same else name


def configured(section: Any, kinds: Sequence[type[Any]], path: str = "distillation.train.criterion") -> Any:
    """The criterion of a configuration's section.

    Args:
        section: The section, in which one criterion is set; if None, the first kind with its default settings is used.
        kinds: The classes of criteria.
        path: Path of the section, for messages.

    Returns:
        The criterion.

    Raises:
        ValueError: If the settings are inconsistent; the message names their path.
    """
    if section is None:
        return kinds[0]()
    name, settings = only_setting(section)
    kind = next(kind for kind in kinds if kind.__name__ == name)
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}.{name}: {error}") from None
