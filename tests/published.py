"""Published cases with several inputs of the student: their tensors, and checks of value and gradients."""

from __future__ import annotations

import pytest
import torch
from loss_case import golden_arrays, golden_index
from torch import Tensor


def entries(*keys: str) -> pytest.MarkDecorator:
    rows = [pytest.param(entry, id=f"{entry['key']}-{entry['case']}") for key in keys for entry in golden_index(key)]
    return pytest.mark.parametrize("entry", rows)


def leaves(entry: dict) -> dict[str, Tensor]:
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    for name in entry["student_inputs"]:
        tensors[name].requires_grad_()
    return tensors


def check(value: Tensor, entry: dict, tensors: dict[str, Tensor], **tolerance: float) -> None:
    """The value and the gradient of each of the student's inputs."""
    value.backward()
    tolerance = tolerance or entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    for name in entry["student_inputs"]:
        torch.testing.assert_close(tensors[name].grad, tensors[f"grad_{name}"], **tolerance)


def logits(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    student, teacher = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher
