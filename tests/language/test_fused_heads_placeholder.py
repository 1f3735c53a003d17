"""The placeholder of logits that are not made, steps that end early, and heads and losses that are refused."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_steps import distiller_of, fused_term, step
from language_models import (
    VOCABULARY,
    dense_loss,
    language_batch,
    language_model,
    logits_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_distill import (
    Distiller,
    DISTLoss,
    FusedLinearDistillation,
    LogitsDistillation,
    SoftTargetLoss,
    TeacherCache,
)
from lightning_distill.heads import NoLogitsError
from lightning_distill.heads.placeholder import Placeholder

pytestmark = pytest.mark.tensors

# The placeholder of the logits ------------------------------------------------------------------------------------

PASSES = {
    "float": lambda logits: logits.float(),
    "to": lambda logits: logits.to("cpu"),
    "bfloat16": lambda logits: logits.to(torch.bfloat16),
    "contiguous": lambda logits: logits.contiguous(),
    "detach": lambda logits: logits.detach(),
    "clone": lambda logits: logits.clone(),
    "last positions": lambda logits: logits[:, -3:],
    "all but the last": lambda logits: logits[..., :-1, :],
}
USES = {
    "argmax": lambda logits: logits.argmax(-1),
    "view": lambda logits: logits.view(-1, VOCABULARY),
    "cross entropy": lambda logits: F.cross_entropy(logits, logits),
    "softmax": lambda logits: logits.softmax(-1),
    "plus": lambda logits: logits + 1,
    "columns": lambda logits: logits[..., 0],
    "over": lambda logits: logits / 2,
    "list": lambda logits: logits.tolist(),
    "numpy": lambda logits: logits.numpy(),
    "bool": bool,
    "number": float,
    "sum": lambda logits: logits.sum().item(),
    "cat": lambda logits: torch.cat([logits, logits]),
    "equal": lambda logits: logits == logits,
    "iterate": list,
    "copy": lambda logits: copy.deepcopy(logits) + 0,
    "save": lambda logits: torch.save(logits, os.devnull),
    "data": lambda logits: logits.data.exp(),
    "top k": lambda logits: torch.topk(logits, 2),
    "stack": lambda logits: torch.stack([logits]),
    "product": lambda logits: logits @ logits,
    "strides": lambda logits: logits.as_strided((1,), (1,)),
    "from the right": lambda logits: torch.ones(3) * logits,
    "storage": lambda logits: logits.untyped_storage(),
    "operator": lambda logits: torch.ops.aten.sum.default(logits),
    "pointer": lambda logits: logits.data_ptr(),
    "gradient": lambda logits: logits.backward(),
    "list of tensors": lambda logits: torch._foreach_mul([logits], 2),
}


@pytest.fixture(scope="module")
def placeholder_of_a_step() -> Tensor:
    distiller = distiller_of(language_model("llama"), language_model("llama", 24, 1))
    return logits_of(step(distiller, *language_batch())[1])


@pytest.mark.parametrize("name", PASSES)
def test_conversions_by_wrappers_pass(placeholder_of_a_step: Tensor, name: str) -> None:
    passed = PASSES[name](placeholder_of_a_step)
    assert type(passed) is Placeholder
    assert passed.shape[0] == 2
    assert "not made" in repr(passed)


@pytest.mark.parametrize("name", USES)
def test_a_use_of_the_logits_raises_with_the_remedy(placeholder_of_a_step: Tensor, name: str) -> None:
    with pytest.raises(NoLogitsError, match="Call the model without labels"):
        USES[name](placeholder_of_a_step)


def test_labels_in_the_call_raise_with_the_remedy() -> None:
    distiller = distiller_of(language_model("llama"), language_model("llama", 24, 1))
    inputs, labels = language_batch()
    with pytest.raises(NoLogitsError, match="without labels"):
        step(distiller, {**inputs, "labels": labels}, labels)
    assert "forward" not in distiller.student.lm_head.__dict__


def test_calls_without_gradients_see_real_logits() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    inputs, labels = language_batch()
    distiller = distiller_of(student, teacher)
    with distiller.record(batch={"labels": labels}):
        with torch.no_grad():
            assert student.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False).shape[1] == 11
            assert type(teacher(**inputs).logits) is Tensor
        student(**inputs)
    assert distiller.loss({"labels": labels}) > 0


def test_hooks_on_the_head_count_and_copies_are_clean() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    for model in (student, reference):
        model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)  # a factor of the user's own
    distiller = distiller_of(student, teacher)
    with distiller.record(batch={"labels": labels}):
        student(**inputs)
        copied = copy.deepcopy(student)
    value = distiller.loss({"labels": labels})
    assert type(copied(**inputs).logits) is Tensor
    assert abs(value - dense_loss(reference, teacher, inputs, labels)) < 1e-9
    copied.lm_head.forward = lambda hidden: hidden
    with pytest.raises(TypeError, match="another library has replaced"):
        step(distiller_of(copied, teacher), inputs, labels)
    assert "forward" not in teacher.lm_head.__dict__


def test_an_exception_in_the_step_leaves_nothing() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    distiller = distiller_of(student, teacher)
    inputs, labels = language_batch()

    def failing_step() -> None:
        with distiller.record(batch={"labels": labels}):
            student(**inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_step()
    assert "forward" not in student.lm_head.__dict__
    assert "forward" not in teacher.lm_head.__dict__
    assert type(student(**inputs).logits) is Tensor


def test_a_term_on_logits_beside_it_is_refused_in_words() -> None:
    terms = [fused_term(), LogitsDistillation()]
    distiller = Distiller(language_model("llama"), language_model("llama", 24, 1), terms, task_weight=0)
    with pytest.raises(NoLogitsError):
        step(distiller, *language_batch())


def test_no_tensor_of_the_vocabulary_is_made() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    tokens = torch.randint(3, VOCABULARY, (8, 16))
    distiller = distiller_of(student, teacher, fused_term(chunk_size=8))
    step(distiller, {"input_ids": tokens}, tokens)
    with Largest() as largest:
        step(distiller, {"input_ids": tokens}, tokens)[0].backward()
    assert largest.numbers <= max(24 * VOCABULARY, 8 * 16 * 32)  # the teacher's matrix, or a feature of 32 columns
    assert largest.numbers < 8 * 16 * VOCABULARY / 4


# Refusals --------------------------------------------------------------------------------------------------------


def test_losses_that_are_not_divergences_of_logits_are_refused() -> None:
    for loss in (DISTLoss(), SoftTargetLoss(standardize=True)):
        with pytest.raises(TypeError, match="`loss` to be a SoftTargetLoss without standardize"):
            FusedLinearDistillation(loss=loss)
    with pytest.raises(ValueError, match="`mask` to be one place, but got a pair"):
        FusedLinearDistillation(mask=("a", "b"))
    with pytest.raises(ValueError, match="`task_weight` to be"):
        FusedLinearDistillation(task_weight=-1.0)
    with pytest.raises(ValueError, match="`chunk_size` to be"):
        FusedLinearDistillation(chunk_size=0)


def test_heads_that_are_not_there_or_not_called_are_refused() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    with pytest.raises(ValueError, match=r"terms\[0\].student_layer.*'lm_heat'.*Closest: 'lm_head'"):
        distiller_of(student, teacher, FusedLinearDistillation("lm_heat"))
    with pytest.raises(ValueError, match=r"terms\[0\].teacher_layer.*'head'"):
        distiller_of(student, teacher, FusedLinearDistillation(teacher_head="head"))
    for model in (student, teacher):
        model.spare = nn.Linear(3, 3).double()
    with pytest.raises(ValueError, match="student to call its head 'spare' with gradients, but it did not"):
        step(distiller_of(student, teacher, FusedLinearDistillation("spare")), *language_batch())
    with pytest.raises(ValueError, match="teacher to call its head 'spare', but it did not"):
        step(distiller_of(student, teacher, FusedLinearDistillation(teacher_head="spare")), *language_batch())


def test_a_head_that_is_called_twice_is_refused() -> None:
    student, teacher = language_model("capped"), language_model("capped", 24, 1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = student
            self.lm_head = student.lm_head

        def forward(self, idx: Tensor) -> Tensor:
            self.inner(idx)
            return self.inner(idx)

    with pytest.raises(ValueError, match="call its head 'lm_head' once, but it was called twice"):
        step(distiller_of(Twice(), teacher), *language_batch("capped"))


def test_other_operations_after_the_head_are_refused() -> None:
    class Shifted(nn.Module):
        def __init__(self, change: Any) -> None:
            super().__init__()
            self.inner, self.change = language_model("llama"), change
            self.lm_head = self.inner.lm_head

        def forward(self, **inputs: Any) -> Any:
            return {"logits": self.change(self.inner(**inputs).logits)}

    trained = nn.Parameter(torch.ones(()))
    for change in (lambda logits: logits - 1, lambda logits: logits[..., :100], lambda logits: logits * trained):
        with pytest.raises(NoLogitsError):
            step(distiller_of(Shifted(change), language_model("llama", 24, 1)), *language_batch())
    with pytest.raises(ValueError, match="scale its logits by a positive number or to cap them"):
        step(distiller_of(Shifted(lambda logits: -1 * logits), language_model("llama", 24, 1)), *language_batch())


def test_caches_several_teachers_and_two_such_terms_are_refused(tmp_path: Any) -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    rows = [{"input_ids": torch.tensor([3, 4, 5])} for _ in range(4)]
    cache = TeacherCache.build(teacher, rows, tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="`teacher` to be a network for term 'tokens'"):
        Distiller(student, cache, fused_term())
    with pytest.raises(ValueError, match="one term to skip the heads"):
        Distiller(student, teacher, [FusedLinearDistillation(), FusedLinearDistillation(name="second")])
    distiller = Distiller(student, [teacher, language_model("llama", 24, 2)], fused_term(), task_weight=0)
    with pytest.raises(ValueError, match="Expected one teacher with a layer 'lm_head'"):
        step(distiller, *language_batch())


def test_the_cross_entropy_needs_labels() -> None:
    distiller = distiller_of(language_model("llama"), language_model("llama", 24, 1))
    inputs, _ = language_batch()
    with pytest.raises(ValueError, match="labels for the cross entropy of task_weight"), distiller.record():
        distiller.student(**inputs)


def test_second_derivatives_and_second_backward_passes_are_refused() -> None:
    distiller = distiller_of(language_model("llama"), language_model("llama", 24, 1))
    value, _ = step(distiller, *language_batch())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a single backward pass"):
        value.backward()
    value, _ = step(distiller, *language_batch())
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(value, distiller.student.lm_head.weight, create_graph=True)


def test_a_compiled_model_is_refused_with_what_to_compile() -> None:
    student = torch.compile(language_model("llama"), backend="eager")
    with (
        distiller_of(student, language_model("llama", 24, 1)) as distiller,
        pytest.raises(ValueError, match="head not to be inside a compiled module"),
    ):
        step(distiller, *language_batch())
