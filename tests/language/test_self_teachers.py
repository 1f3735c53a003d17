"""The student as its own teacher: its base without adapters, with a richer prompt, and its moving average."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import on_cpu
from language_models import VOCABULARY, language_model, logits_of
from lightning.pytorch import Callback, Trainer
from on_policy_by_hand import RATE, Module, answers, cross_entropy, reverse_kl, sequences_in, token_losses, trained
from token_nets import QUIET, close
from torch import Tensor, nn

from lightning_distill import (
    DistillCallback,
    Distiller,
    FeatureDistillation,
    FusedLinearDistillation,
    OnPolicyDistillation,
    ReverseKLLoss,
    SelfTeacher,
    SequenceDistillation,
)

HALF = {"fraction": 0.5, "max_new_tokens": 5, "seed": 1}


def adapted() -> nn.Module:
    """A model with adapters that change its output, and dropout in them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", lora_dropout=0.0)
    model: Any = peft.get_peft_model(language_model("llama"), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # used by peft
@pytest.mark.parametrize("on_policy", [None, OnPolicyDistillation(**HALF)])
def test_the_base_without_adapters_teaches_as_a_copy_of_it_does(on_policy: Any) -> None:
    states = []
    for kind in ("itself", "copy"):
        model: Any = adapted()
        network = SelfTeacher(model, adapters=False) if kind == "itself" else language_model("llama")
        module = trained(Module(model), on_policy, None, SequenceDistillation(ReverseKLLoss()), network)
        states.append(module.model.state_dict())
        assert all(part.training for part in module.model.modules())
        assert float(module.trainer.callback_metrics["distill/tokens_loss"]) > 1e-3
    assert any(not torch.equal(states[0][name], value) for name, value in adapted().state_dict().items())
    close(states[0], states[1], atol=1e-9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # used by peft
def test_adapters_that_the_user_has_frozen_stay_frozen() -> None:
    model: Any = adapted()
    frozen = {name for name, parameter in model.named_parameters() if "lora_A" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    SelfTeacher(model, adapters=False)(input_ids=torch.tensor([[3, 4]]))

    assert frozen
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_copied_module_is_not_taught_by_the_one_that_it_was_copied_from() -> None:
    module = Module(language_model("llama"))
    callback = DistillCallback(SelfTeacher(module.model), SequenceDistillation(), teacher_inputs=richer)
    trainer = Trainer(callbacks=[copy.deepcopy(callback)], max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match="SelfTeacher to hold the student that is trained, but got another network"):
        trainer.fit(copy.deepcopy(module), answers())


def test_a_student_that_would_teach_itself_its_own_output_is_refused() -> None:
    model = language_model("llama")
    trainer = Trainer(callbacks=[DistillCallback(SelfTeacher(model), SequenceDistillation())], max_epochs=1, **QUIET)
    with pytest.raises(
        ValueError, match=r"answer otherwise than the student, but got the same output.* teacher_inputs="
    ):
        trainer.fit(Module(model), answers())


SECRET = torch.tensor([11, 12, 13])


def richer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt before the student's, with labels that ignore it."""
    first = SECRET.to(inputs["input_ids"].device).expand(len(inputs["input_ids"]), -1)
    return {
        "input_ids": torch.cat([first, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(first), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(first, -100), inputs["labels"]], 1),
    }


class Labelled(Module):
    """Passes the labels on, as models of Hugging Face take them."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((on_cpu(batch), self.trainer.callbacks[0].own_text))  # type: ignore[attr-defined, arg-type]
        return cross_entropy(logits_of(self.model(**batch)), batch)


def test_the_student_with_a_richer_prompt_teaches_its_answers() -> None:
    student = language_model("llama")
    module = Labelled(copy.deepcopy(student))
    callback = DistillCallback(
        SelfTeacher(module.model),
        SequenceDistillation(ReverseKLLoss()),
        teacher_inputs=richer,
        on_policy=OnPolicyDistillation(**HALF),
    )
    Trainer(callbacks=callback, max_epochs=1, **QUIET).fit(module, answers())
    assert 0 < sum(own for _, own in module.seen) < 4
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for batch, own in module.seen:
        values = []
        for prompt, answer in sequences_in(batch):
            tokens, longer = torch.tensor([[*prompt, *answer]]), torch.tensor([[*SECRET, *prompt, *answer]])
            with torch.no_grad():
                target = logits_of(student(input_ids=longer))[0, len(SECRET) :]
            every = reverse_kl(logits_of(student(input_ids=tokens))[0], target)
            values.append(every[len(prompt) - 1 : -1])
        loss = torch.cat(values).mean()
        if not own:
            logits = logits_of(student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
            loss = loss + cross_entropy(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(module.model.state_dict(), student.state_dict(), atol=1e-7)


def test_a_moving_average_of_the_student_teaches_it() -> None:
    class Average(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            with torch.no_grad():
                for mean, value in zip(average.parameters(), pl_module.model.parameters(), strict=True):
                    mean.lerp_(value, 0.25)

    student = language_model("llama")
    average, mean = copy.deepcopy(student), copy.deepcopy(student)
    module = Module(copy.deepcopy(student))
    callback = DistillCallback(average, task_weight=0.0, on_policy=OnPolicyDistillation(**HALF))
    Trainer(callbacks=[callback, Average()], max_epochs=1, **QUIET).fit(module, answers())
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for batch in module.seen:
        optimizer.zero_grad()
        token_losses(student, mean, batch, reverse_kl).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(mean.parameters(), student.parameters(), strict=True):
                old.copy_(0.75 * old + 0.25 * new)
    close(average.state_dict(), mean.state_dict(), atol=1e-9)
    close(module.model.state_dict(), student.state_dict(), atol=1e-9)
    assert average.training
    assert all(parameter.requires_grad for parameter in average.parameters())


def test_the_student_that_teaches_has_no_dropout_and_the_one_that_learns_does() -> None:
    student = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Dropout(0.5), nn.Linear(8, VOCABULARY))
    student[1].register_forward_hook(lambda module, args, output: modes.append((module.training, output.requires_grad)))
    modes: list[tuple[bool, bool]] = []
    tokens = torch.randint(VOCABULARY, (2, 5))
    with Distiller(student, SelfTeacher(student), SequenceDistillation(mask=torch.ones_like)) as distiller:
        with distiller.record():
            loss = student(tokens).square().mean()
        distiller.total(loss, tokens).backward()
    assert modes == [(True, True), (False, False)]
    assert student.training
    assert distiller.parts["tokens_loss"] > 0


def test_students_that_cannot_teach_themselves_are_refused_in_words() -> None:
    student = language_model("llama")
    with pytest.raises(TypeError, match="`student` to be a module"):
        SelfTeacher("base")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`student` to have adapters of PEFT, but got a LlamaForCausalLM"):
        SelfTeacher(student, adapters=False)
    for term, words in (
        (FeatureDistillation("model.norm", "model.norm"), "terms on outputs with a SelfTeacher.*teacher_layer"),
        (FusedLinearDistillation(), "`teacher` to be a network for term 'tokens'"),
    ):
        with pytest.raises(ValueError, match=words):
            Distiller(student, SelfTeacher(student), term)
    with pytest.raises(ValueError, match="`teacher_dtype` to be None with a SelfTeacher"):
        Distiller(student, SelfTeacher(student), SequenceDistillation(), teacher_dtype="bfloat16")
