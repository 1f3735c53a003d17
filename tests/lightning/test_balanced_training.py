"""Balanced weights in trainings on real digits: losses of every size, one setting, no student that collapses (W2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import (
    DistillationTerm,
    Distiller,
    FeatureDistillation,
    LogitMSELoss,
    LogitsDistillation,
    RelationalLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
)
from lightning_distill.demo.digits import load_digits_data

STEPS, ROWS = 150, 64
Made = Callable[[Any], DistillationTerm]


def summed(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum()


LOSSES: dict[str, Made] = {
    "soft": lambda weight: LogitsDistillation(SoftTargetLoss(), weight=weight, name="part"),
    "squared": lambda weight: LogitsDistillation(LogitMSELoss(), weight=weight, name="part"),
    "relations": lambda weight: FeatureDistillation("body", "body", RelationalLoss(), weight=weight, name="part"),
    "similarity": lambda weight: FeatureDistillation(
        "body", "body", SimilarityPreservingLoss(), weight=weight, name="part"
    ),
    "summed": lambda weight: FeatureDistillation("body", "body", summed, weight=weight, name="part"),
}


class Classifier(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits_data()
    train, test = data.train, data.test
    parts = [torch.as_tensor(part) for part in (*train, *test)]
    return parts[0].flatten(1).float(), parts[1].long(), parts[2].flatten(1).float(), parts[3].long()


def accuracy(student: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((student(x).argmax(1) == y).float().mean())


def plain(width: int) -> Classifier:
    """A network that learns from the labels alone."""
    x, y, _, _ = digits()
    network, order = Classifier(width, 1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (ROWS,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    return network


def distilled(teacher: nn.Module, term: DistillationTerm) -> tuple[Classifier, float]:
    """A student, and the first value of its distillation loss without a weight."""
    x, y, _, _ = digits()
    student, order, values = Classifier(16, 1), torch.Generator().manual_seed(0), list[float]()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    with Distiller(student, teacher, term) as distiller:
        distiller.follow(optimizer)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (ROWS,), generator=order)
            optimizer.zero_grad()
            with distiller.record():
                task = F.cross_entropy(student(x[rows]), y[rows])
            distiller.total(task, (x[rows], y[rows])).backward()
            optimizer.step()
            values.append(float(distiller.parts["part_loss"]))
    return student, values[0]


def test_five_losses_far_apart_train_with_one_setting() -> None:
    _, _, x, y = digits()
    teacher, alone = plain(32), accuracy(plain(16), x, y)
    first, reached, unbalanced = {}, {}, {}
    for name, made in LOSSES.items():
        student, first[name] = distilled(teacher, made("balanced"))
        reached[name] = accuracy(student, x, y)
        unbalanced[name] = accuracy(distilled(teacher, made(1.0))[0], x, y)
    assert max(first.values()) > 1e6 * min(first.values())
    assert min(reached.values()) > alone - 0.06
    assert max(unbalanced["squared"], unbalanced["summed"]) < 0.5  # a weight of 1 lets two students collapse
