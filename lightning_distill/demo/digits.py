"""The demonstration's images, networks and LightningModule, which do not depend on distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

UNLABELLED = -100  # cross entropy ignores this label


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` from 0 to 1 and classes ``(N,)`` for training, validation and test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Teacher(nn.Sequential):
    """A convolutional network of about 68,000 parameters: logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("early", nn.Sequential(*_convolution(1, 32), *_convolution(32, 32), nn.MaxPool2d(2)))
        self.add_module("deep", nn.Sequential(*_convolution(32, 64), *_convolution(64, 64)))
        self.add_module("head", nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 10)))


class Student(nn.Sequential):
    """A convolutional network of about 1,500 parameters: logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("early", nn.Sequential(*_convolution(1, 8), nn.MaxPool2d(2)))
        self.add_module("deep", nn.Sequential(*_convolution(8, 12)))
        self.add_module("head", nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10)))


class Classifier(LightningModule):
    """A plain LightningModule without distillation.

    Args:
        net: Network from images to logits.
        lr: Highest learning rate.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean cross entropy of the labelled images; 0 where a batch has none."""
        images, labels = batch
        total = F.cross_entropy(self.net(images), labels, ignore_index=UNLABELLED, reduction="sum")
        return total / (labels != UNLABELLED).sum().clamp(min=1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on the validation images."""
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, batch_size=len(labels))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on the test images."""
        images, labels = batch
        accuracy = (self.net(images).argmax(1) == labels).float().mean()
        self.log("test_accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on a one-cycle schedule."""
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def load_digits_data() -> Digits:
    """1000 images for training, 297 for validation and 500 for test: always the same, stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    rest, test = train_test_split(range(len(classes)), test_size=500, stratify=classes, random_state=0)
    train, validation = train_test_split(rest, test_size=297, stratify=classes[rest], random_state=0)
    return Digits(*((images[part], classes[part]) for part in (train, validation, test)))


def hide_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """The labels, of which only a share of each class is kept; all others become :data:`UNLABELLED`."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.full_like(labels, UNLABELLED)
    for members in (torch.nonzero(labels == number).squeeze(1) for number in range(10)):
        chosen = members[torch.randperm(len(members), generator=generator)[: round(share * len(members))]]
        kept[chosen] = labels[chosen]
    return kept


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Predicted class ``(N,)`` of each image, by a network in eval mode."""
    classes: Tensor = net.eval()(images).argmax(1)
    return classes


def size(net: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def hit_rate(hits: Tensor) -> float:
    """The share of ``True`` among booleans ``(N,)``."""
    return float(hits.double().mean())
