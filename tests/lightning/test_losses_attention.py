"""Losses on transformers' attention: their own rules, and their published numbers over several layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_arrays, golden_index

from lightning_distill import losses

pytestmark = pytest.mark.tensors

CASES = ("s1", "s2")


def golden(key: str, case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    (entry,) = [entry for entry in golden_index(key) if entry["case"] == case]
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    for name in entry["student_inputs"]:
        tensors[name].requires_grad_()
    return entry, tensors


def check(value: torch.Tensor, entry: dict, tensors: dict[str, torch.Tensor]) -> None:
    value.backward()
    torch.testing.assert_close(value.detach(), tensors["loss"], rtol=1e-9, atol=1e-12)
    for name in entry["student_inputs"]:
        torch.testing.assert_close(tensors[name].grad, tensors[f"grad_{name}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_attention_of_tinybert_is_the_sum_over_its_layers(case: str) -> None:
    entry, tensors = golden("tinybert_attention", case)
    layers = entry["hyperparameters"]["student_layers"]
    every = entry["hyperparameters"]["teacher_layers"] // layers
    loss = losses.AttentionMapLoss("mse")

    value = sum(
        loss(tensors[f"student_att_{i}"], tensors[f"teacher_att_{i * every + every - 1}"]) for i in range(layers)
    )

    check(value, entry, tensors)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_of_tinybert_are_a_mse_behind_one_linear_adapter(case: str) -> None:
    entry, tensors = golden("tinybert_hidden", case)
    layers = entry["hyperparameters"]["student_layers"]
    every = entry["hyperparameters"]["teacher_layers"] // layers
    adapter = (tensors["param_fit_dense.weight"], tensors["param_fit_dense.bias"])
    loss = losses.FeatureDistance("mse")

    value = sum(
        loss(F.linear(tensors[f"student_hidden_{i}"], *adapter), tensors[f"teacher_hidden_{i * every}"])
        for i in range(layers + 1)
    )

    check(value, entry, tensors)


@pytest.mark.parametrize("case", CASES)
def test_relations_of_minilm_are_the_sum_over_queries_keys_and_values(case: str) -> None:
    entry, tensors = golden("minilm_v2_relation", case)
    loss = losses.AttentionRelationLoss(relation_heads=entry["hyperparameters"]["relation_heads"])

    check(sum(loss(tensors[f"student_{x}"], tensors[f"teacher_{x}"]) for x in "qkv"), entry, tensors)


def test_divergence_of_probabilities_equals_that_of_their_scores() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    value = losses.AttentionMapLoss(from_scores=False)(student.softmax(-1), teacher.softmax(-1))

    torch.testing.assert_close(value, losses.AttentionMapLoss()(student, teacher))


def test_probability_of_zero_has_a_finite_value_and_a_gradient() -> None:
    student = torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)

    value = losses.AttentionMapLoss(from_scores=False)(student, torch.tensor([[[[1.0, 0.0]]]]))
    value.backward()

    assert value.item() == pytest.approx(1 - math.log(1e-6))
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(-1e6)


def test_scores_of_minus_one_hundred_and_less_count_as_zero() -> None:
    scores = torch.tensor([[[[-99.0, -100.0, -101.0, 2.0]]]])

    assert losses.AttentionMapLoss("mse")(scores, torch.zeros(1, 1, 1, 4)).item() == (99**2 + 2**2) / 4


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_keys_masked_by_minus_infinity_have_no_gradient(kind: str, compiled: bool) -> None:
    student = torch.tensor([[[[1.0, 2.0, -torch.inf]]]], requires_grad=True)
    torch.compiler.reset()
    loss = losses.AttentionMapLoss(kind)

    called = torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss
    value = called(student, torch.tensor([[[[3.0, 2.0, -torch.inf]]]]))
    value.backward()

    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    assert student.grad[..., 2].item() == 0


def test_relation_heads_that_do_not_divide_a_width_raise() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `relation_heads` to divide the width 6, but got relation_heads=4\."
    ):
        losses.AttentionRelationLoss(relation_heads=4)(torch.ones(1, 2, 8), torch.ones(1, 2, 6))
    with pytest.raises(TypeError, match=r"Expected `relation_heads` to be an int, but got relation_heads=2\.0\."):
        losses.AttentionRelationLoss(relation_heads=2.0)
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of 'kl', 'mse', but got kind='l1'"):
        losses.AttentionMapLoss("l1")
