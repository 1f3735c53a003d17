"""Several callbacks that distil in one Trainer, and callbacks and schedulers that monitor what they log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Classifier, Mlp, dataset, loader
from token_nets import QUIET, CausalModel, LanguageModule
from token_nets import loader as token_loader
from torch import Tensor

from lightning_distill import (
    Balanced,
    DistillCallback,
    LogitsDistillation,
    SequenceDistillation,
    TeacherCache,
)
from lightning_distill.schedules import Step

WEIGHTS = (0.5, 0.25)


def teachers() -> list[Mlp]:
    return [Mlp(7, seed=1), Mlp(6, seed=2)]


def callbacks(*task_weights: float, **settings: Any) -> list[DistillCallback]:
    """Two callbacks, with a teacher and a task weight each."""
    return [
        DistillCallback(
            teacher, LogitsDistillation(weight=weight), task_weight=task_weight, name=f"number_{index}", **settings
        )
        for index, (teacher, weight, task_weight) in enumerate(zip(teachers(), WEIGHTS, task_weights, strict=True))
    ]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = (teacher / 4).log_softmax(-1), (student / 4).log_softmax(-1)
    return 16 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def by_hand(task_weight: float, distils: tuple[bool, bool] = (True, True)) -> tuple[Mlp, list[float]]:
    """The student after an epoch, and the task losses."""
    student, losses = Mlp(5), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader():
        logits = student(x)
        task = F.cross_entropy(logits, y)
        losses.append(task.item())
        total = task_weight * task
        for teacher, weight, works in zip(teachers(), WEIGHTS, distils, strict=True):
            total = total + works * weight * divergence(logits, teacher(x).detach())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return student, losses


def same(student: Any, expected: Any) -> None:
    for value, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value.cpu(), other, rtol=1e-5, atol=1e-6)


class InADict(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": super().training_step(batch, batch_idx), "index": batch_idx}


class Unlabelled(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])


@pytest.mark.parametrize("module", [Classifier, InADict])
@pytest.mark.parametrize("task_weights", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_task_weights_of_two_callbacks_weigh_the_modules_own_loss_alone(
    trainer, task_weights: tuple[float, float], module: type[Classifier]
) -> None:
    student = module()
    run = trainer(callbacks=callbacks(*task_weights), max_epochs=1)
    run.fit(student, loader())
    expected, losses = by_hand(task_weights[0] * task_weights[1])
    same(student.model, expected)
    for index in (0, 1):
        logged = run.callback_metrics[f"number_{index}/task_loss"]
        assert logged.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("resting", [0, 1])
def test_a_callback_that_rests_logs_the_modules_own_loss(trainer, resting: int) -> None:
    pair, student = callbacks(1.0, 1.0), Classifier()
    pair[resting].terms[0].weight = 0.0
    run = trainer(callbacks=pair, max_epochs=1)
    run.fit(student, loader())
    expected, losses = by_hand(1.0, (resting != 0, resting != 1))
    same(student.model, expected)
    assert run.callback_metrics[f"number_{resting}/task_loss"].item() == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_two_callbacks_distil_a_step_without_a_loss(trainer) -> None:
    student = Unlabelled()
    trainer(callbacks=callbacks(0.0, 0.0), max_epochs=1).fit(student, loader())
    same(student.model, by_hand(0.0)[0])


@pytest.mark.parametrize("turned", [False, True])
def test_a_balanced_weight_refers_to_the_modules_own_loss(trainer, turned: bool) -> None:
    weights = []
    for others in ([], callbacks(1.0, 1.0)[1:]):
        balanced = DistillCallback(teachers()[0], LogitsDistillation(weight=Balanced(1.0, steps=1)))
        together = [*others, balanced] if turned else [balanced, *others]
        trainer(callbacks=together, max_steps=1).fit(Classifier(), loader())
        weights.append(balanced.terms[0].weight)
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


def test_two_callbacks_with_a_cache_each_are_refused_in_words(trainer, tmp_path: Path) -> None:
    pair = callbacks(1.0, 1.0)
    for index, (callback, teacher) in enumerate(zip(pair, teachers(), strict=True)):
        callback.teacher = TeacherCache.build(teacher, dataset(), tmp_path / str(index), progress=False)
    with pytest.raises(
        MisconfigurationException, match=r"one DistillCallback with a TeacherCache.*\['number_0', 'number_1'\]"
    ):
        trainer(callbacks=pair, max_steps=1).fit(Classifier(), loader())


# Monitored values -----------------------------------------------------------------------------------------------------


class Totals(Callback):
    """The totals of the steps, before their backward passes."""

    def on_train_start(self, *_: Any) -> None:
        self.seen: list[float] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.seen.append(loss.item())


def test_a_checkpoint_of_each_step_compares_the_values_of_that_step(trainer, tmp_path: Path) -> None:
    totals = Totals()
    save = ModelCheckpoint(tmp_path, monitor="distill/loss", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    settings = {"max_epochs": 2, "log_every_n_steps": 50, "enable_checkpointing": True}
    trainer(callbacks=[save, totals, DistillCallback(Mlp(7, seed=1))], **settings).fit(Classifier(), loader())
    saved = {Path(path).stem: value.item() for path, value in save.best_k_models.items()}
    assert saved == pytest.approx({f"step={step}": value for step, value in enumerate(totals.seen, 1)})


def test_a_learning_rate_of_each_step_follows_the_values_of_that_step(trainer) -> None:
    class Follows(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            step, self.seen = self.scheduler.step, []
            self.scheduler.step = lambda value, *rest: (self.seen.append(float(value)), step(value, *rest))
            setting = {"scheduler": self.scheduler, "monitor": "distill/distillation_loss", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": setting}

    module, totals = Follows(), Totals()
    distill = DistillCallback(Mlp(7, seed=1), task_weight=0.0)
    trainer(callbacks=[distill, totals], max_steps=3, log_every_n_steps=50).fit(module, loader())
    assert module.seen == pytest.approx(totals.seen)


def test_the_logged_loss_of_a_resting_term_on_tokens_is_the_task_loss() -> None:
    term = SequenceDistillation(weight=Step([2.0, 0.0], boundaries=[1]))
    run = Trainer(
        callbacks=DistillCallback(CausalModel(7, seed=1), term), max_epochs=2, accumulate_grad_batches=3, **QUIET
    )
    run.fit(LanguageModule(), token_loader(2))
    assert run.callback_metrics["distill/loss"].item() == pytest.approx(
        run.callback_metrics["distill/task_loss"].item(), rel=1e-6
    )
