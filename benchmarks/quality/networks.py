"""The networks of the experiments."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn


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


IMAGES, SIGNALS = (3, 3), (1, 5)  # kernels
LARGE = {kernel: partial(Convolutional, [32, 32], [64, 64], kernel, 0.3) for kernel in (IMAGES, SIGNALS)}
SMALL = {kernel: partial(Convolutional, [8], [12], kernel) for kernel in (IMAGES, SIGNALS)}
