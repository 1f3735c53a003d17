"""Distillation without logits on unmodified models: equal to whole logits, or refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import DEVICE
from fused_steps import distiller_of, fused_term, step
from language_models import (
    CAPPED,
    VOCABULARY,
    dense_loss,
    language_batch,
    language_model,
    logits_of,
    worst_gradient,
)
from torch import Tensor, nn

from lightning_distill import (
    AlphaBetaLoss,
    Distiller,
    FusedLinearDistillation,
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftTargetLoss,
    TotalVariationLoss,
)
from lightning_distill.heads.placeholder import Placeholder

pytestmark = [
    pytest.mark.tensors,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]
MODELS = ["gpt2", "llama", "gemma2", "cohere", "granite", "t5", "bert", "capped", "litgpt"]


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
    AlphaBetaLoss(temperature=2.0),
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
        with torch.autocast(DEVICE, torch.bfloat16):
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
