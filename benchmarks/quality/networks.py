"""The networks of the experiments and the plain LightningModule that trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

UNLABELLED = -100  # cross entropy ignores this label


class Classifier(LightningModule):
    """A network, Adam on a one-cycle schedule, and the accuracy on the test examples after each epoch."""

    def __init__(self, make: Callable[[], nn.Module], lr: float) -> None:
        super().__init__()
        self.net, self.lr = make(), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        total = F.cross_entropy(self.net(inputs), labels, ignore_index=UNLABELLED, reduction="sum")
        return total / (labels != UNLABELLED).sum().clamp(min=1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        hits = (self.net(inputs).argmax(1) == labels).float()
        self.log("accuracy", hits.mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def convolution(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Convolutional(nn.Module):
    """Two stages of convolutions and a linear classifier on the average: logits ``(N, 10)`` of ``(N, 1, H, W)``."""

    def __init__(self, early: list[int], deep: list[int], kernel: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        stride = (min(2, kernel[0]), 2)  # signals are images with one row
        self.early = nn.Sequential(
            *(
                convolution(before, after, kernel, stride if place == len(early) - 1 else (1, 1))
                for place, (before, after) in enumerate(zip([1, *early], early, strict=False))
            )
        )
        self.deep = nn.Sequential(
            *(
                convolution(before, after, kernel, stride if place == 0 else (1, 1))
                for place, (before, after) in enumerate(zip([early[-1], *deep], deep, strict=False))
            )
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(deep[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.pooled(self.deep(self.early(images)))))
        return logits


def perceptron(inputs: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers, as in the papers on MNIST and on MNIST-1D."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((inputs, width), (width, width)):
        layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(width, 10))
