"""A small convolutional network with the places that losses with parts of their own read, and a step with them."""

from __future__ import annotations

from typing import Any

import torch
from device import DEVICE
from loss_case import golden_arrays
from torch import Tensor, nn

from lightning_distill import Distiller, losses


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


def built(loss: losses.DistillationLoss, *shapes: tuple[int, ...]) -> Any:
    loss.build(*(torch.Size(shape) for shape in (shapes if len(shapes) == 2 else shapes * 2)))
    return loss.double().to(DEVICE)


def one_step(teacher: Any, *terms: Any, student: nn.Module | None = None) -> list[Any]:
    """The terms of a distiller after one step, in which the student learns."""
    student = Network(4, seed=1) if student is None else student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with Distiller(student, teacher, list(terms)) as distiller:
        distiller.follow(optimizer)
        with distiller.record():
            output = student(torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
        distiller.total(output.square().mean(), None).backward()
        optimizer.step()
        return distiller.terms


def tensors_of(entry: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
