"""Batches of images alone: a student learns from the teacher without a task loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from nets import make
from plain_trainer import PLAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation
from lightning_distill.schedules import Linear

QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu"}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values).mean((2, 3)))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trained_by_hand(student: Network, teacher: Network, adapter: nn.Module) -> Network:
    optimizer = sgd([*student.parameters(), *adapter.parameters()])
    for start in (0, 4):
        images = IMAGES[start : start + 4]
        loss = F.mse_loss(adapter(student.body(images)), teacher.body(images).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


class FirstAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = make(nn.Conv2d, 7, 4, 6, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.map(feature)


BATCHES: dict[str, Any] = {
    "a tensor": DataLoader(IMAGES, batch_size=4),
    "a list with a tensor": DataLoader(TensorDataset(IMAGES), batch_size=4),
    "a dict": DataLoader([{"pixel_values": image} for image in IMAGES], batch_size=4),
    "with labels": DataLoader(TensorDataset(IMAGES, torch.arange(8) % 3), batch_size=4),
}


@pytest.mark.parametrize("form", BATCHES)
def test_a_module_trains_on_batches_of_images_alone(form: str) -> None:
    student, teacher, adapter = make(Network, 1), make(Network, 2, 6), FirstAdapter()
    expected = trained_by_hand(copy.deepcopy(student), teacher, copy.deepcopy(adapter))
    term = FeatureDistillation("body", "body", adapter=adapter)
    module = DistillModule(student, teacher, term, task_weight=0, optimizer=sgd)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, BATCHES[form], BATCHES[form])
    for trained, hand in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, hand)
    metrics = trainer.callback_metrics
    assert metrics["distill/loss"] == metrics["distill/distillation_loss"] > 0
    assert metrics["distill/val_distillation_loss"] > 0
    assert ("train_loss" in metrics) == ("distill/task_loss" in metrics) == ("val_loss" in metrics) == (form[0] == "w")
    if form[0] != "w":
        assert trainer.test(module, BATCHES[form], verbose=False) == [{}]
    assert len(trainer.predict(module, BATCHES[form])) == 2


def test_agreement_with_the_teacher_needs_no_labels() -> None:
    module = DistillModule(make(Network, 1), make(Network, 2), LogitsDistillation(), task_weight=0, optimizer=sgd)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, BATCHES["a tensor"], BATCHES["a tensor"])
    expected = (module.student(IMAGES).argmax(1) == module.teacher(IMAGES).argmax(1)).float().mean()
    assert trainer.callback_metrics["distill/val_teacher_agreement"] == expected


@pytest.mark.parametrize("form", ["a tensor", "a list with a tensor", "a dict"])
def test_a_task_weight_without_labels_says_what_to_pass(form: str) -> None:
    module = DistillModule(Network(), Network(), LogitsDistillation())
    with pytest.raises(ValueError, match=r"a batch with inputs and labels for the task loss, .* Pass task_weight=0"):
        Trainer(max_epochs=1, **QUIET).fit(module, BATCHES[form], BATCHES[form])


def test_a_place_of_labels_that_a_batch_lacks_is_an_error_still() -> None:
    module = DistillModule(Network(), Network(), LogitsDistillation(), task_weight=0, labels="classes")
    with pytest.raises(ValueError, match="to say where a batch keeps its labels"):
        Trainer(max_epochs=1, **QUIET).fit(module, BATCHES["a dict"], BATCHES["a dict"])


class Unlabelled(LightningModule):
    """A module of the user's whose step has no loss of its own."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.model, self.returned, self.calls = make(Network, 1), returned, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        if self.returned != "never called":
            output = self.model(batch)
        if self.returned == "zero":
            return output.new_zeros(())
        return {"loss": output.new_zeros(())} if self.returned == "dict" else None

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("returned", ["None", "zero", "dict"])
def test_a_module_whose_step_has_no_loss_trains_with_the_callback(returned: str) -> None:
    module, teacher, adapter = Unlabelled(returned), make(Network, 2, 6), FirstAdapter()
    expected = trained_by_hand(copy.deepcopy(module.model), teacher, copy.deepcopy(adapter))
    callback = DistillCallback(teacher, FeatureDistillation("body", "body", adapter=adapter), task_weight=0)
    Trainer(callbacks=callback, max_epochs=1, **QUIET).fit(module, BATCHES["a tensor"])
    for trained, hand in zip(module.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, hand)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("weight", [1.0, Linear(0.0, 1.0)], ids=["number", "schedule"])
def test_steps_that_return_nothing_although_a_task_loss_counts_are_refused(weight: Any) -> None:
    callback = DistillCallback(make(Network, 2), LogitsDistillation(), task_weight=weight)
    with pytest.raises(MisconfigurationException, match=r"returned None in every step, .* or pass task_weight=0"):
        Trainer(callbacks=callback, max_epochs=1, **QUIET).fit(Unlabelled("None"), BATCHES["a tensor"])


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_without_a_call_of_the_student_is_skipped() -> None:
    module = Unlabelled("never called")
    before = copy.deepcopy(module.model.state_dict())
    callback = DistillCallback(make(Network, 2), LogitsDistillation(), task_weight=0, student="model")
    Trainer(callbacks=callback, max_epochs=1, **QUIET).fit(module, BATCHES["a tensor"])
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert module.calls == 2
