"""The features of the pairs: each is one row, with the formula written by hand beside the library's settings.

A new feature is a new row of ``FEATURES``; every situation of ``lightning_situations.py`` then meets it. A pair that
cannot work is a row of ``REFUSED`` with the words of the error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pairs.balanced_by_hand import BalancedByHand, balanced_terms
from pairs.by_hand import (
    Batch,
    Formula,
    Place,
    curriculum,
    decoupled,
    likeliest,
    line,
    soft_targets,
    squared,
)
from pairs.learned_by_hand import (
    MemoriesByHand,
    MemoriesOfTwo,
    QueueByHand,
    memories_term,
    of_factors,
    of_generated,
    of_variational,
    of_variational_of_two,
    queue_term,
)
from pairs.several_by_hand import (
    average_and_network,
    cache_and_network,
    losses_by_confidence,
    mixed_logits,
    mixed_probabilities,
    routed,
    two_teachers,
    weighted_teachers,
)
from tiny import CLASSES, INPUTS, Mlp
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill import (
    CallableTeacher,
    CurriculumTemperature,
    DecoupledKDLoss,
    DistillationTerm,
    EMATeacher,
    FactorTransferLoss,
    FeatureDistillation,
    LogitsDistillation,
    MaskedGenerativeLoss,
    SelfDistillation,
    SoftTargetLoss,
    TeacherCache,
    VariationalInformationLoss,
    content_key,
)
from lightning_distill.recording import Call
from lightning_distill.schedules import Cosine, Linear, Step

ROWS, BATCH = 24, 6


def first_teacher() -> Mlp:
    return Mlp(7, seed=1)


def second_teacher() -> Mlp:
    return Mlp(6, seed=2)


def _two() -> list[Mlp]:
    return [first_teacher(), second_teacher()]


class Rows(Dataset[Batch]):
    """Inputs with labels and, for sequences, a mask of the positions that count."""

    def __init__(self, length: int | None = None, seed: int = 0, numbered: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (ROWS,) if length is None else (ROWS, length)
        self.x = torch.randn(*shape, INPUTS, generator=generator)
        self.labels = torch.randint(CLASSES, shape, generator=generator)
        self.mask = torch.rand(shape, generator=generator) > 0.4
        self.mask[..., 0] = True
        self.masked, self.numbered = length is not None, numbered

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Batch:
        row = {"x": self.x[index], "labels": self.labels[index]}
        if self.numbered:
            row["row"] = torch.tensor(index)
        return {**row, "mask": self.mask[index]} if self.masked else row

    def batch(self, start: int, size: int) -> Batch:
        rows = [self[index] for index in range(start, min(start + size, ROWS))]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class TwoTemperatures(DistillationTerm):
    """A term of the user's own, which keeps its losses in itself."""

    def __init__(self) -> None:
        super().__init__(name="two")
        self.first, self.second = SoftTargetLoss(Linear(6.0, 2.0)), SoftTargetLoss(Linear(1.0, 5.0))

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        return self.first(student.logits, teacher.logits) + 0.5 * self.second(student.logits, teacher.logits)


@dataclass(frozen=True)
class Feature:
    """A feature of the library, and how its loss is written by hand.

    Args:
        terms: Makes the terms.
        formula: The weighted distillation loss by hand.
        teacher: Makes the teacher.
        settings: Further settings of the callback.
        cache: Settings with which a cache of the first teacher is built and takes its place.
        beside: Makes further teachers.
        views: Makes the student's inputs of a step.
        task_weight: The weight of the task loss, by hand.
        length: Length of sequences, for data that are sequences.
        draws: Whether it draws random numbers in a step.
        decay: The decay of the teacher, if it is the student's average, by hand.
        numbered: Whether the rows have their numbers.
        situations: The situations that the feature is put into; None is all of them.
    """

    terms: Callable[[], Any]
    formula: Formula
    teacher: Callable[[], Any] = first_teacher
    settings: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    beside: Callable[[], list[Any]] | None = None
    views: Sequence[Callable[[Tensor], Tensor]] = (lambda x: x,)
    task_weight: Callable[[Place], float] = lambda place: 1.0
    length: int | None = None
    draws: bool = False
    decay: Callable[[Place], float] | None = None
    numbered: bool = False
    situations: tuple[str, ...] | None = None

    def rows(self) -> Rows:
        return Rows(self.length, numbered=self.numbered)

    def make_teacher(self, folder: Path) -> Any:
        if self.cache is None:
            return self.teacher()
        path = folder / "-".join(["cache", str(self.length), *self.cache])
        if not path.exists():
            forward = lambda model, batch: model(batch["x"])  # noqa: E731
            settings = {
                "dtype": "float16" if "top_k" in self.cache else "float32",
                "progress": False,
                "forward": forward,
                **self.cache,
            }
            TeacherCache.build(self.teacher(), self.rows(), path, **settings)
        cache = TeacherCache.open(path)
        return cache if self.beside is None else [cache, *self.beside()]


def _logits(result, ask, batch, place, learned):
    return soft_targets(result["logits"], ask(first_teacher())["logits"], 4.0)


def _weight_over_steps(result, ask, batch, place, learned):
    return line(1.5, 0.0, place.step / 5) * _logits(result, ask, batch, place, learned)


def _temperature_over_fraction(result, ask, batch, place, learned):
    return soft_targets(result["logits"], ask(first_teacher())["logits"], line(6.0, 1.0, place.fraction))


def _feature_weight_over_fraction(result, ask, batch, place, learned):
    weight = 2.0 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * place.fraction, dtype=torch.float64))))
    return weight * _adapted(result, ask, learned, first_teacher(), 0)


def _two_temperatures(result, ask, batch, place, learned):
    teacher = ask(first_teacher())["logits"]
    first = soft_targets(result["logits"], teacher, line(6.0, 2.0, place.fraction))
    return first + 0.5 * soft_targets(result["logits"], teacher, line(1.0, 5.0, place.fraction))


def _adapted(result, ask, learned, teacher, index):
    weight, bias = (learned[f"body.adapters.{index}.{name}"] for name in ("weight", "bias"))
    adapted = torch.nn.functional.linear(result["body"], weight, bias)
    return squared(adapted, ask(teacher)["body"])


def _with_adapter(result, ask, batch, place, learned):
    return 0.5 * _logits(result, ask, batch, place, learned) + 2.0 * _adapted(result, ask, learned, first_teacher(), 0)


def _array_function(x):
    return first_teacher()(torch.from_numpy(x)).detach().float().numpy()


def _average(result, ask, batch, place, learned):
    return _logits(result, lambda _: ask(None), batch, place, learned)


def _average_with_layers(result, ask, batch, place, learned):
    teacher = ask(None)
    return 0.5 * soft_targets(result["logits"], teacher["logits"], 4.0) + 2.0 * squared(result["body"], teacher["body"])


def _top_k(result, ask, batch, place, learned):
    return likeliest(result["logits"], ask(first_teacher())["logits"], 4.0)


def _itself(result, ask, batch, place, learned):
    return 0.5 * squared(result["body"], result["act"].detach())


def _masked(result, ask, batch, place, learned):
    return soft_targets(result["logits"], ask(first_teacher())["logits"], 2.0, batch["mask"])


def _ignored(result, ask, batch, place, learned):
    return soft_targets(result["logits"], ask(first_teacher())["logits"], 4.0, batch["labels"] != 1)


def _labelled(result, ask, batch, place, learned):
    logits, teacher = result["logits"].float(), ask(first_teacher())["logits"].float()
    return 0.5 * decoupled(logits, teacher, batch["labels"], 3.0, 2.0)


def _in_half(result, ask, batch, place, learned):
    teacher = ask(first_teacher(), torch.bfloat16)
    return 0.5 * soft_targets(result["logits"], teacher["logits"], 4.0) + squared(result["logits"], teacher["logits"])


def _adapter_terms() -> list[DistillationTerm]:
    return [LogitsDistillation(weight=0.5), FeatureDistillation("body", "body", weight=2.0)]


FEATURES: dict[str, Feature] = {
    "logits": Feature(lambda: None, _logits),
    "weight over steps": Feature(
        lambda: LogitsDistillation(weight=Linear(1.5, 0.0, duration=5, over="steps")), _weight_over_steps
    ),
    "temperature over the fraction": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(Linear(6.0, 1.0))), _temperature_over_fraction
    ),
    "adapter with a weight over the fraction": Feature(
        lambda: FeatureDistillation("body", "body", weight=Cosine(2.0, 0.0)), _feature_weight_over_fraction
    ),
    "curriculum temperature": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(CurriculumTemperature(0.1, 0.5, reversal_weight=1.0))),
        lambda result, ask, *rest: curriculum(result["logits"], ask(first_teacher())["logits"], rest[-1]),
    ),
    "cache and curriculum temperature": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(CurriculumTemperature(0.1, 0.5, reversal_weight=1.0))),
        lambda result, ask, *rest: curriculum(result["logits"], ask(first_teacher())["logits"], rest[-1]),
        cache={},
    ),
    "schedules in a term of the user's own": Feature(TwoTemperatures, _two_temperatures),
    "task weight over epochs": Feature(
        lambda: None,
        _logits,
        settings={"task_weight": Step([1.0, 0.25, 0.5], boundaries=[1, 2])},
        task_weight=lambda place: [1.0, 0.25, 0.5][min(place.epoch, 2)],
    ),
    "cache": Feature(_adapter_terms, _with_adapter, cache={"layers": ["body"]}),
    "cache of the likeliest class": Feature(lambda: None, _top_k, cache={"top_k": 1}),
    "cache and a temperature over the fraction": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(Linear(6.0, 1.0))), _temperature_over_fraction, cache={}
    ),
    "cache and ignored labels": Feature(lambda: LogitsDistillation(ignore_index=1), _ignored, cache={}),
    "cache and a mask": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(2.0), mask="mask"), _masked, cache={}, length=3
    ),
    "cache of sequences": Feature(
        lambda: LogitsDistillation(SoftTargetLoss(2.0), mask="mask"), _masked, cache={"mask": "mask"}, length=3
    ),
    "cache by key": Feature(_adapter_terms, _with_adapter, cache={"layers": ["body"], "key": content_key}),
    "several teachers": Feature(_adapter_terms, two_teachers, teacher=lambda: [first_teacher(), second_teacher()]),
    "average and network": Feature(
        _adapter_terms,
        average_and_network,
        teacher=lambda: [EMATeacher(0.6), second_teacher()],
        decay=lambda place: 0.6,
    ),
    "cache and network": Feature(
        _adapter_terms, cache_and_network, cache={"layers": ["body"]}, beside=lambda: [second_teacher()]
    ),
    "weighted teachers": Feature(
        _adapter_terms, weighted_teachers, teacher=_two, settings={"teacher_weights": [3.0, Linear(1.0, 0.0)]}
    ),
    "mixture of probabilities": Feature(
        lambda: None, mixed_probabilities, teacher=_two, settings={"teacher_weights": [7, 3], "mix": "probabilities"}
    ),
    "mixture of logits by confidence": Feature(
        lambda: None, mixed_logits, teacher=_two, settings={"teacher_weights": "entropy", "mix": "logits"}
    ),
    "losses by confidence": Feature(
        lambda: None, losses_by_confidence, teacher=_two, settings={"teacher_weights": "entropy"}
    ),
    "route": Feature(_adapter_terms, routed, teacher=_two, settings={"route": lambda batch: batch["labels"] % 2}),
    "function": Feature(
        lambda: None, _logits, teacher=lambda: CallableTeacher(_array_function, arrays=True, batch_size=4)
    ),
    "moving average": Feature(
        _adapter_terms, _average_with_layers, teacher=lambda: EMATeacher(0.6), decay=lambda place: 0.6
    ),
    "moving average with a decay over the fraction": Feature(
        lambda: None,
        _average,
        teacher=lambda: EMATeacher(Linear(0.2, 0.9)),
        decay=lambda place: line(0.2, 0.9, place.fraction),
    ),
    "views": Feature(_adapter_terms, _with_adapter, views=(lambda x: x, lambda x: 1 - x)),
    "views and labels": Feature(
        lambda: LogitsDistillation(DecoupledKDLoss(3.0, nontarget_weight=2.0), weight=0.5),
        _labelled,
        views=(lambda x: x, lambda x: 1 - x),
    ),
    "adapter": Feature(_adapter_terms, _with_adapter),
    "variational information": Feature(
        lambda: FeatureDistillation("body", "body", VariationalInformationLoss(), weight=0.3), of_variational
    ),
    "variational information of several teachers": Feature(
        lambda: FeatureDistillation("body", "body", VariationalInformationLoss(), weight=0.3),
        of_variational_of_two,
        teacher=lambda: [first_teacher(), second_teacher()],
    ),
    "masked generation": Feature(
        lambda: FeatureDistillation("body", "body", MaskedGenerativeLoss(mask="channel"), weight=0.05),
        of_generated,
        draws=True,
    ),
    "factors": Feature(
        lambda: FeatureDistillation("body", "body", FactorTransferLoss(rate=0.5), weight=0.3), of_factors
    ),
    "queue": Feature(queue_term, QueueByHand),
    "memories": Feature(memories_term, MemoriesByHand, numbered=True),
    "memories of two teachers": Feature(memories_term, MemoriesOfTwo, teacher=_two, numbered=True),
    "self-distillation": Feature(lambda: SelfDistillation("body", "act", weight=0.5), _itself, teacher=lambda: None),
    "mask": Feature(lambda: LogitsDistillation(SoftTargetLoss(2.0), mask="mask"), _masked, length=3),
    "ignored labels": Feature(lambda: LogitsDistillation(ignore_index=1), _ignored),
    "labels": Feature(lambda: LogitsDistillation(DecoupledKDLoss(3.0, nontarget_weight=2.0), weight=0.5), _labelled),
    "balanced": Feature(balanced_terms, BalancedByHand),
    "balanced with a cache": Feature(balanced_terms, BalancedByHand, cache={"layers": ["body"]}),
    "teacher_dtype": Feature(
        lambda: [LogitsDistillation(weight=0.5), FeatureDistillation("", "", name="whole")],
        _in_half,
        settings={"teacher_dtype": "bfloat16"},
    ),
}
# Features of which a step depends on all its micro-batches so far.
MEASURED = ("balanced", "balanced with a cache")
# Features whose first batch has changed their parts before a run of one process shows them.
REMEMBERING = ("queue", "memories", "memories of two teachers")


def student() -> Mlp:
    return copy.deepcopy(Mlp(5))
