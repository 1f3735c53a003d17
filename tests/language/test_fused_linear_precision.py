"""Half precision, autocast, forbidden tokens and extreme logits in ``fused_linear_divergence``."""

from __future__ import annotations

import math
from typing import Any

import oracle_tokens
import pytest
import torch
from device import DEVICE
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional import fused_linear, fused_linear_divergence, rows

pytestmark = pytest.mark.tensors

NAMES = rows.DIVERGENCES
every_divergence = pytest.mark.parametrize("name", NAMES)
HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def heads(dtype: torch.dtype, tokens: int = 24, vocabulary: int = 300, width: int = 16) -> list[Tensor]:
    """Hidden states, weight and bias of the student, then of the teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    return [torch.randn(shape, generator=generator).div(width**0.25).to(dtype) for shape in 2 * shapes]


def results(tensors: list[Tensor], labels: Tensor | None = None, **settings: Any) -> list[Tensor]:
    """Loss and the gradients by the student's tensors."""
    student = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    hidden, weight, bias, *teacher = *student, *tensors[3:]
    loss = fused_linear_divergence(
        hidden, weight, *teacher[:2], labels, student_bias=bias, teacher_bias=teacher[2], **settings
    )
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in student)]


def exact(tensors: list[Tensor], labels: Tensor | None = None, **settings: Any) -> list[Tensor]:
    tensors = [tensor.detach().double() for tensor in tensors]
    student = [tensor.requires_grad_() for tensor in tensors[:3]]
    settings.pop("chunk_size", None)
    loss = oracle_tokens.fused_linear(tuple(student), tuple(tensors[3:]), labels, **settings)
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("chunk_size", [2, 7, None])  # more chunks than bfloat16 sums, few, a single one
@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_divergence
def test_half_precision_is_as_close_as_its_logits(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    tensors, labels = heads(dtype), torch.randint(0, 300, (24,))
    settings = {"divergence": name, "temperature": 1.5, "task_weight": 0.5, "alpha": 0.6, "chunk_size": chunk_size}
    loss, *gradients = results(tensors, labels, **settings)
    reference, *exact_gradients = exact(tensors, labels, **settings)

    assert loss.dtype == torch.float32
    assert error(loss, reference) < HALF[dtype]
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert error(gradient, exact_gradient) < HALF[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_many_chunks_of_half_precision_are_summed_as_precisely_as_a_single_one(dtype: torch.dtype) -> None:
    tensors = heads(dtype, tokens=256, vocabulary=50)
    references = exact(tensors)[1:]
    many, single = (
        [error(*pair) for pair in zip(results(tensors, chunk_size=size)[1:], references, strict=True)]
        for size in (2, 256)
    )

    assert all(some < 1.2 * alone for some, alone in zip(many, single, strict=True))


def small_gradients() -> list[Tensor]:
    """Models so close that the gradients of the logits, about 1e-8, are less than the smallest number of float16."""
    hidden, weight, _, _, _, _ = heads(torch.float16, tokens=64, vocabulary=4000)
    zeros = torch.zeros(4000, dtype=torch.float16)
    noise = torch.randn(hidden.shape, dtype=torch.float16)
    return [hidden, weight / 8, zeros, hidden + 2e-3 * noise, weight / 8, zeros]


def test_float16_gradients_do_not_vanish_before_the_scale_of_a_grad_scaler() -> None:
    tensors = small_gradients()
    student = [tensor.detach().clone().requires_grad_() for tensor in tensors[:2]]
    loss = fused_linear_divergence(*student, tensors[3], tensors[4])
    (2.0**18 * loss).backward()
    _, *references = exact(tensors)

    for tensor, reference in zip(student, references, strict=False):
        assert error(tensor.grad.double() / 2**18, reference) < 0.05


def test_float16_gradients_would_vanish_without_a_factor_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "_FLOAT16_LARGEST", 1.0)
    with pytest.raises(AssertionError):
        test_float16_gradients_do_not_vanish_before_the_scale_of_a_grad_scaler()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_products_and_keeps_the_gradients_precision(dtype: torch.dtype) -> None:
    tensors = heads(torch.float32)
    with torch.autocast(DEVICE, dtype):
        loss, *gradients = results(tensors, chunk_size=7)
    lowered, *_ = results([tensor.to(dtype) for tensor in tensors], chunk_size=7)

    assert loss == lowered
    for gradient, exact_gradient in zip(gradients, exact(tensors)[1:], strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, exact_gradient) < HALF[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_models_may_differ_in_precision(dtype: torch.dtype) -> None:
    tensors = [*heads(torch.float32)[:3], *(tensor.to(dtype) for tensor in heads(torch.float32)[3:])]
    loss, *gradients = results(tensors)

    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert error(loss, exact(tensors)[0]) < HALF[torch.bfloat16]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


# Forbidden tokens and extreme logits ---------------------------------------------------------------------------------

SIDES = {"student": (2,), "teacher": (5,), "both": (2, 5)}


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@every_divergence
def test_forbidden_tokens_leave_loss_and_gradients_finite(
    name: str, side: str, dtype: torch.dtype, temperature: float
) -> None:
    tensors = heads(dtype)
    for index in SIDES[side]:
        tensors[index][3] = -math.inf
    for beta in (0.5, -0.4) if name == "alpha_beta" else (0.5,):
        loss, *gradients = results(
            tensors, torch.zeros(24).long(), divergence=name, temperature=temperature, task_weight=0.5, beta=beta
        )

        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_forbidden_tokens_count_as_in_the_functions_on_logits(name: str, side: str) -> None:
    tensors = heads(torch.float64)
    for index in SIDES[side]:
        tensors[index][3] = -math.inf
    function = {"kl": functional.soft_target_kl, "jsd": functional.generalized_jsd}.get(name)
    function = function or getattr(functional, name)
    settings = {} if name.startswith("skew") else {"temperature": 2.0}
    student = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    logits = torch.nn.functional.linear(*student), torch.nn.functional.linear(*tensors[3:])
    reference = function(*logits, **settings, reduction="mean")
    reference.backward()
    loss, *gradients = results(tensors, divergence=name, **settings)

    torch.testing.assert_close(loss, reference.detach())
    if reference < 1e20:  # else the gradients are those of a number that only says "impossible"
        torch.testing.assert_close(gradients, [tensor.grad for tensor in student])


@every_divergence
def test_tokens_forbidden_to_both_do_not_count(name: str) -> None:
    tensors = heads(torch.float64)
    rest = [tensor if tensor.shape[0] == 24 else tensor[:-2] for tensor in tensors]
    for index in (2, 5):
        tensors[index][-2:] = -math.inf
    if name == "alpha_beta":  # whose powers of 0 are 0 with positive exponents alone
        assert torch.isfinite(results(tensors, divergence=name, beta=-0.4)[0])
    loss, *gradients = results(tensors, divergence=name, beta=0.3)
    expected, *expected_gradients = results(rest, divergence=name, beta=0.3)

    torch.testing.assert_close(loss, expected)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient[: len(reference)], reference)
        assert (gradient[len(reference) :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_divergence
def test_rows_in_which_every_token_is_forbidden_are_finite(name: str, dtype: torch.dtype) -> None:
    tensors = heads(dtype)
    tensors[2].fill_(-math.inf)
    tensors[5].fill_(-math.inf)
    loss, *gradients = results(tensors, torch.zeros(24).long(), divergence=name, task_weight=0.5)

    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("size", [1e-4, 1e4])
@every_divergence
def test_extreme_logits_are_finite(name: str, size: float) -> None:
    tensors = heads(torch.float32)
    tensors[0], tensors[3] = size * tensors[0], size * tensors[3]
    loss, *gradients = results(tensors, divergence=name, temperature=0.5)

    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
