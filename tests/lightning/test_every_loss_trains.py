"""Every public loss in a real training: two epochs equal one epoch, a checkpoint, and another epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from device import ACCELERATOR
from lightning.pytorch import Callback, LightningModule, Trainer
from loss_case import LossCase
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, FeatureDistillation, LogitsDistillation, losses

# The base class of every loss.
BASES = {"DistillationLoss"}
ONE_EACH = {case.loss.__name__: case for case in reversed(CASES)}


class Shaped(nn.Module):
    """A network whose layer ``body`` gives what a row's loss compares: vectors, tokens, maps, scores."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(4, math.prod(shape[1:])), nn.Unflatten(1, shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))


class Module(LightningModule):
    def __init__(self, case: LossCase) -> None:
        super().__init__()
        self.model = Shaped(case.student_shape, seed=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class SeedSteps(Callback):
    """Makes what a loss draws depend on the step alone; a resumed run cannot have the old random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 + trainer.global_step)


def data(case: LossCase) -> DataLoader[Any]:
    """Two batches, with labels where the loss needs them."""
    size, classes, shape = 2 * case.student_shape[0], case.student_shape[1], case.student_shape
    dim = case.settings.get("class_dim", 1 if len(shape) >= 4 else -1) % len(shape)
    classes, rest = shape[dim], [length for index, length in enumerate(shape) if index not in (0, dim)]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (size, *rest), generator=generator)
    inputs = torch.randn(size, 4, generator=generator)
    if case.loss.needs_boxes:
        inputs = inputs[:, :, None, None]  # images of one pixel
    return DataLoader(TensorDataset(inputs, labels), batch_size=shape[0])


def whole_images(batch: Any) -> list[Tensor]:
    """One box for each image, as large as the image."""
    return [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * len(batch[0])


def rows(batch: Any) -> Tensor:
    """Rows of the data set that the inputs name."""
    return batch[0].argmax(dim=1)


def distilled(case: LossCase) -> DistillCallback:
    loss = case.loss(**{"mask_ratio": 0.5, **case.settings} if "mask" in case.settings else case.settings)
    layers = ["body", "body"] if loss.several_layers else "body"
    places = {"boxes": whole_images} if loss.needs_boxes else {"index": rows} if loss.needs_index else {}
    term = (
        LogitsDistillation(loss, weight=0.1)
        if case.on_logits
        else FeatureDistillation(layers, layers, loss, weight=0.1, **places)
    )
    # no task: what changes the student is the loss
    return DistillCallback(Shaped(case.shapes[1], seed=2), term, student="model", task_weight=0.0, validate=False)


def fit(case: LossCase, epochs: int, path: Path | None = None) -> tuple[Trainer, Module, DistillCallback]:
    module, callback = Module(case), distilled(case)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[callback, SeedSteps()],
        accelerator=ACCELERATOR,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(module, data(case), ckpt_path=path)
    return trainer, module, callback


def test_every_public_loss_has_a_row() -> None:
    assert set(ONE_EACH) | BASES == set(losses.__all__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_where_a_straight_one_does(case: LossCase, tmp_path: Path) -> None:
    _, straight, whole = fit(case, 2)
    trainer, first, callback = fit(case, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, second, resumed = fit(case, 2, tmp_path / "last.ckpt")

    for value, resumed_value, first_value in zip(
        straight.parameters(), second.parameters(), first.parameters(), strict=True
    ):
        assert torch.equal(value, resumed_value)
        assert not torch.equal(value, first_value)
    assert set(first.state_dict()) == {"model.body.0.weight", "model.body.0.bias"}
    expected, actual = whole.adapter_state().get("adapters", {}), resumed.adapter_state().get("adapters", {})
    begun = callback.adapter_state().get("adapters", {})
    assert expected.keys() == actual.keys()
    assert bool(expected) == (case.parameters is not None or needs_adapter(case))
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, actual[name][key]), key
            assert not torch.equal(tensor, begun[name][key]), key
    for value, original in zip(whole.teacher.parameters(), Shaped(case.shapes[1], seed=2).parameters(), strict=True):
        assert torch.equal(value, original)
        assert value.requires_grad


def needs_adapter(case: LossCase) -> bool:
    channel = 1 if len(case.student_shape) == 4 else -1
    return case.loss.channels_must_match and case.shapes[0][channel] != case.shapes[1][channel]
