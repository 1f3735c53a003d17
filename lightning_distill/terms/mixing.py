"""The values of a term for several teachers: weighted losses, one loss to a mixture, or a teacher for each example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distill_core.checks import about_teacher
from lightning_distill import checks
from lightning_distill.functional.inputs import resolve_class_dim, rows_mask
from lightning_distill.functional.mixtures import confidence_weights, mean_logits, mixture_logits
from lightning_distill.losses.base import FormulaLoss
from lightning_distill.recording import Call
from lightning_distill.schedules import Schedule, Setting
from lightning_distill.teachers.group import TeacherGroup
from lightning_distill.teachers.route import Place, Route
from lightning_distill.teachers.source import TeacherEnsemble
from lightning_distill.terms.base import DistillationTerm
from lightning_distill.terms.logits import LogitsDistillation
from lightning_distill.terms.losses import value_of
from lightning_distill.terms.mixed_calls import MixedCall, PartCall, alike, assembled, examples_of

Weights = Sequence[float | Schedule] | str | None
_POSITIONS = ("mask", "ignore_index", "boxes", "index")  # settings of a term that read the whole batch


class TeacherWeight:
    """The weight of one of several teachers.

    Args:
        weight: The weight, 0 or greater, or a schedule.

    Attributes:
        schedules: The schedule, if there is one.
    """

    weight = Setting(checks.non_negative)
    schedules: dict[str, Schedule]

    def __init__(self, weight: float | Schedule) -> None:
        self.weight = weight


class TeacherMix:
    """How the outputs of several teachers become the value of a term.

    Args:
        weights: A weight for each teacher, 0 or greater, numbers or schedules, divided by their sum; ``"entropy"`` for
            weights by the confidence of each teacher in each example; ``None`` for equal weights.
        mix: ``"losses"`` is the weighted mean of the losses to each teacher, ``"probabilities"`` one loss to the
            weighted mean of the softened probabilities, ``"logits"`` one loss to the weighted mean of the logits.
        route: Where a batch keeps the index of each example's teacher; ``None`` lets all teachers answer.

    Attributes:
        weights: The weights; ``None`` if they are equal or by confidence.
        route: Finds the teacher of each example; ``None`` without a route.

    Raises:
        ValueError: If a setting is not as above, or two of them exclude each other.
        TypeError: If a weight is not a number.
    """

    def __init__(self, weights: Weights = None, mix: str = "losses", route: Place | None = None) -> None:
        checks.one_of("mix", mix, ("losses", "probabilities", "logits"))
        if isinstance(weights, str):
            checks.one_of("teacher_weights", weights, ("entropy",))
        self.by_entropy, self.mix = weights == "entropy", mix
        self.weights: list[TeacherWeight] | None = None
        if weights is not None and not isinstance(weights, str):
            if not isinstance(weights, Sequence):
                raise TypeError(
                    f"Expected `teacher_weights` to be a list of numbers, 'entropy' or None, but got {weights!r}."
                )
            for index, weight in enumerate(weights):
                if not isinstance(weight, Schedule):
                    checks.non_negative(f"teacher_weights[{index}]", weight)
            self.weights = [TeacherWeight(cast(float, weight)) for weight in weights]
            self.shares()
        self.route = None if route is None else Route(route)
        if self.route is not None and not (weights is None and mix == "losses"):
            raise ValueError(
                "Expected neither `teacher_weights` nor `mix` where a route gives each example one teacher, but got"
                f" teacher_weights={weights!r} and mix={mix!r}. Leave them out."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherMix:
        other = copy.copy(self)  # not deeply: the function of a route may hold networks
        other.weights = copy.deepcopy(self.weights, memo)
        return other

    @property
    def plain(self) -> bool:
        """Whether each term is averaged over the teachers."""
        return self.weights is None and not self.by_entropy and self.mix == "losses" and self.route is None

    @property
    def scheduled(self) -> list[tuple[str, Any]]:
        """The weights, with the prefix of their names in logs."""
        return [(f"teacher_{index}", weight) for index, weight in enumerate(self.weights or [])]

    def settings(self) -> dict[str, Any]:
        """The settings as text, for hyper-parameters; empty if they are the defaults."""
        if self.plain:
            return {}
        weights = [str(each.schedules.get("weight", each.weight)) for each in self.weights or []]
        shown = "entropy" if self.by_entropy else ", ".join(weights) or None
        route = None if self.route is None else str(self.route.place)
        return {"teacher_weights": shown, "mix": self.mix, "route": route}

    def check_teacher(self, teacher: Any) -> None:
        """Raise if the settings do not fit the teacher.

        Args:
            teacher: The teacher, as :func:`as_teacher` has returned it.

        Raises:
            ValueError: If there are not several networks, or their number is not that of the weights.
        """
        if self.plain:
            return
        if self.route is not None and isinstance(teacher, TeacherGroup):
            raise ValueError(
                f"Expected `teacher` to be a list of networks with a route, but got {teacher}. Pass the networks, or"
                " leave out `route`."
            )
        several = isinstance(teacher, (TeacherEnsemble, TeacherGroup))
        if not several or len(teacher) < 2:
            got = f"a list of {len(teacher)}" if several else type(teacher).__name__
            raise ValueError(
                "Expected `teacher` to be a list of two or more teachers with `teacher_weights`, `mix` or `route`, but"
                f" got {got}. Pass teacher=[a, b], or leave these arguments out."
            )
        if self.weights is not None and len(self.weights) != len(teacher):
            raise ValueError(
                f"Expected `teacher_weights` to have one weight for each of the {len(teacher)} teachers, but got"
                f" {len(self.weights)}."
            )

    def check_terms(self, terms: Sequence[DistillationTerm]) -> None:
        """Raise if a term cannot be computed in this way.

        Raises:
            ValueError: If so.
        """
        for term in terms:
            if self.plain or not term.needs_teacher:
                continue
            own_inputs = type(term).teacher_call is not DistillationTerm.teacher_call
            if term.skips_heads or own_inputs or (term.needs_network and (self.route or self.mix != "losses")):
                raise ValueError(
                    "Expected terms of LogitsDistillation, SequenceDistillation or FeatureDistillation with"
                    f" {self._name}, but got {type(term).__name__} {term.name!r}. Use equal weights, or one teacher."
                )
            if self.mix != "losses" or self.by_entropy:
                self._check_scores(term)
            elif self.route and term.teacher_taps and any(_set(term, name) for name in _POSITIONS):
                raise ValueError(
                    f"Expected term {term.name!r} to have no mask, no ignore_index, no boxes and no index with a route,"
                    " since it reads layers. Leave them out."
                )

    @property
    def _name(self) -> str:
        if self.route is not None:
            return "a route"
        return f"mix={self.mix!r}" if self.mix != "losses" else "teacher_weights"

    @property
    def _reads_scores(self) -> str:
        """The setting that reads the scores of each teacher, for messages."""
        return f"mix={self.mix!r}" if self.mix != "losses" else "teacher_weights='entropy'"

    def _check_scores(self, term: DistillationTerm) -> None:
        """Raise if a term does not read logits as a mixture, or weights by confidence, needs."""
        name = self._reads_scores
        if not isinstance(term, LogitsDistillation):
            raise ValueError(
                f"Expected terms on logits with {name}, but got {type(term).__name__} {term.name!r}. Use"
                " mix='losses' and numbers as weights, or only LogitsDistillation."
            )
        merges = term.requires.merges_classes and not getattr(term.loss, "standardize", False)
        if self.mix == "probabilities" and term.curriculum is not None:
            raise ValueError(
                f"Expected a number or a schedule as the temperature with mix='probabilities', but term {term.name!r}"
                " learns it. Use mix='losses' or mix='logits'."
            )
        if self.mix == "probabilities" and not merges:
            raise ValueError(
                f"Expected a divergence of probabilities with mix='probabilities', but term {term.name!r} has"
                f" {term.loss}. Use one such as SoftTargetLoss, or mix='logits'."
            )
        plain = not (term.counts_tokens or term.requires.needs_labels)
        has_rows = plain and isinstance(term.loss, FormulaLoss) and term.loss.has_rows
        if self.mix == "losses" and not has_rows:
            raise ValueError(
                "Expected a loss with a value for each example with teacher_weights='entropy', but term"
                f" {term.name!r} has {term.loss}. Use one such as SoftTargetLoss in a LogitsDistillation, or"
                " mix='probabilities'."
            )

    def shares(self) -> list[float] | None:
        """The weights divided by their sum; ``None`` if they are equal or by confidence.

        Raises:
            ValueError: If all weights are 0.
        """
        if self.weights is None:
            return None
        total = sum(each.weight for each in self.weights)
        if total == 0:
            raise ValueError(
                "Expected `teacher_weights` to have a weight greater than 0, but got"
                f" {[each.weight for each in self.weights]}. Pass weight=0 to the terms to rest."
            )
        return [each.weight / total for each in self.weights]

    # A step ----------------------------------------------------------------------------------------------------------

    def seen(self, term: DistillationTerm, answers: Sequence[Call]) -> list[Call]:
        """The answers that a term is called with, or one that stands for all of them.

        Args:
            term: The term.
            answers: The answer of each teacher.

        Raises:
            ValueError: When it is read, if the teachers' logits differ in shape.
        """
        if not term.needs_teacher:
            return list(answers[:1])
        if self.plain:
            return list(answers)
        if self.route is not None:
            rows = [examples_of(answer) for answer in answers]
            return [MixedCall.of(answers, lambda outputs: assembled(outputs, rows))]
        if self.mix == "losses":
            return list(answers)
        self._check_all_classes(answers)
        temperature = getattr(term.loss, "temperature", 1.0)
        return [MixedCall.of(answers, lambda outputs: self._mixed(term, outputs, temperature))]

    def scores(self, term: LogitsDistillation, call: Call, answers: Sequence[Call]) -> tuple[Tensor, Tensor]:
        """The logits of the student, and those of all teachers together, whose classes are compared in validation.

        Args:
            term: A term on logits.
            call: The student's call.
            answers: The answer of each teacher.
        """
        if len(answers) == 1 or self.route is not None or self.mix == "logits":
            return term.pair(call, self.seen(term, answers)[0])
        mixed = MixedCall.of(answers, lambda outputs: self._mixed(term, outputs, 1.0, "probabilities"))
        return term.pair(call, mixed)

    def check_scores(self, term: LogitsDistillation, call: Call, answers: Sequence[Call]) -> None:
        """Raise if an output that a term compares holds probabilities instead of logits.

        Args:
            term: A term on logits.
            call: The student's call.
            answers: The answer of each teacher.
        """
        # the teachers of a route have answered for some of the examples alone
        seen = answers if self.route is None else self.seen(term, answers)
        for number, answer in enumerate(seen):
            with about_teacher(number, len(seen)):
                term.check_scores(call, answer)

    def values(
        self, term: DistillationTerm, call: Call, answers: Sequence[Call], labels: Tensor | None
    ) -> list[Tensor]:
        """The values of a term, whose mean counts.

        Args:
            term: The term.
            call: The student's call.
            answers: The answer of each teacher.
            labels: The labels, where the term needs them.
        """
        if self.plain or not term.needs_teacher or self.mix != "losses":
            return _of_each(term, call, self.seen(term, answers), labels)
        if self.route is not None:
            if not term.teacher_taps:
                return [term(call, self.seen(term, answers)[0], labels)]
            return [self._by_parts(term, call, answers, labels)]
        if self.by_entropy:
            return [self._by_rows(cast(LogitsDistillation, term), call, answers, labels)]
        return [torch.stack(_of_each(term, call, answers, labels, self.shares())).sum()]

    def _by_parts(self, term: DistillationTerm, call: Call, answers: Sequence[Call], labels: Tensor | None) -> Tensor:
        """The mean over the examples, where each part of them has its own teacher."""
        number, values = sum(len(examples_of(answer)) for answer in answers), []
        for answer in answers:
            rows = examples_of(answer)
            if len(rows):
                part = None if labels is None else labels[rows.to(labels.device)]
                values.append(len(rows) / number * term(PartCall.of(call, rows, number), answer, part))
        return torch.stack(values).sum()

    def _by_rows(self, term: LogitsDistillation, call: Call, answers: Sequence[Call], labels: Tensor | None) -> Tensor:
        """The mean over the examples of the losses to each teacher, with weights of their own in each."""
        self._check_all_classes(answers)
        mask = term.positions(call, labels)
        pairs = [term.pair(call, answer) for answer in answers]
        outputs = alike([pair[1] for pair in pairs])
        dim = resolve_class_dim(outputs[0], term.class_dim)
        weights = confidence_weights(outputs, dim).squeeze(dim if dim < 0 else dim + 1)
        rows = [value_of(term.loss.rows, term.requires, *pair, labels, mask, mean=False) for pair in pairs]
        values = weights * torch.stack(rows)
        if mask is None:
            return values.sum(0).mean()
        counted = rows_mask(mask, tuple(values.shape[1:]))
        # a weight may be NaN where the teachers' scores do not count
        return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)

    def _check_all_classes(self, answers: Sequence[Call]) -> None:
        """Raise if a teacher's answer holds a part of the classes."""
        if any(answer.top_k is not None for answer in answers):
            raise ValueError(
                f"Expected the scores of all classes of each teacher with {self._reads_scores}, but got a cache that"
                " holds a part of them. Build it without top_k and sampled, or use mix='losses' and numbers as weights."
            )

    def _mixed(self, term: Any, outputs: Sequence[Tensor], temperature: float, mix: str | None = None) -> Tensor:
        outputs = alike(outputs)
        dim = resolve_class_dim(outputs[0], term.class_dim)
        shares = self.shares() or [1 / len(outputs)] * len(outputs)
        weights = confidence_weights(outputs, dim) if self.by_entropy else torch.tensor(shares, dtype=torch.float64)
        if (mix or self.mix) == "logits":
            return mean_logits(outputs, weights)
        return mixture_logits(outputs, weights, temperature=temperature, class_dim=dim)


def _of_each(
    term: DistillationTerm,
    call: Call,
    answers: Sequence[Call],
    labels: Tensor | None,
    shares: Sequence[float] | None = None,
) -> list[Tensor]:
    """The value of a term for each teacher, times its share; teachers without a share are left out."""
    values = []
    for number, answer in enumerate(answers):
        if shares is None or shares[number]:
            with about_teacher(number, len(answers)):
                value = term(call, answer, labels)
            values.append(value if shares is None else shares[number] * value)
    return values


def _set(term: Any, name: str) -> bool:
    return getattr(term, name, None) is not None
