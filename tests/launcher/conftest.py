"""Fixtures of the launcher's tests: small real data, and a distiller that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device import ACCELERATOR
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_distill import Distillation

QUIET = {"accelerator": ACCELERATOR, "devices": 1, "enable_progress_bar": False}


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of scikit-learn's digits: 1200 to train with, 597 to score with."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.fixture
def distiller() -> Iterator[Callable[..., Distillation]]:
    """A factory of distillers with attributes set; each is closed after the test."""
    made: list[Distillation] = []

    def make(student: nn.Module, teacher: nn.Module | None, criterion: Any = None, **settings: Any) -> Distillation:
        conf = {"distillation": {"train": {"trainer": {**QUIET, **settings.pop("trainer_settings", {})}}}}
        conf["distillation"]["train"].update(settings.pop("train", {}))
        distiller = Distillation(conf)
        distiller.student_model, distiller.teacher_model, distiller.criterion = student, teacher, criterion
        for name, value in settings.items():
            assert hasattr(distiller, name), name
            setattr(distiller, name, value)
        made.append(distiller)
        return distiller

    yield make
    for distiller in made:
        distiller.close()
