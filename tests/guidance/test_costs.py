"""Costs of a PyTorch model for one example, against computations by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_distill import Call
from lightning_distill.guidance.costs import costs


def shared() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def tokens() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(1, 6, 8),) * 3


# model, example, parameters, multiply-adds
CASES: dict[str, tuple[nn.Module, Any, int, int]] = {
    "linear": (nn.Linear(8, 3), torch.zeros(1, 8), 27, 8 * 3),
    "convolution": (nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), 112, 6 * 6 * 4 * 3 * 9),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), torch.zeros(1, 4, 8, 8), 152, 6 * 6 * 8 * 2 * 9),
    "transposed": (nn.ConvTranspose1d(8, 4, 3), torch.zeros(1, 8, 6), 100, 6 * 8 * 4 * 3),
    "lstm": (nn.LSTM(8, 3, batch_first=True), torch.zeros(1, 6, 8), 156, 6 * 12 * (8 + 3)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), tokens(), 288, 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8),
    "transformer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.zeros(1, 6, 8),
        600,
        4 * 6 * 8 * 8 + 2 * 6 * 6 * 8 + 2 * 6 * 8 * 16,
    ),
    "shared weight": (shared(), torch.zeros(1, 4), 16, 2 * 16),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_multiply_adds_equal_those_by_hand(name: str) -> None:
    model, example, parameters, multiply_adds = CASES[name]
    measured = costs(model, example)
    assert (measured["parameters"], measured["multiply_adds"]) == (parameters, multiply_adds)
    assert measured["bytes"] == 4 * parameters
    assert measured["latency_seconds"] > 0
    assert measured["memory_bytes"] is None


def test_products_that_cannot_be_counted_are_not_known() -> None:
    assert costs(nn.Bilinear(8, 8, 3), (torch.zeros(1, 8), torch.zeros(1, 8)))["multiply_adds"] is None


def test_buffers_and_precision_count_among_the_bytes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    assert costs(model, torch.zeros(1, 4, dtype=torch.bfloat16))["bytes"] == 2 * (20 + 8 + 8) + 8


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout().eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs(model, torch.randn(1, 4))
    assert [part.training for part in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_may_have_names() -> None:
    class Named(nn.Module):
        def forward(self, *, tokens: torch.Tensor, scale: float) -> torch.Tensor:
            return tokens @ torch.ones(4, 2) * scale

    inputs = {"tokens": torch.ones(1, 4), "scale": 2.0}
    assert costs(Named(), inputs)["multiply_adds"] == 8
    assert costs(Named(), Call((), inputs))["multiply_adds"] == 8


@pytest.mark.parametrize(
    ("model", "example", "error", "words"),
    [
        (len, torch.zeros(1, 4), TypeError, "Expected `module` to be a torch.nn.Module, but got"),
        (
            nn.Linear(4, 2),
            [1.0],
            TypeError,
            "`example` to be a tensor, or a tuple or dict with tensors, but got",
        ),
        (
            nn.Linear(4, 2),
            torch.zeros(8, 4),
            ValueError,
            r"one example, but got a tensor of shape \(8, 4\). Pass",
        ),
        (nn.LazyLinear(2), torch.zeros(1, 4), ValueError, "parameters of known shapes, but got lazy parameters. Run"),
    ],
)
def test_wrong_arguments_are_refused(model: Any, example: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        costs(model, example)
