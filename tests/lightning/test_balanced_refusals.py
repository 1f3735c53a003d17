"""Balanced weights: gradients that cannot be compared, and settings that are refused, in words (W2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balanced_processes import batches, squared, train
from tiny import CLASSES, INPUTS, Mlp
from torch import Tensor, nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    EMATeacher,
    FeatureDistillation,
    FusedLinearDistillation,
    LogitsDistillation,
    MutualLearning,
    SoftTargetLoss,
)
from lightning_distill.schedules import Balanced


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.0, "gradient of term 'logits' to be finite and not 0 .* that is 0 in all 2 of them"),
        (math.nan, "gradient of term 'logits' to be finite .* that is not finite in all 2 of them"),
    ],
)
def test_a_term_without_a_usable_gradient_is_an_error_in_words(factor: float, words: str) -> None:
    term = LogitsDistillation(lambda s, t: factor * squared(s, t), weight=Balanced(steps=2))
    with (
        Distiller(Mlp(5), Mlp(5, seed=1), term) as distiller,
        pytest.raises(ValueError, match=words),
    ):
        train(distiller, batches(3, dtype=torch.float32), lr=0.0)


def test_a_task_loss_without_a_gradient_is_named() -> None:
    student = Mlp(5)
    with Distiller(student, Mlp(5, seed=1), LogitsDistillation(weight=Balanced(steps=1))) as distiller:
        for step in range(2):
            with distiller.record():
                output = student(torch.ones(2, INPUTS))
            if step == 0:
                distiller.total(0 * output.sum())
                assert distiller.terms[0].weight == 0  # a step with an unknown weight is not distilled
            else:
                with pytest.raises(ValueError, match="gradient of the task loss to be finite and not 0"):
                    distiller.total(0 * output.sum())


def test_a_step_without_a_gradient_is_left_out() -> None:
    student, data = Mlp(5), batches(3, dtype=torch.float32)
    with Distiller(student, Mlp(5, seed=1), LogitsDistillation(weight=Balanced(steps=3))) as distiller:
        measured = []
        for step, (x, y) in enumerate(data):
            with distiller.record():
                task = F.cross_entropy(student(x), y)
            distiller.total(task * (step != 1), (x, y))
            measured.append(distiller.terms[0].weight)
    assert measured[0] == measured[1] != measured[2]


def test_a_tiny_gradient_is_warned_of() -> None:
    term = LogitsDistillation(lambda s, t: 1e-8 * squared(s, t), weight=Balanced(steps=1))
    with (
        Distiller(Mlp(5).double(), Mlp(5, seed=1).double(), term) as distiller,
        pytest.warns(UserWarning, match=r"gradient of term 'logits' is .*e\+08 times smaller"),
    ):
        train(distiller, batches(2), lr=0.0)


class Heads(nn.Module):
    """A student whose task does not use its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embed = nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x), "embedding": self.embed(x)}


def test_a_feature_that_the_task_loss_does_not_use_is_refused() -> None:
    student = Heads()
    term = FeatureDistillation("embed", "embed", weight="balanced")
    with Distiller(student, Heads(), term) as distiller:
        with distiller.record():
            task = student(torch.ones(2, INPUTS))["logits"].sum()
        words = "Expected the task loss to depend on the student's 'embed', where the gradients are compared"
        with pytest.raises(ValueError, match=words):
            distiller.total(task)


def test_of_several_outputs_the_one_that_the_term_reads_counts() -> None:
    student, teacher = Heads(), Heads()
    with Distiller(student, teacher, LogitsDistillation(squared, weight="balanced")) as distiller:
        with distiller.record():
            output = student(torch.ones(2, INPUTS))
        distiller.total(output["logits"].sum() + 100 * output["embedding"].sum())
    gap = 2 * (output["logits"].detach() - teacher(torch.ones(2, INPUTS))["logits"].detach()) / 6
    assert distiller.terms[0].weight == pytest.approx(float(torch.ones(2, 3).norm() / gap.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("teacher", "terms", "settings", "words"),
    [
        (EMATeacher(0.9), LogitsDistillation(weight="balanced"), {}, "its average are equal at first"),
        (Mlp(5), LogitsDistillation(weight="balanced"), {"task_weight": 0}, "leaves it nothing to refer to"),
        (Mlp(5), FusedLinearDistillation("head", "head", weight="balanced"), {}, "before the task loss is known"),
    ],
)
def test_a_weight_that_cannot_be_measured_is_refused(teacher: Any, terms: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distiller(Mlp(5), teacher, terms, **settings)


def test_mutual_learning_wants_numbers() -> None:
    with pytest.raises(ValueError, match="a number or a schedule in MutualLearning"):
        MutualLearning([Mlp(5), Mlp(6)], LogitsDistillation(weight="balanced"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitsDistillation(weight="balance"), "The only word is 'balanced'"),
        (lambda: SoftTargetLoss(Balanced()), "Only the weight of a term can be balanced"),
        (lambda: DistillCallback(Mlp(5), task_weight=Balanced()), "Only the weight of a term can be balanced"),
        (lambda: DistillCallback([Mlp(5), Mlp(6)], teacher_weights=[1, Balanced()]), "Only the weight of a term"),
        (lambda: Balanced(share=0.0), "Expected `share` to be greater than 0"),
        (lambda: Balanced(share=Balanced()), "Expected `share` to be a number or a schedule"),
        (lambda: Balanced(steps=0), "Expected `steps` to be greater than 0"),
        (lambda: Balanced(steps=1.5), "Expected `steps` to be an int"),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()
