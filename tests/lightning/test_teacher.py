"""Loading a teacher, and DistillModule around a plain student."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from nets import MLP, loader, make, same, snapshot, student, teacher
from torch import nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    DistillModule,
    FeatureDistillation,
    LogitsDistillation,
    load_teacher,
)

MakeTrainer = Callable[..., Trainer]
# DistillModule has a validation step; most of these tests give it nothing to validate on
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def test_a_teacher_is_loaded_from_a_plain_state_dict(tmp_path: Path) -> None:
    saved = teacher(5)
    torch.save(saved.state_dict(), tmp_path / "teacher.pt")
    loaded = load_teacher(tmp_path / "teacher.pt", teacher(6))
    assert same(snapshot(loaded), snapshot(saved))
    assert not loaded.training


@pytest.mark.parametrize("prefix", [None, "model.", "nets.0."])
def test_a_teacher_is_found_in_a_lightning_checkpoint_under_any_prefix(tmp_path: Path, prefix: str | None) -> None:
    saved = teacher(5)
    key = prefix or "net."
    state = {f"{key}{name}": value for name, value in saved.state_dict().items()}
    state |= {"criterion.weight": torch.ones(5), "ema.layer1.bias": torch.zeros(10)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    assert same(snapshot(load_teacher(tmp_path / "last.ckpt", teacher(6), prefix=prefix)), snapshot(saved))


def test_names_lengthened_by_compile_or_ddp_are_understood(tmp_path: Path) -> None:
    saved = teacher(5)
    torch.save({f"module._orig_mod.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "t.pt")
    assert same(snapshot(load_teacher(tmp_path / "t.pt", teacher(6))), snapshot(saved))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"every parameter of MLP.*6 are missing, first 'head.bias'.*'fc.weight'"):
        load_teacher(tmp_path / "other.pt", teacher())
    torch.save(make(MLP, 1, 12).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"`checkpoint` to fit MLP, but got .*size mismatch"):
        load_teacher(tmp_path / "wide.pt", teacher())


def test_the_module_equals_the_callback_on_a_module_of_the_users(trainer: MakeTrainer) -> None:
    """DistillModule distils through a DistillCallback: the same numbers as one added to a module written by hand."""

    class ByHand(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = student()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.student.parameters())

    terms = [LogitsDistillation(weight=0.5), FeatureDistillation("layer1", "layer1")]
    module, by_hand = DistillModule(student(), teacher(), terms, task_weight=0.2), ByHand()
    trainer(max_epochs=1).fit(module, loader())
    again = [LogitsDistillation(weight=0.5), FeatureDistillation("layer1", "layer1")]
    trainer(max_epochs=1, callbacks=[DistillCallback(teacher(), again, task_weight=0.2)]).fit(by_hand, loader())
    assert same(snapshot(module), snapshot(by_hand))
    assert not same(snapshot(module.student), snapshot(student()))


def test_the_module_logs_validates_tests_and_predicts(trainer: MakeTrainer) -> None:
    module = DistillModule(
        student(),
        teacher(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    run = trainer(max_epochs=2, log_every_n_steps=1)
    run.fit(module, loader(), loader())
    expected = {"train_loss", "val_loss", "distill/task_loss", "distill/logits_loss", "distill/val_teacher_agreement"}
    assert expected <= run.callback_metrics.keys()
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)
    assert "test_loss" in run.test(module, loader(), verbose=False)[0]
    predictions = torch.cat(run.predict(module, loader()))
    with torch.no_grad():
        torch.testing.assert_close(predictions, module.student.eval()(torch.cat([x for x, _ in loader()])))


def test_a_plateau_scheduler_watches_the_validation_loss(trainer: MakeTrainer) -> None:
    module = DistillModule(
        student(), teacher(), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    )
    trainer(max_epochs=1).fit(module, loader(), loader())
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == "val_loss"


def test_a_subclass_that_saves_its_hyperparameters_saves_no_teacher(trainer: MakeTrainer, tmp_path: Path) -> None:
    """L5, L13: the teacher stays out of the checkpoint even where a subclass saves all that it was given."""

    class Saving(DistillModule):
        def __init__(self, student: nn.Module, teacher: nn.Module, width: int = 7) -> None:
            super().__init__(student, teacher)
            self.save_hyperparameters()

    run = trainer()
    run.fit(Saving(student(), teacher()), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"width": 7}
    assert sorted(saved["state_dict"]) == sorted(f"student.{name}" for name in student().state_dict())
    back = load_teacher(tmp_path / "last.ckpt", student(4))
    assert sorted(back.state_dict()) == sorted(student().state_dict())


def test_a_second_callback_of_the_trainers_works_beside_the_modules_own(trainer: MakeTrainer) -> None:
    """L21: Lightning replaces a trainer's callbacks by a module's of the same kind; a DistillCallback is kept."""
    module = DistillModule(student(), teacher())
    run = trainer(callbacks=[DistillCallback(teacher(4), student="student", name="second")], log_every_n_steps=1)
    run.fit(module, loader())
    assert {"distill/logits_loss", "second/logits_loss"} <= run.callback_metrics.keys()
    with pytest.raises(Exception, match=r"`name` to be distinct.*name='distill'"):
        trainer(callbacks=[DistillCallback(teacher(4), student="student")]).fit(module, loader())


def test_the_teacher_gets_another_input_if_teacher_forward_is_overridden(trainer: MakeTrainer) -> None:
    class Upscaled(DistillCallback):
        def teacher_forward(self, call: Any) -> Any:
            return self.teacher(nn.functional.interpolate(call.args[0], scale_factor=2))

    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 5)
            self.seen: list[Any] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.shape)
            return self.head(x.flatten(1))

    big = Big()
    module = DistillModule(student(), teacher())
    module.distill = Upscaled(big, student="student")
    trainer().fit(module, loader())
    assert big.seen == [torch.Size([8, 1, 8, 8])] * 2


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_a_teacher_is_restored_where_garbage_is_collected_inside_a_transform(dtype: str | None) -> None:
    """torch.func refuses `requires_grad_()` there, and Python would only print the error."""
    held = teacher(5)
    held.layer1.weight.requires_grad_(False)
    before = [(parameter.requires_grad, parameter.dtype) for parameter in held.parameters()]
    network = student()
    distillers = [Distiller(network, held, teacher_dtype=dtype)]
    with distillers[0].record():
        network(torch.randn(4, 16))
    distillers[0].total(torch.zeros(()))
    assert not any(parameter.requires_grad for parameter in held.parameters())

    def dropping(x: torch.Tensor) -> torch.Tensor:
        distillers.clear()
        gc.collect()
        return x.sum()

    torch.func.grad(dropping)(torch.ones(3))
    assert [(parameter.requires_grad, parameter.dtype) for parameter in held.parameters()] == before
