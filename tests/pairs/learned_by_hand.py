"""Losses with learned parts or memories, by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pairs.by_hand import Batch, Place, generated, variational
from tiny import Mlp
from torch import Tensor

from lightning_distill import (
    ContrastiveRepresentationLoss,
    DistillationTerm,
    FeatureDistillation,
    QueueSimilarityLoss,
)

Learned = dict[str, Tensor]


def of_variational(result, ask, batch, place, learned):
    return 0.3 * variational(result["body"], ask(Mlp(7, seed=1))["body"], learned, "body.learned.0")


def of_variational_of_two(result, ask, batch, place, learned):
    teachers = enumerate([Mlp(7, seed=1), Mlp(6, seed=2)])
    values = [
        variational(result["body"], ask(teacher)["body"], learned, f"body.learned.{index}")
        for index, teacher in teachers
    ]
    return 0.3 * sum(values) / 2


def of_generated(result, ask, batch, place, learned):
    adapted = F.linear(result["body"], *_layer(learned, "body.adapters.0"))
    teacher = ask(Mlp(7, seed=1))["body"]
    with torch.autocast(teacher.device.type, enabled=False):
        return 0.05 * generated(adapted, teacher, learned, "body.learned.0", 0.5)


def of_factors(result, ask, batch, place, learned):
    """The distance of two factors, and the error of the network that restores the teacher's feature from its own."""
    student, teacher = result["body"].float(), ask(Mlp(7, seed=1))["body"].float()
    with torch.autocast(student.device.type, enabled=False):

        def network(name: str, feature: Tensor) -> Tensor:
            for layer in (0, 2, 4):
                feature = F.linear(feature, *_layer(learned, f"body.learned.0.{name}.{layer}"))
                feature = torch.where(feature > 0, feature, 0.1 * feature)
            return feature

        translated, factor = network("translator", student), network("paraphraser", teacher)
        distance = (_unit(translated) - _unit(factor.detach())).abs().mean()
        return 0.3 * (distance + (network("restorer", factor) - teacher).square().mean())


class Remembering:
    """The base of the formulas with a memory, to which the batches of one place are added together.

    Each batch is compared with the memory as it was before the first one of its place: the processes of a training have
    one batch each.
    """

    def __init__(self) -> None:
        self.place: Any = None

    def __call__(self, result, ask, batch: Batch, place: Place, learned: Learned) -> Tensor:
        if self.place != place:
            self.place = place
            self.before = {name: value.detach().clone() for name, value in learned.items()}
        student = result["body"].float()
        with torch.autocast(student.device.type, enabled=False):
            values = [
                self.value(student, ask(teacher)["body"].float(), batch, learned, f"body.learned.{index}")
                for index, teacher in enumerate(self.teachers())
            ]
            return torch.stack(values).mean()

    def teachers(self) -> list[Mlp]:
        return [Mlp(7, seed=1)]

    def value(self, student: Tensor, teacher: Tensor, batch: Batch, learned: Learned, prefix: str) -> Tensor:
        raise NotImplementedError


class QueueByHand(Remembering):
    """Softmaxes over the similarities to the last eight embeddings of the teacher, and to the example's own."""

    def __call__(self, result, ask, batch, place, learned):
        if self.place != place:
            self.fresh: list[Tensor] = []
        return super().__call__(result, ask, batch, place, learned)

    def value(self, student, teacher, batch, learned, prefix):
        queue = self.before[f"{prefix}.queue"]
        student, teacher = _unit(F.linear(student, *_layer(learned, "body.adapters.0"))), _unit(teacher)
        values = []
        for own, target in zip(student, teacher, strict=True):
            entries = torch.cat([target[None], queue])
            weights = (entries @ target / 0.1).softmax(0)
            values.append(-(weights * (entries @ own / 0.2).log_softmax(0)).sum())
        self.fresh.append(teacher)
        with torch.no_grad():
            learned[f"{prefix}.queue"].copy_(torch.cat([*self.fresh, queue])[:8])
        return 0.3 * torch.stack(values).mean()


class MemoriesByHand(Remembering):
    """Cross entropies of telling the example's remembered embedding from those of all other examples."""

    def value(self, student, teacher, batch, learned, prefix):
        embeddings = [
            _unit(F.linear(feature, *_layer(learned, f"{prefix}.{side}_embedding")))
            for side, feature in (("student", student), ("teacher", teacher))
        ]
        memories = [self.before[f"{prefix}.{side}_memory"] for side in ("student", "teacher")]
        size, value = len(memories[0]), torch.zeros(())
        for embedding, memory in zip(embeddings, reversed(memories), strict=True):
            p = (embedding @ memory.T / 0.2).exp() / 20.0
            right = p / (p + (size - 1) / size)
            own = right.gather(1, batch["row"][:, None])[:, 0]
            value = value - own.log() - (1 - right).log().sum(1) + (1 - own).log()
        with torch.no_grad():
            for side, embedding, memory in zip(("student", "teacher"), embeddings, memories, strict=True):
                learned[f"{prefix}.{side}_memory"][batch["row"]] = _unit(0.5 * memory[batch["row"]] + 0.5 * embedding)
            learned[f"{prefix}.draws"][1] = self.before[f"{prefix}.draws"][1] + 1
        return 0.1 * value.mean()


class MemoriesOfTwo(MemoriesByHand):
    """The mean over two teachers, each with maps and memories of its own."""

    def teachers(self) -> list[Mlp]:
        return [Mlp(7, seed=1), Mlp(6, seed=2)]


def queue_term() -> DistillationTerm:
    loss = QueueSimilarityLoss(size=8, teacher_temperature=0.1)
    return FeatureDistillation("body", "body", loss, weight=0.3)


def memories_term() -> DistillationTerm:
    loss = ContrastiveRepresentationLoss(0.2, size=24, negatives=24, width=4, normalizer=20.0)
    return FeatureDistillation("body", "body", loss, weight=0.1, index="row")


def _layer(learned: Learned, name: str) -> tuple[Tensor, Tensor]:
    return learned[f"{name}.weight"], learned[f"{name}.bias"]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()
