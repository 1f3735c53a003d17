"""Settings that are assigned to a loss during training, also to one whose term has built copies of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from lightning_distill import (
    ContrastiveRepresentationLoss,
    CurriculumTemperature,
    DecoupledKDLoss,
    Distiller,
    FactorTransferLoss,
    FeatureDistillation,
    FocalGlobalLoss,
    LogitsDistillation,
    MaskedGenerativeLoss,
    QueueSimilarityLoss,
    SimpleRecipeLoss,
    SoftmaxRegressionLoss,
    checks,
)
from lightning_distill.losses import DistillationLoss
from lightning_distill.schedules import Linear, Setting

pytestmark = pytest.mark.exact

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
BATCH = {"labels": torch.arange(6) % 3, "rows": torch.arange(6), "boxes": [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 6}


class Scaled(DistillationLoss):
    """A user's loss with a parameter, with a setting that is a plain attribute, and with one that is checked."""

    learned = True
    share = Setting(checks.non_negative)

    def __init__(self, factor: float = 1.0, share: float = 1.0) -> None:
        super().__init__()
        self.factor, self.share = factor, share

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.factor * self.share * self.scale * (student.mean() - teacher.detach().mean()).abs()


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.maps, self.pool, self.flat = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(4, 3)


def distiller(loss: DistillationLoss) -> tuple[Distiller, Callable[[], float]]:
    """A distiller whose networks stay as they are, and a function that makes a step and returns the loss."""
    places: dict[str, Any] = {"boxes": "boxes"} if loss.needs_boxes else {"index": "rows"} if loss.needs_index else {}
    layer = "flat" if isinstance(loss, QueueSimilarityLoss) else "maps"
    term = LogitsDistillation(loss) if loss.class_scores else FeatureDistillation(layer, layer, loss, **places)
    student, teacher = nets.make(Network, 1), nets.make(Network, 2)
    made = Distiller(student, teacher, term, task_weight=0.0)
    made.follow(torch.optim.SGD(student.parameters(), lr=0.0))

    def step() -> float:
        with made.record():
            output = student(IMAGES)
        return made.total(output.sum(), BATCH).item()

    return made, step


SETTINGS: dict[str, tuple[Callable[..., DistillationLoss], str, Any]] = {
    "a weight within a loss": (FactorTransferLoss, "factor_weight", 0.0),
    "a schedule": (FactorTransferLoss, "reconstruction_weight", Linear(8.0, 4.0, duration=4, over="steps")),
    "an exponent": (SimpleRecipeLoss, "power", 2.0),
    "a loss that reads the teacher": (SoftmaxRegressionLoss, "regression_weight", 0.0),
    "a temperature": (FocalGlobalLoss, "temperature", 5.0),
    "a loss with a queue": (lambda **each: QueueSimilarityLoss(size=5, **each), "student_temperature", 2.0),
    "a loss with memories": (
        lambda **each: ContrastiveRepresentationLoss(size=6, normalizer=1.0, **each),
        "temperature",
        2.0,
    ),
    "a drawn mask": (lambda **each: MaskedGenerativeLoss(**{"mask_ratio": 0.5, **each}), "mask_ratio", 0.0),
    "beside a learned temperature": (
        lambda **each: DecoupledKDLoss(CurriculumTemperature(reversal_weight=1.0), **each),
        "nontarget_weight",
        1.0,
    ),
    "a user's loss": (Scaled, "factor", 3.0),
    "a user's checked setting": (Scaled, "share", 0.5),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_is_assigned_counts_from_the_next_step_on(case: str) -> None:
    make, name, value = SETTINGS[case]
    loss = make()
    _, step = distiller(loss)
    _, expected = distiller(make(**{name: value}))
    assert step() != pytest.approx(expected(), rel=1e-3)

    setattr(loss, name, value)

    assert [step(), step()] == [expected(), expected()]


def test_it_counts_for_the_copies_of_all_owners_and_their_copies_alone() -> None:
    loss = FactorTransferLoss()
    owners = [distiller(loss) for _ in range(2)]
    for _, step in owners:
        step()
    others = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))

    loss.factor_weight = 0.25

    assert [made.terms[0].learned[0].factor_weight for made, _ in owners] == [0.25, 0.25]
    assert [other.factor_weight for other in others] == [1.0, 1.0]
    assert all(made.terms[0].learned[0].training for made, _ in owners)
