"""One run, owner or process must not disturb another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from nets import InnerModule, Outputs, loader, student, teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import (
    Call,
    DistillationTerm,
    DistillCallback,
    Distiller,
    LogitsDistillation,
    Tap,
)
from lightning_distill.teachers.hold import Hold


class Validated(InnerModule):
    """Validates on any number of loaders, of which the student sees the first only."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return F.cross_entropy(self.model(batch[0]), batch[1]) if dataloader_idx == 0 else None


# Runs ----------------------------------------------------------------------------------------------------------------


class FitsInside(Callback):
    """Fits another module, with a callback of its own Trainer, in the middle of a fit."""

    def __init__(self, trainer: Any, callback: Callback) -> None:
        self.trainer, self.callback = trainer, callback

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer(callbacks=self.callback, max_epochs=1).fit(InnerModule(student()), loader())


def test_a_callback_that_a_running_trainer_uses_is_refused_by_another(trainer):
    callback = DistillCallback(teacher(), LogitsDistillation(weight=3.0))
    with pytest.raises(MisconfigurationException, match="one running Trainer"):
        trainer(callbacks=[callback, FitsInside(trainer, callback)], max_epochs=2).fit(InnerModule(student()), loader())
    outputs = Outputs()  # and it works again, with a copy inside
    inside = FitsInside(trainer, copy.deepcopy(callback))
    trainer(callbacks=[callback, inside, outputs], max_epochs=2).fit(InnerModule(student()), loader())
    alone = Outputs()
    trainer(callbacks=[callback, alone], max_epochs=2).fit(InnerModule(student()), loader())
    losses = [[output["loss"].item() for output in each.outputs] for each in (outputs, alone)]
    assert losses[0] == losses[1]


class Swaps(Callback):
    """Gives the distillation another teacher in the middle of a fit."""

    def __init__(self, distill: DistillCallback) -> None:
        self.distill = distill

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.distill.teacher = teacher(seed=9)


def test_another_teacher_is_taken_between_two_fits_and_refused_within_one(trainer):
    callback = DistillCallback(teacher())
    with pytest.raises(MisconfigurationException, match="`teacher` to stay the same"):
        trainer(callbacks=[callback, Swaps(callback)]).fit(InnerModule(student()), loader())
    callback.teacher = [teacher(seed=9)]
    losses = []
    for distill in (callback, DistillCallback(teacher(seed=9))):
        outputs = Outputs()
        trainer(callbacks=[distill, outputs]).fit(InnerModule(student()), loader())
        losses.append([output["loss"].item() for output in outputs.outputs])
    assert losses[0] == losses[1]
    with pytest.raises(TypeError, match="`teacher`"):
        callback.teacher = "teacher.ckpt"
    with Distiller(student(), teacher()) as distiller, pytest.raises(AttributeError):
        distiller.teacher = teacher()


def test_a_module_list_is_several_teachers():
    several = [teacher(2), teacher(3)]
    x, y = next(iter(loader()))
    totals = []
    for teachers in (several, nn.ModuleList(several)):
        network = student()
        with Distiller(network, teachers) as distiller:
            with distiller.record():
                loss = F.cross_entropy(network(x), y)
            totals.append(distiller.total(loss).item())
    assert totals[0] == totals[1]


def test_a_refused_hold_changes_nothing(trainer):
    network = teacher()
    first = Hold(network.head, torch.bfloat16)
    first.take()
    with pytest.raises(ValueError, match="teacher_dtype"):
        Hold(network).take()
    first.release()
    network.eval().requires_grad_(False)  # the state that a later hold restores
    later = Hold(network)
    later.take()
    later.release()
    assert not network.layer1.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


# Terms ---------------------------------------------------------------------------------------------------------------


class Running(DistillationTerm):
    """A term that keeps a running mean from its first call on, as an attribute and as a buffer."""

    student_taps, teacher_taps = (Tap("layer1"),), (Tap("layer1"),)

    def build(self, student: Call, teachers: Any) -> None:
        self.project = nn.Linear(student.feature(Tap("layer1")).shape[-1], 10)
        self.mean, self.steps = 1.0, 0
        self.register_buffer("largest", torch.zeros(()))

    def reset(self) -> None:
        self._modules.pop("project", None)
        self._buffers.pop("largest", None)

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        feature = self.project(student.feature(Tap("layer1")))
        value = F.mse_loss(feature, teacher.feature(Tap("layer1")))
        self.mean, self.steps = 0.5 * self.mean + 0.5 * value.item(), self.steps + 1
        self.largest = torch.maximum(self.largest, value.detach())
        return value / self.mean


def test_buffers_that_forward_updates_belong_to_one_owner():
    x, y = next(iter(loader()))

    def train(term: DistillationTerm, beside: DistillationTerm | None) -> list[float]:
        network, other = student(), student(seed=7)
        losses = []
        with Distiller(network, teacher(), term) as distiller, Distiller(other, teacher(), beside) as second:
            distiller.follow(torch.optim.SGD(network.parameters(), 0.0))
            second.follow(torch.optim.SGD(other.parameters(), 0.0))
            for _ in range(3):
                for model, owner in ((network, distiller), (other, second)):
                    with owner.record():
                        loss = F.cross_entropy(model(x), y)
                    total = owner.total(loss)
                    if owner is distiller:
                        losses.append(total.item())
            assert distiller.terms[0].steps == 3
        return losses

    term = Running(name="running")
    assert train(term, term) == train(Running(name="running"), None)


# Validation ----------------------------------------------------------------------------------------------------------


class Reductions(Callback):
    """Counts what the processes of a distributed validation would do together."""

    def __init__(self) -> None:
        self.count = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        reduce = trainer.strategy.reduce

        def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return reduce(tensor, *args, **kwargs)

        trainer.strategy.reduce = counted


class Silent(Validated):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return None


@pytest.mark.parametrize("loaders", [1, 2])
def test_processes_add_up_as_often_whatever_each_has_measured(trainer, loaders):
    counts = []
    for kind in (Validated, Silent):
        reductions = Reductions()
        callbacks = [DistillCallback(teacher()), reductions]
        trainer(callbacks=callbacks).validate(kind(student()), [loader()] * loaders, verbose=False)
        counts.append(reductions.count)
    assert counts[0] == counts[1] > 0


def test_keys_name_the_loader_of_several_also_if_only_one_is_measured(trainer):
    run = trainer(callbacks=DistillCallback(teacher()))
    run.validate(Validated(student()), [loader(), loader()], verbose=False)
    keys = {key for key in run.callback_metrics if key.startswith("distill/val_")}
    assert "distill/val_loss/dataloader_idx_0" in keys
    assert all(key.endswith("/dataloader_idx_0") for key in keys)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_scripted_teacher_is_put_back_into_eval_mode_in_every_step(trainer):
    torch.manual_seed(0)
    teacher = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    modes = []

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.teacher = nn.Linear(4, 3), teacher

        def training_step(self, batch, batch_idx):
            self.train()  # reaches the teacher, which the module keeps
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), 0.1)

    class Watched(DistillCallback):
        def teacher_forward(self, call):
            modes.append(teacher.training)
            return super().teacher_forward(call)

    data = DataLoader(TensorDataset(torch.randn(8, 4) + 2, torch.arange(8) % 3), 4)
    trainer(callbacks=[Watched(teacher, student="model")]).fit(Module(), data)
    assert modes == [False, False]
    assert torch.equal(teacher.state_dict()["0.running_mean"], torch.zeros(4))
