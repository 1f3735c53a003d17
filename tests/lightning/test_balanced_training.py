"""Balanced weights in trainings on real digits: losses of every size, one setting, no student that collapses (W2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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


def trained(teacher: nn.Module | None, made: Made | None, weight: Any = 1.0) -> tuple[Classifier, list[float]]:
    """A student, and the values of its distillation loss without a weight."""
    x, y, _, _ = digits()
    student, order = Classifier(32 if teacher is None else 16, 1), torch.Generator().manual_seed(0)
    optimizer, values = torch.optim.SGD(student.parameters(), lr=0.3), []
    if teacher is None or made is None:
        for _ in range(STEPS):
            rows = torch.randint(len(x), (ROWS,), generator=order)
            optimizer.zero_grad()
            F.cross_entropy(student(x[rows]), y[rows]).backward()
            optimizer.step()
        return student, values
    with Distiller(student, teacher, made(weight)) as distiller:
        distiller.follow(optimizer)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (ROWS,), generator=order)
            optimizer.zero_grad()
            with distiller.record():
                task = F.cross_entropy(student(x[rows]), y[rows])
            distiller.total(task, (x[rows], y[rows])).backward()
            optimizer.step()
            values.append(float(distiller.parts["part_loss"]))
    return student, values


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return trained(None, None)[0]


def test_five_losses_far_apart_train_with_one_setting(teacher: Classifier) -> None:
    _, _, x, y = digits()
    alone = accuracy(trained(teacher, None)[0], x, y)
    first, reached, unbalanced = {}, {}, {}
    for name, made in LOSSES.items():
        student, values = trained(teacher, made, "balanced")
        first[name], reached[name] = values[0], accuracy(student, x, y)
        unbalanced[name] = accuracy(trained(teacher, made, 1.0)[0], x, y)
    assert max(first.values()) > 1e6 * min(first.values())
    assert min(reached.values()) > alone - 0.06
    assert max(unbalanced["squared"], unbalanced["summed"]) < 0.5  # a weight of 1 lets two students collapse
