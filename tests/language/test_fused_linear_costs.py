"""Tensors and products that ``fused_linear_divergence`` makes: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_distill.functional import fused_linear_divergence
from lightning_distill.functional.heads import prepare_heads
from lightning_distill.functional.rows import DIVERGENCES

TOKENS, VOCABULARY, STUDENT, TEACHER, CHUNK = 96, 500, 12, 20, 16
EACH = TOKENS * VOCABULARY  # multiplications and additions for each feature
ALL_PRODUCTS = EACH * (3 * STUDENT + TEACHER)
OPERATORS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": None, "baddbmm": None}


class Counted(TorchDispatchMode):
    """Size of the largest tensor made, and the multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            left, right = (args[index] for index in OPERATORS[name])
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        sizes = [tensor.untyped_storage().nbytes() // 8 for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def counted(*, frozen: tuple[str, ...] = (), backward: bool = True, **settings: Any) -> Counted:
    student_hidden, student_weight = torch.randn(TOKENS, STUDENT), torch.randn(VOCABULARY, STUDENT)
    tensors = [student_hidden, student_weight, torch.randn(TOKENS, TEACHER), torch.randn(VOCABULARY, TEACHER)]
    tensors = [tensor.double() for tensor in tensors]
    tensors[0].requires_grad_("hidden" not in frozen)
    tensors[1].requires_grad_("weight" not in frozen)
    settings = {"chunk_size": CHUNK, **settings}
    with Counted() as counts:
        loss = fused_linear_divergence(*tensors, **settings)
        if backward:
            loss.backward()
    return counts


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight(divergence: str) -> None:
    labels = torch.arange(TOKENS)
    counts = counted(divergence=divergence, labels=labels, task_weight=0.5, soft_cap=3.0, temperature=2.0)

    assert counts.largest == max(CHUNK * VOCABULARY, VOCABULARY * STUDENT, VOCABULARY * TEACHER)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, TOKENS])
def test_products_are_those_of_the_two_heads_and_of_the_students_gradients(chunk_size: int) -> None:
    assert counted(chunk_size=chunk_size).products == ALL_PRODUCTS


def test_a_frozen_head_and_frozen_hidden_states_save_their_products() -> None:
    assert counted(frozen=("weight",)).products == ALL_PRODUCTS - EACH * STUDENT
    assert counted(frozen=("hidden",)).products == ALL_PRODUCTS - EACH * STUDENT


def test_without_gradients_only_the_heads_are_applied() -> None:
    with torch.no_grad():
        assert counted(backward=False).products == EACH * (STUDENT + TEACHER)
    assert counted(frozen=("hidden", "weight"), backward=False).products == EACH * (STUDENT + TEACHER)


@pytest.mark.parametrize("part", [0, 1, TOKENS // 4, TOKENS // 2])
def test_products_are_in_proportion_to_the_tokens_that_count(part: int) -> None:
    mask = torch.randperm(TOKENS) < part
    assert counted(mask=mask).products * TOKENS == ALL_PRODUCTS * part
    assert counted(labels=torch.where(mask, 3, -100), task_weight=1.0).products * TOKENS == ALL_PRODUCTS * part


def test_columns_of_one_model_alone_are_not_multiplied() -> None:
    hidden, other = torch.randn(TOKENS, STUDENT), torch.randn(TOKENS, TEACHER)
    weight, larger = torch.randn(100, STUDENT, requires_grad=True), torch.randn(VOCABULARY, TEACHER)
    with Counted() as counts:
        fused_linear_divergence(hidden, weight, other, larger).backward()

    assert counts.products == TOKENS * 100 * (2 * STUDENT + TEACHER)


def test_the_shared_part_of_a_larger_weight_is_not_copied() -> None:
    hidden, weight, bias, smaller = torch.randn(4, 3), torch.randn(8, 3), torch.randn(8), torch.randn(6, 3)
    settings = {"ignore_index": -100, "task": False}
    student = prepare_heads((hidden, weight, bias), (hidden, smaller, None), None, None, **settings).student

    assert student.weight.shape == (6, 3)
    assert student.weight.data_ptr() == weight.data_ptr()
    assert student.bias.data_ptr() == bias.data_ptr()


def test_the_backward_pass_makes_no_products() -> None:
    hidden, weight = torch.randn(TOKENS, STUDENT, requires_grad=True), torch.randn(VOCABULARY, STUDENT)
    loss = fused_linear_divergence(hidden, weight, torch.randn(TOKENS, TEACHER), torch.randn(VOCABULARY, TEACHER))
    with Counted() as counts:
        loss.backward()

    assert counts.products == 0
