"""Loss and gradients of ``fused_linear_divergence`` against dense formulas in float64."""

from __future__ import annotations

import inspect
from typing import Any

import oracle_tokens
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional import fused_linear_divergence

pytestmark = pytest.mark.tensors

Side = tuple[Tensor, Tensor, Tensor | None]

DIVERGENCES: dict[str, dict[str, Any]] = {
    "kl": {"divergence": "kl", "temperature": 2.0},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 0.7},
    "jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 1.5},
    "jsd_0": {"divergence": "jsd", "beta": 0.0, "temperature": 1.5},
    "jsd_1": {"divergence": "jsd", "beta": 1.0},
    "skew_kl": {"divergence": "skew_kl", "skew": 0.2},
    "skew_kl_0": {"divergence": "skew_kl", "skew": 0.0, "temperature": 2.0},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl", "skew": 0.2, "temperature": 2.0},
    "skew_reverse_kl_0": {"divergence": "skew_reverse_kl", "skew": 0.0},
    "total_variation": {"divergence": "total_variation", "temperature": 1.5},
    "alpha_beta": {"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7, "temperature": 1.5},
    "alpha_beta_negative": {"divergence": "alpha_beta", "alpha": 1.2, "beta": -0.4},
    "alpha_beta_no_alpha": {"divergence": "alpha_beta", "alpha": 0.0, "beta": 0.6},
    "alpha_beta_no_beta": {"divergence": "alpha_beta", "alpha": 0.5, "beta": 0.0},
    "alpha_beta_no_sum": {"divergence": "alpha_beta", "alpha": 0.5, "beta": -0.5},
    "alpha_beta_zero": {"divergence": "alpha_beta", "alpha": 0.0, "beta": 0.0},
}
# Shapes of the inputs, and settings; the tensors of `inputs` follow.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": 0.3, "task_weight": 1.7},
    "task_alone": {"weight": 0.0, "task_weight": 0.5},
    "biases": {"biases": True, "task_weight": 0.5},
    "soft_cap": {"soft_cap": 2.0, "task_weight": 0.5},
    "soft_cap_of_the_student": {"soft_cap": (1.5, None), "scale": 2.0},
    "scales_and_caps": {"soft_cap": (3.0, 1.0), "scale": (0.5, 2.0), "biases": True, "task_weight": 0.5},
    "mask": {"mask": True},
    "mask_and_labels": {"mask": True, "labels": True, "task_weight": 0.5},
    "own_ignore_index": {"labels": True, "ignore_index": 3},
    "larger_student_vocabulary": {"vocabularies": (11, 8), "biases": True, "task_weight": 0.5},
    "larger_teacher_vocabulary": {"vocabularies": (8, 11), "biases": True, "task_weight": 0.5},
    "normalizer": {"normalizer": 13, "mask": True},
    "frozen_weight": {"frozen": (1,), "biases": True, "task_weight": 0.5},
    "frozen_hidden": {"frozen": (0,), "biases": True},
    "frozen_bias": {"frozen": (2,), "biases": True},
    "one_token": {"positions": (1, 1)},
    "whole_chunk": {"chunk_size": 100},
    "single_tokens": {"chunk_size": 1, "task_weight": 0.5},
    "chunks_that_divide": {"chunk_size": 5},
}


def inputs(
    positions: tuple[int, ...] = (2, 5),
    vocabularies: tuple[int, int] = (8, 8),
    biases: bool = False,
    mask: bool = False,
    labels: bool = False,
    frozen: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[Side, Side, Tensor | None, dict[str, Any]]:
    """Both models' tensors, the labels, and the rest of the settings."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    student, teacher = (
        (randn(*positions, width), randn(vocabulary, width) / width**0.5, randn(vocabulary) if biases else None)
        for width, vocabulary in zip((3, 4), vocabularies, strict=True)
    )
    for index, tensor in enumerate(student):
        if tensor is not None:
            tensor.requires_grad_(index not in frozen)
    target = None
    if labels or settings.get("task_weight"):
        target = torch.randint(0, min(vocabularies), positions, generator=generator)
    if labels and target is not None:
        target[0, 1], target[1, 2] = -100, -1
    if mask:
        settings["mask"] = torch.rand(positions, generator=generator) < 0.6
    settings.setdefault("chunk_size", 3)
    return student, teacher, target, settings


def fused(student: Side, teacher: Side, labels: Tensor | None, **settings: Any) -> Tensor:
    return fused_linear_divergence(
        *student[:2], *teacher[:2], labels, student_bias=student[2], teacher_bias=teacher[2], **settings
    )


def gradients(loss: Tensor, student: Side) -> list[Tensor]:
    trained = [tensor for tensor in student if tensor is not None and tensor.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def expected(student: Side, teacher: Side, labels: Tensor | None, **settings: Any) -> Tensor:
    settings.pop("chunk_size", None)
    return oracle_tokens.fused_linear(student, teacher, labels, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_gradients_equal_the_dense_oracle(name: str, variant: str) -> None:
    student, teacher, labels, settings = inputs(**DIVERGENCES[name], **VARIANTS[variant])
    loss, reference = (function(student, teacher, labels, **settings) for function in (fused, expected))

    torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-12)
    for gradient, exact in zip(gradients(loss, student), gradients(reference, student), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_gradients_in_float32_are_within_rounding(name: str) -> None:
    student, teacher, labels, settings = inputs(
        **DIVERGENCES[name], dtype=torch.float32, positions=(3, 20), vocabularies=(50, 50), biases=True, task_weight=0.5
    )
    loss, reference = (function(student, teacher, labels, **settings) for function in (fused, expected))

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for gradient, exact in zip(gradients(loss, student), gradients(reference, student), strict=True):
        assert (gradient - exact).norm() <= 1e-6 * exact.norm()


ON_LOGITS: dict[str, Any] = {
    "kl": functional.soft_target_kl,
    "reverse_kl": functional.reverse_kl,
    "jsd": functional.generalized_jsd,
    "skew_kl": functional.skew_kl,
    "skew_reverse_kl": functional.skew_reverse_kl,
    "total_variation": functional.total_variation,
}


@pytest.mark.parametrize("name", ON_LOGITS)
def test_loss_equals_the_function_on_logits(name: str) -> None:
    function = ON_LOGITS[name]
    student, teacher, _, _ = inputs(dtype=torch.float32)
    settings = {"temperature": 3.0, "beta": 0.2, "skew": 0.3}
    known = {key: value for key, value in settings.items() if key in inspect.signature(function).parameters}
    reference = function(F.linear(*student), F.linear(*teacher), **known, reduction="mean")

    loss = fused(student, teacher, None, **known, divergence=name)

    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradients(loss, student), gradients(reference, student))


def test_a_weight_that_the_graph_uses_twice_gets_the_sum_of_both_gradients() -> None:
    student, teacher, labels, settings = inputs(task_weight=0.5)
    tokens = torch.randint(0, 8, (2, 5))
    results = []
    for function in (fused, expected):
        hidden = torch.tanh(F.embedding(tokens, student[1])) * student[0]
        loss = function((hidden, student[1], None), teacher, labels, **settings)
        results.append(gradients(loss, student))

    torch.testing.assert_close(*results)


def test_gradients_scale_with_the_upstream_factor_and_add_up_in_the_parameters() -> None:
    student, teacher, labels, settings = inputs(biases=True)
    (3 * fused(student, teacher, labels, **settings)).backward()
    fused(student, teacher, labels, **settings).backward()

    exact = gradients(4 * expected(student, teacher, labels, **settings), student)
    torch.testing.assert_close([tensor.grad for tensor in student if tensor is not None], exact)


def test_the_parameters_take_over_the_gradient_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_distill.functional import fused_linear

    made = []
    original = fused_linear._no_gradients
    monkeypatch.setattr(fused_linear, "_no_gradients", lambda *a: made.append(original(*a)) or made[-1])
    student, teacher, labels, settings = inputs()
    loss = fused(student, teacher, labels, **settings)
    address = made.pop().weight.data_ptr()
    loss.backward()

    assert student[1].grad.data_ptr() == address


@pytest.mark.parametrize("normalizer", [None, 7, torch.tensor(0), torch.tensor(5.0)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_a_token_that_counts_loss_and_gradients_are_zero(name: str, normalizer: Any) -> None:
    student, teacher, _, settings = inputs(biases=True, task_weight=0.5, **DIVERGENCES[name])
    loss = fused(student, teacher, torch.full((2, 5), -100), **settings, normalizer=normalizer)

    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, student))


def test_batches_with_a_common_normalizer_add_up_to_the_mean_of_all_tokens() -> None:
    student, teacher, _, settings = inputs()
    labels = torch.tensor([[1, -100, 3, 2, -100], [-100, 4, -100, -100, -100]])
    normalizer = torch.tensor(4)
    parts = [
        fused((student[0][i], student[1], None), (teacher[0][i], teacher[1], None), labels[i], normalizer=normalizer)
        for i in range(2)
    ]

    torch.testing.assert_close(sum(parts), fused(student, teacher, labels, **settings))


def test_masked_positions_may_hold_anything_and_get_a_gradient_of_zero() -> None:
    student, teacher, _, settings = inputs()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    hidden = torch.where(mask.unsqueeze(-1), student[0], torch.nan).detach().requires_grad_()
    loss = fused((hidden, student[1], None), teacher, None, **settings, mask=mask)
    loss.backward()

    torch.testing.assert_close(loss, expected(student, teacher, None, **settings, mask=mask))
    assert (hidden.grad[1] == 0).all()
    assert torch.isfinite(student[1].grad).all()


def test_a_mask_of_the_first_dimensions_counts_for_the_positions_within() -> None:
    student, teacher, _, settings = inputs()
    loss = fused(student, teacher, None, **settings, mask=torch.tensor([True, False]))

    torch.testing.assert_close(
        loss, fused((student[0][:1], student[1], None), (teacher[0][:1], teacher[1], None), None, **settings)
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_gradients_the_value_is_the_same_and_has_no_graph(name: str) -> None:
    student, teacher, labels, settings = inputs(**DIVERGENCES[name], task_weight=0.5)
    with torch.no_grad():
        value = fused(student, teacher, labels, **settings)
    with torch.inference_mode():
        other = fused(student, teacher, labels, **settings)

    assert not value.requires_grad
    assert value == other == fused(student, teacher, labels, **settings)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, _, settings = inputs()
    teacher[0].requires_grad_()
    teacher[1].requires_grad_()
    fused(student, teacher, None, **settings).backward()

    assert teacher[0].grad is None
    assert teacher[1].grad is None


def test_inputs_are_not_changed() -> None:
    student, teacher, labels, settings = inputs(biases=True, labels=True, task_weight=0.5, soft_cap=2.0)
    before = [tensor.detach().clone() for tensor in (*student, *teacher, labels)]
    fused(student, teacher, labels, **settings).backward()

    assert all(torch.equal(old, new) for old, new in zip(before, (*student, *teacher, labels), strict=True))


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_a_student_equal_to_the_teacher_gives_exactly_zero(name: str) -> None:
    student, _, _, settings = inputs(dtype=torch.float32, biases=True, vocabularies=(300, 300), **DIVERGENCES[name])
    loss = fused(student, student, None, **settings)

    assert loss.abs() <= (0 if DEVICE == "cpu" else 1e-7)  # a kernel's sums of the lanes differ in their last digit
    assert max(gradient.abs().max() for gradient in gradients(loss, student)) < 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_step_gives_the_same_numbers() -> None:
    student, teacher, labels, settings = inputs(task_weight=0.5, labels=True)

    @torch.compile(backend="eager")
    def step() -> Tensor:
        return 2 * fused((student[0].tanh(), student[1], None), teacher, labels, **settings)

    loss = step()
    reference = 2 * expected((student[0].tanh(), student[1], None), teacher, labels, **settings)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradients(loss, student), gradients(reference, student))
