"""A small convolutional network with the places that losses with parts of their own read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Maps (N, 2, 3, 3): batch normalisation ``norm`` before a ReLU, then ``body`` with smaller maps, and ``head``."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(2, channels, 1), nn.BatchNorm2d(channels)
            self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 2, padding=1, stride=2), nn.ReLU())
            self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * channels, 3)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(self.norm(self.conv(x)).relu())).flatten(1))
