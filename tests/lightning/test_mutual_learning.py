"""Students that teach each other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from plain_trainer import PLAIN
from processes import run_processes
from teachers_in_processes import PLATEAUS, Rates, plateau_module, validation
from teachers_in_processes import module as pair_module
from tiny import CLASSES, INPUTS, Mlp, dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import FeatureDistillation, LogitsDistillation, MutualLearning, SoftTargetLoss
from lightning_distill.schedules import Linear

QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu", "num_sanity_val_steps": 0}
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Noisy(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner, self.drop = Mlp(6, seed=seed), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.drop(x))


def students() -> list[nn.Module]:
    return [Mlp(5), Mlp(7, seed=1), Mlp(6, seed=2)]


def optimizers() -> list:
    return [
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ]


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=4)


def divergence(student: Tensor, peer: Tensor) -> Tensor:
    p, q = peer.detach().softmax(1), student.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


def by_hand(networks: list[nn.Module], made: list, epochs: int, task_weight: float = 1.0) -> list[nn.Module]:
    """Each network by itself: its own loss, its own backward pass, its own optimizer."""
    steppers = [make(network.parameters()) for make, network in zip(made, networks, strict=True)]
    for _ in range(epochs):
        for x, y in loader():
            outputs = [network(x) for network in networks]
            for index, output in enumerate(outputs):
                peers = [peer for other, peer in enumerate(outputs) if other != index]
                distillation = torch.stack([divergence(output, peer) for peer in peers]).mean()
                steppers[index].zero_grad()
                (task_weight * F.cross_entropy(output, y) + distillation).backward()
            for stepper in steppers:
                stepper.step()
    return networks


@pytest.mark.parametrize("number", [2, 3])
def test_students_equal_a_loop_in_which_each_learns_by_itself(number: int) -> None:
    made = optimizers()[:number]
    module = MutualLearning(students()[:number], optimizer=made, task_weight=0.5)
    Trainer(max_epochs=2, **QUIET).fit(module, loader())
    expected = by_hand(students()[:number], made, 2, task_weight=0.5)
    for student, network in zip(module.students, expected, strict=True):
        for value, target in zip(student.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(value, target, rtol=2e-6, atol=2e-6)


class Gradients(Callback):
    """Notes the gradients of the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not hasattr(self, "noted"):
            self.noted = [[p.grad.clone() for p in student.parameters()] for student in pl_module.students]


def squared(student: Tensor, peer: Tensor) -> Tensor:
    """A loss of the user's own, which leaves gradients to both."""
    return (student - peer).square().mean()


@pytest.mark.parametrize(("own", "formula"), [(None, divergence), (squared, squared)])
def test_a_student_has_the_gradient_of_its_own_loss_alone(own, formula) -> None:
    noted = Gradients()
    module = MutualLearning(students()[:2], None if own is None else LogitsDistillation(own), task_weight=0)
    Trainer(max_steps=2, callbacks=[noted], **QUIET).fit(module, loader())
    networks = students()[:2]
    x, _ = next(iter(loader()))
    outputs = [network(x) for network in networks]
    for index, network in enumerate(networks):
        loss = formula(outputs[index], outputs[1 - index].detach())
        for value, target in zip(noted.noted[index], torch.autograd.grad(loss, network.parameters()), strict=True):
            torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
def test_two_processes_equal_one_that_sees_all_batches(tmp_path: Path) -> None:
    ended = run_processes(Path(__file__).parents[1] / "teachers_in_processes.py", "mutual", 2, tmp_path)
    assert ended[0] == ended[1]
    whole = pair_module()
    Trainer(max_epochs=2, **QUIET).fit(whole, DataLoader(dataset(16), batch_size=8))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(torch.tensor(ended[0][name]), value, rtol=5e-6, atol=5e-6)


@pytest.mark.distributed
def test_two_processes_lower_their_learning_rates_alike(tmp_path: Path) -> None:
    ended = run_processes(Path(__file__).parents[1] / "teachers_in_processes.py", "plateaus", 2, tmp_path)
    for kind in PLATEAUS:
        assert ended[0][kind] == ended[1][kind]
        rates = Rates()
        trainer = Trainer(max_epochs=6, callbacks=[rates], **QUIET)
        trainer.fit(plateau_module(kind), DataLoader(dataset(16), batch_size=8), validation(None))
        for epoch, seen in zip(ended[0][kind], rates.seen, strict=True):
            assert epoch == pytest.approx(seen, rel=1e-4)
        assert rates.seen[-1] != rates.seen[1]
        assert min(rates.seen[-1][-2:]) < 2.0


def noisy() -> MutualLearning:
    torch.manual_seed(5)
    term = LogitsDistillation(SoftTargetLoss(Linear(4.0, 1.0)), weight=Linear(0.0, 1.0))
    step = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    return MutualLearning([Noisy(1), Noisy(2)], term, optimizer=adam, lr_scheduler=step)


class SeedsBatches(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def test_a_resumed_training_is_equal_to_the_bit(tmp_path: Path) -> None:
    whole, first, resumed = noisy(), noisy(), noisy()
    Trainer(max_epochs=4, callbacks=[SeedsBatches()], **QUIET).fit(whole, loader())
    trainer = Trainer(max_epochs=4, callbacks=[SeedsBatches()], **QUIET)

    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    trainer.callbacks.append(Stops())
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    Trainer(max_epochs=4, callbacks=[SeedsBatches()], **QUIET).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(name.startswith("students.") for name in whole.state_dict())


def test_losses_are_logged_by_student_and_validation_has_their_mean() -> None:
    module = MutualLearning(students()[:2], lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(module, loader(), loader())
    logged = trainer.callback_metrics
    for index in (0, 1):
        total = logged[f"student_{index}/task_loss"] + logged[f"student_{index}/distillation_loss"]
        torch.testing.assert_close(logged[f"student_{index}/loss"], total)
    values = [logged["student_0/val_loss"], logged["student_1/val_loss"]]
    torch.testing.assert_close(logged["val_loss"], torch.stack(values).mean())
    assert [output.shape for output in module.predict_step(torch.ones(2, INPUTS), 0)] == [(2, CLASSES)] * 2


def test_a_plateau_is_looked_for_after_each_validation_alone() -> None:
    module = plateau_module("mutual")
    rates = Rates()
    trainer = Trainer(max_epochs=4, check_val_every_n_epoch=3, callbacks=[rates], **QUIET)
    trainer.fit(module, loader(), loader())
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [1, 1]


def test_a_validation_before_the_training_is_not_looked_at_by_a_plateau() -> None:
    module = plateau_module("mutual")
    trainer = Trainer(max_epochs=4, check_val_every_n_epoch=3, **QUIET)
    trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader(), loader())
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [1, 1]


def test_a_plateau_without_data_to_validate_on_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"data to validate on with a ReduceLROnPlateau.*got none"):
        Trainer(max_epochs=2, **QUIET).fit(plateau_module("mutual"), loader())


def test_copies_of_the_module_are_trained_apart() -> None:
    module = MutualLearning(students()[:2], optimizer=torch.optim.SGD)
    copied = copy.deepcopy(module)
    before = copy.deepcopy(module.state_dict())
    Trainer(max_epochs=1, **QUIET).fit(copied, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(copied.students[0].body.weight, before["students.0.body.weight"])


def test_students_that_do_not_fit_are_refused() -> None:
    student = Mlp(5)
    shares = Mlp(5)
    shares.body = student.body
    with pytest.raises(ValueError, match="`students` to be two or more networks, but got 1"):
        MutualLearning([student])
    with pytest.raises(ValueError, match=r"to share no parameters, but students 0 and 1 both have 'body.weight'"):
        MutualLearning([student, shares])
    with pytest.raises(ValueError, match=r"terms on outputs in MutualLearning, but terms\[0\].teacher_layer"):
        MutualLearning(students(), FeatureDistillation("body", "body"))
    with pytest.raises(ValueError, match="`optimizer` to be one for each of the 3 students, but got 2"):
        MutualLearning(students(), optimizer=optimizers()[:2])


def test_a_gradient_scaler_is_refused() -> None:
    module = MutualLearning(students())
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.strategy.precision_plugin.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(MisconfigurationException, match="a precision without a gradient scaler"):
        trainer.fit(module, loader())
