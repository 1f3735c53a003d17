"""Losses that are computed in chunks of rows: value and gradient do not depend on the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distill import AttentionRelationLoss, InterChannelCorrelationLoss, PixelRelationLoss, RelationalLoss
from lightning_distill.functional import attention, chunks

pytestmark = pytest.mark.tensors

CASES = [
    (RelationalLoss(distance_weight=0.0), (7, 5)),
    (InterChannelCorrelationLoss(), (7, 5, 2, 3)),
    (PixelRelationLoss(temperature=0.5), (7, 5, 2, 3)),
]


def differentiated(loss: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    student, teacher = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape).double()
    value = loss(student, teacher)
    value.backward()
    return value.detach(), student.grad


@pytest.mark.exact  # a GPU gets one chunk
@pytest.mark.parametrize(("loss", "shape"), CASES, ids=["angles", "channels", "pixels"])
@pytest.mark.parametrize("numbers", [1, 3 * 49], ids=str)
def test_chunks_change_neither_value_nor_gradient(
    loss: Any, shape: tuple[int, ...], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one row, and of some with a smaller one at the end."""
    whole = differentiated(loss, shape)
    calls: list[Any] = []
    original = chunks.checkpoint
    monkeypatch.setattr(chunks, "checkpoint", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    monkeypatch.setattr(chunks, "_SMALLEST_CHUNK", numbers)
    parts = differentiated(loss, shape)
    assert len(calls) > 1
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.exact  # a GPU gets one chunk
@pytest.mark.parametrize("numbers", [45, 3 * 45, 7 * 45], ids=str)
def test_chunks_of_examples_change_neither_value_nor_gradient(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention relations are kept for the backward pass, but what lies between them and the loss is not."""
    loss, shape = AttentionRelationLoss(relation_heads=5), (7, 3, 10)
    whole = differentiated(loss, shape)
    calls: list[Any] = []
    original = attention.softmax_divergence
    monkeypatch.setattr(
        attention, "softmax_divergence", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs)
    )
    monkeypatch.setattr(chunks, "_SMALLEST_CHUNK", numbers)
    torch.testing.assert_close(differentiated(loss, shape), whole, rtol=1e-12, atol=1e-12)
    assert len(calls) == {45: 7, 3 * 45: 2, 7 * 45: 1}[numbers]


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (RelationalLoss(), (256, 512)),
        (InterChannelCorrelationLoss(), (256, 512, 8, 8)),
        (AttentionRelationLoss(relation_heads=8), (256, 64, 512)),
    ],
    ids=["relational", "channels", "attention"],
)
def test_a_gpu_has_one_chunk_where_memory_allows(
    loss: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small chunks would cost more time to launch than to compute. "meta" stands for a device with 16 GB."""
    calls: list[Any] = []
    for module, name in ((chunks, "checkpoint"), (torch, "cat")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args))

    loss(torch.empty(shape, device="meta", requires_grad=True), torch.empty(shape, device="meta")).backward()

    assert calls == []


def test_chunks_on_a_gpu_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device, free = torch.device("cuda"), 2**30
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**29)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))

    assert chunks._fitting(device, 2**20, 4) == 2**20
    assert chunks._fitting(device, 2**40, 4) == (free + 2**29) // (4 * 4 * 4)
