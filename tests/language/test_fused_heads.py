"""Distillation without logits on unmodified models: equal to whole logits, or refused in words."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_models import (
    CAPPED,
    HEADS,
    VOCABULARY,
    dense_loss,
    language_batch,
    language_model,
    logits_of,
    worst_gradient,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_distill import (
    Distiller,
    DISTLoss,
    FusedLinearDistillation,
    GeneralizedJSDLoss,
    LogitsDistillation,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftTargetLoss,
    TeacherCache,
    TotalVariationLoss,
)
from lightning_distill.heads import NoLogitsError
from lightning_distill.heads.placeholder import Placeholder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]
MODELS = ["gpt2", "llama", "gemma2", "cohere", "granite", "t5", "bert", "capped", "litgpt"]


def fused_term(name: str = "llama", **settings: Any) -> FusedLinearDistillation:
    head = HEADS.get(name, "lm_head")
    defaults = {"loss": SoftTargetLoss(temperature=2.0), "weight": 0.7, "task_weight": 0.3}
    return FusedLinearDistillation(head, head, **{**defaults, **settings})


def distiller_of(student: nn.Module, teacher: nn.Module, term: Any = None) -> Distiller:
    return Distiller(student, teacher, fused_term() if term is None else term, task_weight=0)


def step(distiller: Distiller, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Any]:
    """The loss of one step, and the student's output."""
    with distiller.record(batch={"labels": labels}):
        output = distiller.student(**inputs)
    return distiller.loss({"labels": labels}), output


# Equal to whole logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_unmodified_models_give_the_loss_and_the_gradients_of_whole_logits(name: str, reverse: bool) -> None:
    student, teacher = language_model(name), language_model(name, 24, 1, cap=0.9).eval()
    reference, (inputs, labels) = copy.deepcopy(student), language_batch(name)
    loss = ReverseKLLoss(temperature=2.0) if reverse else SoftTargetLoss(temperature=2.0)
    shift = name not in ("t5", "bert")
    distiller = distiller_of(student, teacher, fused_term(name, loss=loss, shift=shift))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    student.register_forward_pre_hook(count)
    for _ in range(2):
        student.zero_grad()
        value, output = step(distiller, inputs, labels)
        value.backward()
    assert type(logits_of(output)) is Placeholder
    assert logits_of(output).shape == (2, 9, VOCABULARY)
    assert calls == 2 + (name in CAPPED)  # the first is made once more where something follows the head
    expected = dense_loss(reference, teacher, inputs, labels, shift=shift, reverse=reverse)
    expected.backward()
    assert abs(value - expected) < 1e-9
    assert worst_gradient(student, reference) < 1e-9
    assert type(logits_of(student.eval()(**inputs))) is Tensor  # nothing is left


LOSSES = [
    SoftTargetLoss(temperature=2.0),
    ReverseKLLoss(),
    GeneralizedJSDLoss(beta=0.3),
    SkewKLLoss(skew=0.2),
    SkewKLLoss(skew=0.2, reverse=True),
    TotalVariationLoss(temperature=3.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_divergence_equals_that_of_sequence_distillation(loss: Any) -> None:
    inputs, labels = language_batch()
    values, students = [], []
    for term in (FusedLinearDistillation(loss=loss, weight=0.6), SequenceDistillation(loss, weight=0.6)):
        student, teacher = language_model("llama"), language_model("llama", 24, 1)
        value, _ = step(distiller_of(student, teacher, term), inputs, labels)
        value.backward()
        values.append(float(value.detach()))
        students.append(student)
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    assert worst_gradient(*students) < 1e-12


def test_the_parts_are_logged_without_their_weights() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    inputs, labels = language_batch()
    distiller = distiller_of(student, teacher)
    value, _ = step(distiller, inputs, labels)
    parts = {name: float(part) for name, part in distiller.parts.items()}
    assert set(parts) == {"tokens_loss", "tokens_task_loss", "distillation_loss"}
    alone = dense_loss(student, teacher, inputs, labels, weight=1.0, task_weight=0.0)
    assert parts["tokens_loss"] == pytest.approx(float(alone.detach()), abs=1e-9)
    assert float(value.detach()) == pytest.approx(
        0.7 * parts["tokens_loss"] + 0.3 * parts["tokens_task_loss"], abs=1e-9
    )


def test_a_weight_of_0_leaves_the_cross_entropy() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    inputs, labels = language_batch()
    value, _ = step(distiller_of(student, teacher, fused_term(weight=0.0, task_weight=1.0)), inputs, labels)
    expected = dense_loss(student, teacher, inputs, labels, weight=0.0, task_weight=1.0)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-9)


def test_a_factor_after_the_loss_and_other_losses_beside_it() -> None:
    student, teacher = language_model("gpt2"), language_model("gpt2", 24, 1)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    value, _ = step(distiller_of(student, teacher), inputs, labels)
    (3 * value + student.transformer.wpe.weight.square().sum()).backward()
    expected = 3 * dense_loss(reference, teacher, inputs, labels)
    (expected + reference.transformer.wpe.weight.square().sum()).backward()
    assert worst_gradient(student, reference) < 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_accumulation(reentrant: bool) -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    reference = copy.deepcopy(student)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    distiller = distiller_of(student, teacher)
    for number in range(2):
        inputs, labels = language_batch(number=number)
        step(distiller, inputs, labels)[0].backward()
        dense_loss(reference, teacher, inputs, labels).backward()
    assert worst_gradient(student, reference) < 1e-9


def test_autocast_is_as_precise_as_with_whole_logits() -> None:
    inputs, labels = language_batch()
    errors = {"fused": 0.0, "whole": 0.0}
    for seed in range(4):  # one draw of rounding errors says little
        exact, teacher = language_model("gemma2", seed=seed).float(), language_model("gemma2", 24, 9, cap=0.9).float()
        students = {name: copy.deepcopy(exact) for name in errors}
        dense_loss(exact, teacher, inputs, labels).backward()
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = step(distiller_of(students["fused"], teacher), inputs, labels)
            expected = dense_loss(students["whole"], teacher, inputs, labels)
        value.backward()
        expected.backward()
        for name, student in students.items():
            pairs = zip(student.parameters(), exact.parameters(), strict=True)
            errors[name] += sum(float((p.grad - q.grad).square().sum()) for p, q in pairs)
        assert students["fused"].lm_head.weight.grad.dtype == torch.float32
    assert errors["fused"] < 1.3 * errors["whole"]


def test_a_teacher_in_another_precision_or_in_inference_mode() -> None:
    student, teacher = language_model("llama").float(), language_model("llama", 24, 1)
    inputs, labels = language_batch()
    expected = dense_loss(student, teacher.float(), inputs, labels)
    term = fused_term()
    distiller = Distiller(student, teacher, term, task_weight=0, teacher_dtype="bfloat16")
    value, _ = step(distiller, inputs, labels)
    distiller.close()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    teacher.forward = torch.inference_mode()(teacher.forward)
    value, _ = step(distiller_of(student, teacher), inputs, labels)
    value.backward()
    torch.optim.SGD(student.parameters(), 0.1).step()  # gradients are not inference tensors
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("situation", ["frozen head", "tied", "untied", "frozen body"])
def test_heads_that_are_frozen_or_tied(situation: str) -> None:
    student, teacher = language_model("llama", tied=situation == "tied"), language_model("llama", 24, 1)
    if situation == "frozen head":
        student.lm_head.weight.requires_grad_(False)
    if situation == "frozen body":
        student.model.requires_grad_(False)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    step(distiller_of(student, teacher), inputs, labels)[0].backward()
    dense_loss(reference, teacher, inputs, labels).backward()
    assert worst_gradient(student, reference) < 1e-9
    assert (student.lm_head.weight.grad is None) == (situation == "frozen head")


def test_weight_normalisation_of_the_head() -> None:
    student, teacher = language_model("llama", tied=False), language_model("llama", 24, 1)
    nn.utils.parametrizations.weight_norm(student.lm_head)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    step(distiller_of(student, teacher), inputs, labels)[0].backward()
    dense_loss(reference, teacher, inputs, labels).backward()
    assert worst_gradient(student, reference) < 1e-9


def test_a_compiled_backbone_keeps_one_graph() -> None:
    torch.compiler.reset()
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    student.model.forward = torch.compile(student.model.forward, backend=backend)
    distiller = distiller_of(student, teacher)
    counts = []
    for _ in range(4):
        student.zero_grad()
        value, _ = step(distiller, inputs, labels)
        value.backward()
        counts.append(len(graphs))
    dense_loss(reference, teacher, inputs, labels).backward()
    assert counts[1] == counts[3]
    assert worst_gradient(student, reference) < 1e-9


# LoRA and quantised heads ----------------------------------------------------------------------------------------


def with_lora(model: nn.Module, target_modules: Any = ("lm_head", "q_proj"), **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(target_modules), init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config).double().train()


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=["merged", "saved"]
)
def test_a_lora_on_the_head_is_honoured(settings: dict[str, Any]) -> None:
    student, teacher = with_lora(language_model("llama", tied=False), **settings), language_model("llama", 24, 1)
    reference, (inputs, labels) = copy.deepcopy(student), language_batch()
    term = fused_term()
    term = FusedLinearDistillation("base_model.model.lm_head", loss=term.loss, weight=0.7, task_weight=0.3)
    value, _ = step(distiller_of(student, teacher, term), inputs, labels)
    value.backward()
    expected = dense_loss(reference, teacher, inputs, labels)
    expected.backward()
    assert abs(value - expected) < 1e-9
    assert worst_gradient(student, reference) < 1e-9
    with torch.no_grad(), student.disable_adapter():  # the naive form, in which the adapter is skipped
        assert abs(dense_loss(student, teacher, inputs, labels) - expected) > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_dropout": 0.1}, "a LoRA without dropout on the head"),
        ({"use_dora": True}, "a plain LoRA on the head"),
        ({"lora_bias": True}, "a LoRA without a bias on the head"),
    ],
)
def test_other_adapters_of_the_head_are_refused(settings: dict[str, Any], words: str) -> None:
    student = with_lora(language_model("llama", tied=False), **settings)
    distiller = distiller_of(student, language_model("llama"), FusedLinearDistillation("base_model.model.lm_head"))
    with pytest.raises(TypeError, match=words):
        step(distiller, *language_batch())


def test_quantised_heads_are_made_whole_or_refused() -> None:
    inputs, labels = language_batch()
    student = language_model("llama", tied=False).float()
    teacher = language_model("llama", 24, 1, tied=False).float()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = copy.deepcopy(teacher)
    quantize_(quantised.lm_head, Int8WeightOnlyConfig(version=2))
    value, _ = step(distiller_of(student, quantised), inputs, labels)
    assert float(value.detach()) == pytest.approx(
        float(dense_loss(student, quantised, inputs, labels).detach()), abs=1e-4
    )

    class OwnKernel(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    teacher.lm_head = OwnKernel(24, VOCABULARY, bias=False)
    with pytest.raises(TypeError, match=r"head to be a linear layer.*OwnKernel, which has a forward of its own"):
        step(distiller_of(student, teacher), inputs, labels)
    half = language_model("llama", 24, 1, tied=False).float()
    half.lm_head.weight = nn.Parameter(half.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating point numbers.*torch.int8"):
        step(distiller_of(student, half), inputs, labels)


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
    tokens = torch.randint(3, VOCABULARY, (4, 32))
    distiller = distiller_of(student, teacher, fused_term(chunk_size=8))
    step(distiller, {"input_ids": tokens}, tokens)
    with Largest() as largest:
        step(distiller, {"input_ids": tokens}, tokens)[0].backward()
    assert largest.numbers <= max(24 * VOCABULARY, 4 * 32 * 32)  # the teacher's matrix, or a feature of 32 columns
    assert largest.numbers < 4 * 32 * VOCABULARY / 4


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
    with pytest.raises(ValueError, match="head not to be inside a compiled module"):
        step(distiller_of(student, language_model("llama", 24, 1)), *language_batch())
