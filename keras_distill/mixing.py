"""How several teachers are combined: their weights, what is averaged, and which teacher an example belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from distill_core.requires import Requires
from keras_distill import backends, checks
from keras_distill.losses import BinarySoftTargetLoss, DistillationLoss, FunctionLoss
from keras_distill.recording.calls import entry_of_inputs
from keras_distill.schedules import Schedule, first_value, serialized
from keras_distill.states import NumbersState
from keras_distill.terms import DistillationTerm, FeatureDistillation, LogitsDistillation, SequenceDistillation

_MIXES = ("losses", "probabilities", "logits")


@keras.saving.register_keras_serializable(package="keras_distill")
class WeightsState(NumbersState):
    """The weights of several teachers, as variables.

    Args:
        mix: The owner of the weights.
    """

    def __init__(self, mix: TeacherMix) -> None:
        self.mix = mix
        super().__init__(mix.numbers(), name="teacher_weights")

    def current(self) -> Mapping[str, float]:
        """The weights; one of them must be greater than 0."""
        self.mix.check_sum()
        return self.mix.numbers()

    def take(self, numbers: Mapping[str, float]) -> None:
        """Accept the weights of a file."""
        self.mix.weights = list(numbers.values())


class TeacherMix:
    """The settings ``teacher_weights``, ``mix`` and ``route``.

    Args:
        weights: A weight for each teacher, 0 or greater, numbers or schedules, divided by their sum; ``"entropy"`` for
            weights by confidence; None for equal weights.
        mix: ``"losses"``, ``"probabilities"`` or ``"logits"``.
        route: A key or an index of the inputs, or a function of them, that gives the teacher of each example.

    Attributes:
        weights: The numbers; None if the weights are equal or by confidence.
        schedules: The schedules of the weights, by ``"teacher_<k>_weight"``.
        state: The variables of the weights, or None.

    Raises:
        ValueError: If a setting is not as above, or two of them exclude each other.
        TypeError: If a setting has the wrong type.
    """

    def __init__(self, weights: Any = None, mix: str = "losses", route: Any = None) -> None:
        checks.one_of("mix", mix, _MIXES)
        self.mix, self.route, self.by_entropy = mix, route, False
        self.schedules: dict[str, Schedule] = {}
        self.weights: list[float] | None = None
        if isinstance(weights, str):
            checks.one_of("teacher_weights", weights, ("entropy",))
            self.by_entropy = True
        elif weights is not None:
            if not isinstance(weights, (list, tuple)):
                expected = "`teacher_weights` to be a list of numbers, 'entropy' or None"
                raise TypeError(checks.message(expected, f"teacher_weights={weights!r}"))
            self.weights = [self._first(index, weight) for index, weight in enumerate(weights)]
            self.check_sum()
        if route is not None and not callable(route) and (isinstance(route, bool) or not isinstance(route, (str, int))):
            expected = "`route` to be a key or an index of the inputs, or a function of them"
            raise TypeError(checks.message(expected, f"route={route!r}"))
        if route is not None and (weights is not None or mix != "losses"):
            expected = "neither `teacher_weights` nor `mix` where a route gives each example one teacher"
            raise ValueError(checks.message(expected, f"teacher_weights={weights!r}, mix={mix!r}", "Leave them out."))
        self.state = None if self.weights is None else WeightsState(self)

    @property
    def plain(self) -> bool:
        """Whether each term is averaged over the teachers."""
        return self.weights is None and not self.by_entropy and self.mix == "losses" and self.route is None

    def numbers(self) -> dict[str, float]:
        """The weights by their names in the logs."""
        return {f"teacher_{index}_weight": weight for index, weight in enumerate(self.weights or [])}

    def follow(self, name: str, value: float) -> None:
        """Set one weight.

        Args:
            name: Its name in the logs.
            value: The number.
        """
        index = int(name.split("_")[1])
        checks.non_negative(f"teacher_weights[{index}]", value)
        if self.weights is not None:
            self.weights[index] = float(value)

    def assign(self, weights: Sequence[float]) -> None:
        """Set all weights, from the next step on.

        Args:
            weights: A number for each teacher.

        Raises:
            ValueError: If the model was made without numbers as weights, or with schedules; or as in the constructor.
        """
        if self.weights is None or self.schedules:
            expected = "`teacher_weights` of numbers from the beginning, to be assigned later"
            raise ValueError(checks.message(expected, f"{self.settings()['teacher_weights']!r}", "Make a new model."))
        if len(weights) != len(self.weights):
            expected = f"`teacher_weights` to hold {len(self.weights)} numbers"
            raise ValueError(checks.message(expected, f"teacher_weights={weights!r}"))
        before = list(self.weights)
        try:
            for name, weight in zip(self.numbers(), weights, strict=True):
                self.follow(name, weight)
            self.check_sum()
        except BaseException:
            self.weights = before
            raise
        if self.state is not None:
            self.state.sync()

    def settings(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        numbers = [serialized(self.schedules.get(name), number) for name, number in self.numbers().items()]
        route = keras.saving.serialize_keras_object(self.route) if callable(self.route) else self.route
        weights: Any = "entropy" if self.by_entropy else numbers or None
        return {"teacher_weights": weights, "mix": self.mix, "route": route}

    def check_sum(self) -> None:
        """Check that a weight is greater than 0.

        Raises:
            ValueError: If all are 0.
        """
        if self.weights is not None and not sum(self.weights) > 0:
            expected = "`teacher_weights` to hold a weight greater than 0"
            remedy = "Set the weight of the terms to 0 to let them rest."
            raise ValueError(checks.message(expected, f"teacher_weights={self.weights!r}", remedy))

    def check(self, teachers: int, terms: Sequence[DistillationTerm]) -> None:
        """Check that the settings fit the teachers and the terms.

        Args:
            teachers: Number of teachers.
            terms: The terms.

        Raises:
            ValueError: If they do not.
        """
        if self.plain:
            return
        if teachers < 2:
            expected = "`teacher` to be a list of two or more teachers with `teacher_weights`, `mix` or `route`"
            raise ValueError(checks.message(expected, f"{teachers}", "Pass [a, b], or leave these arguments out."))
        if self.weights is not None and len(self.weights) != teachers:
            expected = f"`teacher_weights` to hold a weight for each of the {teachers} teachers"
            raise ValueError(checks.message(expected, f"{len(self.weights)} weights"))
        for term in terms:
            if term.needs_teacher:
                self._check_term(term)

    def _check_term(self, term: DistillationTerm) -> None:
        kind, loss = f"{type(term).__name__} {term.name!r}", getattr(term, "loss", None)
        if self.mix != "losses" or self.by_entropy:
            setting = f"mix={self.mix!r}" if self.mix != "losses" else "teacher_weights='entropy'"
            if not isinstance(term, LogitsDistillation):
                remedy = 'Pass numbers as teacher_weights and mix="losses", or only LogitsDistillation.'
                raise ValueError(checks.message(f"terms on logits with {setting}", kind, remedy))
        elif self.route is not None and not isinstance(term, (LogitsDistillation, FeatureDistillation)):
            expected = "terms on logits or features with a route"
            raise ValueError(checks.message(expected, kind, "Leave `route` out."))
        elif self.route is not None and Requires.of(loss).keeps_teacher:
            expected = "a loss that keeps nothing of the batch's other examples with a route"
            received = f"{type(loss).__name__} in term {term.name!r}"
            raise ValueError(checks.message(expected, received, "Leave `route` out."))
        if self.mix == "probabilities":
            merges = term.requires.merges_classes and not getattr(loss, "standardize", False)  # type: ignore[attr-defined]
            if not merges:
                expected = "a divergence of probabilities with mix='probabilities'"
                received = f"{type(loss).__name__} in term {term.name!r}"
                raise ValueError(checks.message(expected, received, "Use one such as SoftTargetLoss, or mix='logits'."))
            if getattr(term, "curriculum", None) is not None:
                expected = f"a number or a schedule as the temperature of term {term.name!r} with mix='probabilities'"
                raise ValueError(checks.message(expected, "a CurriculumTemperature", "Use mix='losses' or 'logits'."))
        elif self.mix == "logits" and getattr(loss, "from_logits", True) is False:
            expected = "a loss with from_logits=True with mix='logits'"
            raise ValueError(checks.message(expected, f"{kind} on probabilities", "Use mix='probabilities'."))
        elif self.by_entropy and self.mix == "losses":
            self._check_rows(term, "teacher_weights='entropy'")

    def _check_rows(self, term: DistillationTerm, setting: str) -> None:
        """Check that a term applies weights of examples as factors.

        Raises:
            ValueError: If it does not.
        """
        loss = getattr(term, "loss", None)
        whole = isinstance(loss, DistillationLoss) and loss.gives == "batch"
        divides = getattr(loss, "reduction", None) == "mean_with_sample_weight"
        tokens = isinstance(term, SequenceDistillation)
        if whole or divides or tokens or isinstance(loss, (FunctionLoss, BinarySoftTargetLoss)):
            expected = f"a loss with a value for each example with {setting}"
            received = f"{type(loss).__name__} in {type(term).__name__} {term.name!r}"
            remedy = "Use one such as SoftTargetLoss in a LogitsDistillation."
            raise ValueError(checks.message(expected, received, remedy))

    def check_routed_parts(self, term: DistillationTerm) -> None:
        """Check that a term whose teachers have features of their own shapes can be routed.

        Raises:
            ValueError: If its loss compares the examples of a batch.
        """
        self._check_rows(term, "a route between teachers whose features differ")

    # A step -----------------------------------------------------------------------------------------------------------

    def shares(self, teachers: int) -> Any:
        """The weights of the teachers, divided by their sum.

        Args:
            teachers: Number of teachers.

        Returns:
            Shape ``(teachers,)``.
        """
        if self.state is None:
            return ops.full((teachers,), 1.0 / teachers)
        weights = ops.stack([1.0 * self.state.number(name) for name in self.numbers()])
        return weights / ops.sum(weights)

    def teacher_of(self, inputs: Any, teachers: int, rows: Any) -> Any:
        """The teacher of each example.

        Args:
            inputs: The batch's inputs.
            teachers: Number of teachers.
            rows: Number of examples, or None if only the running graph knows it.

        Returns:
            Integers ``(N,)``.

        Raises:
            ValueError: If the inputs do not hold the route, it is not one integer for each example, or it names no
                teacher of the list. Under XLA, which has no errors, the loss of such a batch is NaN.
        """
        named = self.named(inputs)
        named = ops.convert_to_tensor(named)
        if len(named.shape) == 2 and named.shape[-1] == 1:
            named = ops.squeeze(named, axis=-1)
        dtype = keras.backend.standardize_dtype(named.dtype)
        if len(named.shape) != 1 or not keras.backend.is_int_dtype(dtype) or checks.shapes_differ(named.shape, (rows,)):
            expected = "`route` to give the index of a teacher for each example, integers of shape (N,)"
            raise ValueError(checks.message(expected, f"{dtype} of shape {tuple(named.shape)}"))
        named = ops.cast(named, "int32")
        words = f"Expected `route` to name one of the {teachers} teachers, 0 to {teachers - 1}, for every example."
        return backends.within_range(named, teachers, words)

    def named(self, inputs: Any) -> Any:
        """The route's part of the inputs.

        Args:
            inputs: The batch's inputs.

        Returns:
            The tensor, unchecked.

        Raises:
            ValueError: If the inputs do not hold it.
        """
        remedy = "Pass the inputs as a dict, with the index of each example's teacher under this key."
        return entry_of_inputs(inputs, self.route, "route", remedy)

    def _first(self, index: int, weight: Any) -> float:
        schedules: dict[str, Schedule] = {}
        number = first_value(f"teacher_weights[{index}]", weight, checks.non_negative, schedules)
        self.schedules.update({f"teacher_{index}_weight": schedule for schedule in schedules.values()})
        return number
