"""Small networks whose layers are paired, their data, and a step with the terms that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill import Distiller


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Stacked(nn.Module):
    """``stem``, ``blocks`` and ``head``."""

    def __init__(self, blocks: int = 6, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Plain(nn.Module):
    """``first``, ``second`` and ``head``, with a function between the first two."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.between(self.first(x)))))


def rows(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(size)) for size in sizes]


def names(pairs: Any) -> list[tuple[str, str]]:
    return [(pair.student.label, pair.teacher.label) for pair in pairs]


def trains(terms: list[Any], student: nn.Module, teacher: nn.Module, batch: Tensor) -> bool:
    with Distiller(student, teacher, terms, task_weight=0) as distiller:
        with distiller.record():
            student(batch)
        loss = distiller.loss()
        loss.backward()
    return bool(loss > 0)
