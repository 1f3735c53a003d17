"""Layers and networks that the user replaces in the middle of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from tiny import CLASSES, INPUTS, Classifier, Mlp, loader
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


class Parts(LightningModule):
    """A network in two parts, which has a second path too; ``called`` says how a step reaches it."""

    def __init__(self, called: str, replaced: list[str]) -> None:
        super().__init__()
        self.called, self.replaced, self.seen = called, replaced, list[Tensor]()
        self.student, self.body, self.head = Mlp(5), Mlp(5, seed=3), nn.Linear(CLASSES, CLASSES)
        self.nets = nn.ModuleList([self.student])

    def network(self, x: Tensor) -> Tensor:
        if self.called == "parts":
            return self.head(self.body(x))
        return self.student(x) if self.called == "student" else self.nets[0](x)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            fresh = Mlp(8, seed=5).to(self.device)
            for path in self.replaced:
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, nn.Linear(CLASSES, CLASSES) if path == "head" else fresh)
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.network(batch[0])
        self.seen.append(logits.detach().cpu())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("replaced", [["student"], ["nets.0"], ["student", "nets.0"]], ids="+".join)
@pytest.mark.parametrize("called", ["student", "nets"])
def test_a_student_with_two_paths_is_followed_to_the_network_that_a_step_calls(
    trainer: Any, called: str, replaced: list[str]
) -> None:
    _check_followed(trainer, Parts(called, replaced))


@pytest.mark.parametrize("replaced", [["body"], ["head"], ["body", "head"]], ids="+".join)
def test_a_part_in_the_place_of_another_is_distilled_from_then_on(trainer: Any, replaced: list[str]) -> None:
    _check_followed(trainer, Parts("parts", replaced), student=["body", "head"])


def test_a_student_of_which_a_part_is_removed_is_refused_in_words(trainer: Any) -> None:
    class Loses(Parts):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                del self.head

    with pytest.raises(ValueError, match="Expected the student 'head' to stay in the module, but it was removed"):
        _check_followed(trainer, Loses("parts", []), student=["body", "head"])


def _check_followed(trainer: Any, module: Parts, **settings: Any) -> None:
    """Assert that each step of a training compares the logits that the step computed."""
    loss = Notes()
    distill = DistillCallback(Mlp(7, seed=1), LogitsDistillation(loss), **settings)
    trainer(callbacks=distill, max_epochs=2).fit(module, loader())
    assert len(loss.seen) == len(module.seen) > 0
    for (logits, _), own in zip(loss.seen, module.seen, strict=True):
        assert torch.equal(logits, own)


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
