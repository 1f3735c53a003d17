"""Wrong arguments of ``fused_linear_divergence`` are refused in words, before any product."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_distill.functional import fused_linear_divergence

pytestmark = pytest.mark.tensors


class NoProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "mm" not in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def arguments() -> dict[str, Any]:
    return {
        "student_hidden": torch.randn(2, 5, 3),
        "student_weight": torch.randn(8, 3),
        "teacher_hidden": torch.randn(2, 5, 4),
        "teacher_weight": torch.randn(8, 4),
    }


WRONG: list[Any] = [  # the arguments, the error, its words
    (
        {"divergence": "revers_kl"},
        ValueError,
        "Expected `divergence` to be one of 'kl', .*. Closest: 'reverse_kl'",
    ),
    ({"divergence": None}, TypeError, "Expected `divergence` to be one of"),
    ({"temperature": 0.0}, ValueError, "Expected `temperature` to be greater than 0"),
    ({"divergence": "jsd", "beta": 1.5}, ValueError, "Expected `beta` to be from 0 to 1"),
    ({"divergence": "alpha_beta", "beta": "1"}, TypeError, "Expected `beta` to be an int or a float"),
    ({"alpha": None}, TypeError, "Expected `alpha` to be an int or a float"),
    ({"skew": 1.0}, ValueError, "Expected `skew` to be at least 0 and less than 1"),
    ({"weight": -1.0}, ValueError, "Expected `weight` to be at least 0"),
    ({"task_weight": -1.0}, ValueError, "Expected `task_weight` to be at least 0"),
    ({"task_weight": 1.0}, ValueError, "Expected `labels` for the cross entropy of `task_weight`, but got labels=None"),
    ({"chunk_size": 0}, ValueError, "Expected `chunk_size` to be at least 1"),
    ({"chunk_size": 2.0}, TypeError, "Expected `chunk_size` to be an int"),
    ({"normalizer": -1}, ValueError, "Expected `normalizer` to be at least 0"),
    ({"soft_cap": 0.0}, ValueError, "Expected `soft_cap` to be greater than 0"),
    ({"soft_cap": (1.0, 2.0, 3.0)}, ValueError, r"Expected `soft_cap` to be a number or a pair \(student, teacher\)"),
    ({"scale": (1.0, -1.0)}, ValueError, "Expected `scale` to be greater than 0"),
    ({"ignore_index": 0.5}, TypeError, "Expected `ignore_index` to be an int"),
    ({"student_hidden": [1.0]}, TypeError, "Expected `student_hidden` to be a floating point tensor, but got a list"),
    ({"teacher_weight": torch.ones(8, 4).long()}, TypeError, "Expected `teacher_weight` to be a floating point tensor"),
    (
        {"student_hidden": torch.ones(3)},
        ValueError,
        "Expected `student_hidden` to have at least a dimension of positions",
    ),
    (
        {"student_weight": torch.ones(8, 4)},
        ValueError,
        r"Expected `student_weight` to have the shape \(vocabulary, 3\), .*, but got shape \(8, 4\)",
    ),
    ({"teacher_weight": torch.ones(4)}, ValueError, r"Expected `teacher_weight` to have the shape \(vocabulary, 4\)"),
    (
        {"student_bias": torch.ones(7)},
        ValueError,
        r"Expected `student_bias` to have the shape \(8,\), but got shape \(7,\)",
    ),
    (
        {"teacher_hidden": torch.ones(2, 4, 4)},
        ValueError,
        r"have the same positions, but got \(2, 5\) and \(2, 4\). Both models must have read the same tokens",
    ),
    (
        {"student_weight": torch.ones(8, 3).bfloat16()},
        TypeError,
        "and `student_bias` to have equal dtypes, but got torch.float32 and torch.bfloat16. Convert them",
    ),
    ({"teacher_bias": torch.ones(8).double()}, TypeError, "`teacher_bias` to have equal dtypes"),
    ({"teacher_weight": torch.ones(1, 4)}, ValueError, "at least 2 rows in common with the teacher's, but got 1"),
    (
        {"teacher_weight": torch.ones(8, 4, device="meta")},
        ValueError,
        "Expected `teacher_weight` to be on the device of `student_hidden`, .*, but got meta",
    ),
    (
        {"labels": torch.ones(2, 5)},
        TypeError,
        "Expected `labels` to hold token indices, but got a tensor of torch.float32",
    ),
    ({"labels": [0]}, TypeError, "Expected `labels` to be a tensor of token indices, but got a list"),
    (
        {"labels": torch.zeros(2, 4).long()},
        ValueError,
        r"Expected `labels` to have the shape \(2, 5\) of the positions",
    ),
    pytest.param(
        {"labels": torch.full((2, 5), 8)},
        ValueError,
        "`labels` to be less than the size of the vocabulary, 8, but got a label of 8. Pass ignore_index=8",
        marks=pytest.mark.exact,  # labels on a GPU are not read
    ),
    ({"mask": torch.ones(2, 5)}, TypeError, "Expected `mask` to be a tensor of bools"),
    ({"mask": torch.ones(3).bool()}, ValueError, r"Expected `mask` to have the shape \(2, 5\)"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_arguments_are_refused_before_any_product(wrong: Any, error: type[Exception], words: str) -> None:
    right = arguments()
    device = right["student_hidden"].device
    wrong = {name: value.to(device) if getattr(value, "is_cpu", False) else value for name, value in wrong.items()}
    with NoProducts(), pytest.raises(error, match=words):
        fused_linear_divergence(**{**right, **wrong})


@pytest.mark.exact  # labels on a GPU are not read
def test_labels_of_the_students_own_tokens_count_where_they_only_choose_positions() -> None:
    inputs = {**arguments(), "teacher_weight": torch.randn(6, 4), "labels": torch.full((2, 5), 7)}

    assert torch.isfinite(fused_linear_divergence(**inputs))
    with pytest.raises(ValueError, match="less than the size of the vocabulary, 6, but got a label of 7"):
        fused_linear_divergence(**inputs, task_weight=1.0)


@pytest.mark.gpu
def test_labels_out_of_the_vocabulary_are_nan_on_a_gpu() -> None:
    inputs = {name: tensor.cuda() for name, tensor in arguments().items()}
    labels = torch.full((2, 5), 8).cuda()

    assert fused_linear_divergence(**inputs, labels=labels, task_weight=1.0).isnan()


def trained() -> tuple[Tensor, Tensor]:
    inputs = arguments()
    hidden = inputs["student_hidden"].requires_grad_()
    return hidden, fused_linear_divergence(**inputs)


def test_a_second_backward_pass_is_refused() -> None:
    _, loss = trained()
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match=r"a single backward pass .* but got a second one. The gradients of"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    hidden, loss = trained()

    with pytest.raises(RuntimeError, match=r"without create_graph=True .* use the divergences of logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap, torch.func.jacfwd])
def test_transforms_are_refused(transform: Any) -> None:
    inputs = arguments()
    hidden = inputs.pop("student_hidden")

    with pytest.raises(RuntimeError, match=re.escape("outside of the transforms of torch.func, but got a call inside")):
        transform(lambda h: fused_linear_divergence(h, **inputs))(hidden)
