"""Layers and networks that the user replaces in the middle of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import INPUTS, Classifier, Mlp, loader
from token_nets import CausalModel
from token_nets import loader as token_loader
from torch import Tensor, nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    FeatureDistillation,
    FusedLinearDistillation,
    LogitsDistillation,
    Tap,
)

X = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(1))


class Tenfold(nn.Module):
    """A wrapper around a layer, such as one that trains it in another way."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.layer(x)


class Notes(nn.Module):
    """A loss that notes what it compares."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.seen.append((student.detach().cpu(), teacher.detach().cpu()))
        return F.mse_loss(student, teacher)


@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_layer_in_the_place_of_another_is_read_from_then_on(side: str, where: str) -> None:
    networks = {"student": Mlp(5), "teacher": Mlp(5, seed=1)}
    loss, tap = Notes(), Tap("act" if where == "input" else "body", where=where)
    term = FeatureDistillation(tap, tap, loss, adapter=None)
    with Distiller(networks["student"], networks["teacher"], term, task_weight=0) as distiller:
        for replaces in (False, True, False):
            if replaces:
                networks[side].body = Tenfold(networks[side].body)
            with distiller.record():
                task = networks["student"](X).mean()
            distiller.total(task)
            for value, network in zip(loss.seen[-1], networks.values(), strict=True):
                torch.testing.assert_close(value, network.body(X).detach())


@pytest.mark.parametrize("student", ["model", None])
def test_a_network_in_the_place_of_the_student_is_distilled_from_then_on(trainer, student: str | None) -> None:
    class Grows(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                self.model = Mlp(8, seed=5).to(self.device)
                self.trainer.strategy.setup_optimizers(self.trainer)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch[0])
            self.seen.append(logits.detach().cpu())
            return F.cross_entropy(logits, batch[1])

    loss, module = Notes(), Grows()
    before = [parameter.detach().clone() for parameter in Mlp(8, seed=5).parameters()]
    trainer(callbacks=DistillCallback(Mlp(7, seed=1), LogitsDistillation(loss), student=student), max_epochs=2).fit(
        module, loader()
    )
    for (logits, _), own in zip(loss.seen, module.seen, strict=True):
        assert torch.equal(logits, own)
    assert not any(torch.equal(a, b.cpu()) for a, b in zip(before, module.model.parameters(), strict=True))


def test_a_head_in_the_place_of_another_is_skipped_from_then_on() -> None:
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    batch, values = next(iter(token_loader(4))), []
    changed = CausalModel(seed=3).lm_head
    with Distiller(student, teacher, FusedLinearDistillation(), task_weight=0) as distiller:
        for replaces in (False, True):
            if replaces:
                student.lm_head = changed
            with distiller.record(batch=batch):
                student(batch["input_ids"], batch["attention_mask"])
            values.append(distiller.total(torch.zeros((), dtype=torch.float64), batch).item())
    fresh = CausalModel()
    fresh.lm_head = changed
    with Distiller(fresh, teacher, FusedLinearDistillation(), task_weight=0) as distiller:
        with distiller.record(batch=batch):
            fresh(batch["input_ids"], batch["attention_mask"])
        expected = distiller.total(torch.zeros((), dtype=torch.float64), batch).item()
    assert values[1] == pytest.approx(expected, rel=1e-12)
    assert values[0] != pytest.approx(expected, rel=1e-3)


def test_two_terms_that_skip_one_head_are_refused_in_words() -> None:
    student, batch = CausalModel(), next(iter(token_loader(4)))
    distillers = [Distiller(student, CausalModel(7, seed=1), FusedLinearDistillation(), task_weight=0) for _ in "ab"]
    with (
        distillers[0].record(batch=batch),
        pytest.raises(TypeError, match=r"Expected one FusedLinearDistillation to skip the head Linear, but got two"),
        distillers[1].record(batch=batch),
    ):
        student(batch["input_ids"], batch["attention_mask"])
