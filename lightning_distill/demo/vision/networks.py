"""The demonstration's networks for images: a vision transformer, and a small convolutional network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_distill.demo.vision.images import CLASSES, SIZE

PATCH = 4
GRID = SIZE // PATCH


class Transformer(nn.Module):
    """A vision transformer with a class token: scores ``(N, 10)`` of images ``(N, 3, 24, 24)``.

    Args:
        width: Number of channels of a token.
        depth: Number of blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, GRID**2 + 1, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens ``(N, 37, C)``, the class token first."""
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1)
        normalized: Tensor = self.norm(self.blocks(tokens + self.places))
        return normalized

    def forward(self, images: Tensor) -> Tensor:
        """The scores, from the mean of all tokens."""
        scores: Tensor = self.head(self.tokens(images).mean(1))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """Maps of the patches ``(N, C, 6, 6)``."""
        return self.tokens(images)[:, 1:].mT.reshape(len(images), -1, GRID, GRID)


class Student(nn.Module):
    """A convolutional network with maps of the transformer's grid: scores ``(N, 10)`` of images ``(N, 3, 24, 24)``.

    Args:
        width: Number of channels of the first maps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.head = nn.Linear(2 * width * 9, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """The scores."""
        scores: Tensor = self.head(pooled(self.features(images)))
        return scores


class Classifier(LightningModule):
    """A plain LightningModule without distillation; without labels its step returns no loss.

    Args:
        net: Network from images to scores.
        lr: Highest learning rate.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        """The mean cross entropy, in nats."""
        images, *labels = batch
        scores = self.net(images)
        return F.cross_entropy(scores, labels[0]) if labels else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def pooled(maps: Tensor) -> Tensor:
    """The means of maps ``(N, C, 6, 6)`` over squares of four positions, as vectors ``(N, 9 C)``."""
    return F.avg_pool2d(maps, 2).flatten(1)


@torch.no_grad()
def described(net: Transformer | Student, images: Tensor) -> Tensor:
    """Vectors ``(N, 9 C)`` of a network's features in eval mode, for a linear classifier."""
    net.eval()
    return torch.cat([pooled(net.features(some)) for some in torch.split(images, 256)])


@torch.no_grad()
def hit_rate(net: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share of images that a network in eval mode classifies rightly."""
    net.eval()
    return float(torch.cat([net(some).argmax(1) for some in torch.split(images, 256)]).eq(classes).float().mean())


def probe(features: tuple[Tensor, Tensor], classes: tuple[Tensor, Tensor]) -> float:
    """The share of test images that a linear classifier of frozen features gets right.

    Args:
        features: Vectors ``(N, C)`` to train on and to test.
        classes: Their classes.

    Example:
        >>> vectors, classes = torch.eye(3), torch.arange(3)
        >>> probe((vectors, vectors), (classes, classes))
        1.0
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = features[0].mean(0), features[0].std(0).clamp_min(1e-6)
    train, test = (((vectors - mean) / scale).numpy() for vectors in features)
    classifier = LogisticRegression(C=0.01, max_iter=500).fit(train, classes[0].numpy())
    return float(classifier.score(test, classes[1].numpy()))
