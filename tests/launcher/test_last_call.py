"""Between two losses the hooks hold only the student's last call (N11)."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import Mlp

from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge


@pytest.mark.parametrize("criterion", [Knowledge(), Intermediate(["body"])])
def test_fifty_calls_without_a_loss_hold_one_graph(distiller, criterion):
    student, x = Mlp(5), torch.randn(3, 4)
    ready = distiller(student, Mlp(5, seed=1), criterion)
    ready.on_train_begin()
    outputs = [weakref.ref(student(x)) for _ in range(50)]
    assert sum(output() is not None for output in outputs) == 1
    ready.on_epoch_begin(0)
    assert outputs[-1]() is None


def test_the_last_call_is_the_one_that_is_read(distiller):
    student, teacher = Mlp(5), Mlp(5, seed=1)
    first, second = torch.randn(2, 3, 4)
    ready = distiller(student, teacher, Intermediate(["body"]))
    ready.on_train_begin()
    student(first)
    total = ready.on_after_compute_loss(None, student(second), torch.tensor(0.0))
    torch.testing.assert_close(total, (student.body(second) - teacher.body(second)).square().mean())


@pytest.mark.parametrize("criterion", [Knowledge(), Intermediate(["body"])])
def test_an_output_of_an_earlier_call_is_refused_where_its_input_or_layers_are_read(distiller, criterion):
    """Otherwise the features of another batch would be compared silently."""
    student, x = Mlp(5), torch.randn(3, 4)
    ready = distiller(student, Mlp(5, seed=1), criterion)
    ready.on_train_begin()
    output, _ = student(x), student(x + 1)
    with pytest.raises(ValueError, match="the output of the student's last call, but got that of an earlier one"):
        ready.on_after_compute_loss(None, output, torch.tensor(0.0))


def test_an_output_of_an_earlier_call_is_taken_where_the_input_is_given(distiller):
    """Two views of a batch, one after the other: outputs and inputs are all that is read."""
    student, teacher = Mlp(5), Mlp(5, seed=1)
    views = torch.randn(2, 3, 4)
    ready = distiller(student, teacher, Knowledge(1.0, ["CE", "MSE"], [0.0, 1.0]))
    ready.on_train_begin()
    outputs = [student(view) for view in views]
    totals = [
        ready.on_after_compute_loss(view, output, torch.tensor(0.0))
        for view, output in zip(views, outputs, strict=True)
    ]
    for view, output, total in zip(views, outputs, totals, strict=True):
        torch.testing.assert_close(total, (output - teacher(view)).square().mean())


def test_a_custom_criterion_keeps_no_loss(distiller):
    student, x = Mlp(5), torch.randn(3, 4)
    ready = distiller(student, Mlp(5, seed=1), lambda student, teacher, loss: loss + student.sum())
    ready.on_train_begin()
    output = student(x)
    loss = output.square().mean()
    held = weakref.ref(loss)
    ready.on_after_compute_loss(x, output, loss)
    del loss
    assert held() is None
