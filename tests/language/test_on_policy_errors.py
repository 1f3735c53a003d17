"""Settings, students, teachers, batches and functions that do not fit the student's own text, refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from language_models import language_model
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from on_policy_by_hand import (
    ALWAYS,
    NAMES,
    Answers,
    Module,
    answers,
    changed,
    teacher,
    trained,
)
from token_nets import QUIET, CausalModel
from torch import Tensor

from lightning_distill import (
    DecoupledKDLoss,
    DistillCallback,
    LogitsDistillation,
    OnPolicyDistillation,
    SequenceDistillation,
    TeacherCache,
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "`max_new_tokens` to be given.*Pass the number of tokens"),
        ({"max_new_tokens": 0}, "`max_new_tokens` to be greater than 0"),
        ({"max_new_tokens": 2.0}, "`max_new_tokens` to be an int"),
        ({"max_new_tokens": 2, "fraction": 1.5}, "`fraction` to be from 0 to 1"),
        ({"max_new_tokens": 2, "temperature": -1}, "`temperature` to be at least 0"),
        ({"max_new_tokens": 2, "seed": "a"}, "`seed` to be an int"),
        ({"max_new_tokens": 2, "generate": 3}, "`generate` to be a function"),
        ({"max_new_tokens": 2, "generation": 3}, "`generation` to be a dict of arguments"),
        ({"max_new_tokens": 2, "build": 3}, "`build` to be a function"),
        ({"max_new_tokens": 2, "eos_token_id": [1.0]}, "`eos_token_id` to be an int"),
        ({"max_new_tokens": 2, "pad_token_id": -1}, "`pad_token_id` to be at least 0"),
        ({"max_new_tokens": 2, "generation": {"do_sample": True}}, "`generation` to leave out 'do_sample'"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        OnPolicyDistillation(**settings)


def refused(words: str, *args: Any, error: Any = ValueError, **settings: Any) -> None:
    """A training that must end with an error before the first step is made."""
    module = settings.pop("module", None) or Module(language_model("llama"))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        trained(module, *args, **settings)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_students_that_cannot_write_are_refused_in_words() -> None:
    on_policy = OnPolicyDistillation(**ALWAYS)
    refused("method `generate`, but CausalModel has none.*generate=<function>", on_policy, module=Module(CausalModel()))
    refused("method `generate`, but BertForMaskedLM has none", on_policy, module=Module(language_model("bert")))


def test_several_students_that_can_write_are_refused_in_words() -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__(language_model("llama"))
            self.other = language_model("gpt2")

    refused("which network continues the prompts.*LlamaForCausalLM, GPT2", OnPolicyDistillation(**ALWAYS), module=Two())
    module = trained(Two(), OnPolicyDistillation(**ALWAYS), student="model")
    assert len(module.seen) == 4


def test_teachers_and_losses_that_cannot_score_new_text_are_refused_in_words(tmp_path: Any) -> None:
    on_policy = OnPolicyDistillation(**ALWAYS)
    cache = TeacherCache.build(teacher(), Answers(), tmp_path, dtype="float32", progress=False)
    refused(
        "`teacher` to be a network with on_policy.*got a cache", on_policy, terms=SequenceDistillation(), network=cache
    )
    refused("losses without labels with on_policy", on_policy, terms=LogitsDistillation(DecoupledKDLoss()))
    refused("`shift` to be True for a causal student", on_policy, terms=SequenceDistillation(shift=False))
    refused("`teacher_inputs` to be a function with on_policy", on_policy, teacher_inputs="teacher")
    refused("`on_policy` to be an OnPolicyDistillation", 0.5, error=TypeError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda row: {key: row[key] for key in NAMES[:2]},
            "which tokens of a batch are the prompt, but it has no labels",
        ),
        (lambda row: {**row, "labels": row["input_ids"]}, "each sequence to begin with a prompt.*sequence 0"),
        (lambda row: {**row, "labels": row["labels"].roll(-1)}, "labels that are the batch's tokens or -100"),
        (lambda row: {**row, "labels": row["labels"][1:]}, "labels that are the batch's tokens or -100"),
        (lambda row: {**row, "token_type_ids": row["labels"]}, "how to change the entry 'token_type_ids'"),
        (
            lambda row: {**row, "inputs_embeds": torch.ones(3)},
            "batches of text alone.*'inputs_embeds'",
        ),
        (lambda row: {**row, "seq_idx": row["labels"]}, "one sequence in each row.*packed documents"),
        (lambda row: {**row, "attention_mask": row["attention_mask"] * 2}, "one sequence in each row"),
        (lambda row: {**row, "position_ids": torch.arange(9) % 4}, "one sequence in each row"),
        (lambda row: {"tokens": row["input_ids"]}, r"batch with the tokens in `input_ids`.*\['tokens'\]"),
        (lambda row: [row["input_ids"], row["labels"]], "a batch to be a dict with `input_ids`, but got a list"),
    ],
)
def test_batches_that_cannot_be_continued_are_refused_in_words(change: Any, words: str) -> None:
    refused(words, OnPolicyDistillation(**ALWAYS), changed(change))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (lambda batch: torch.ones(3, 2), "`prompt` to mark the tokens of the prompts.*got shape \\(3, 2\\)"),
        (lambda batch: torch.arange(9) > 2, "`prompt` to mark the first tokens of each sequence"),
        ("nothing", "`prompt` to say where a batch keeps its mask"),
    ],
)
def test_masks_that_mark_no_prompt_are_refused_in_words(prompt: Any, words: str) -> None:
    refused(words, OnPolicyDistillation(**ALWAYS, prompt=prompt))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (lambda tokens: tokens, r"the prompts followed by 1 to 4 new tokens.*\(3, 5 to 8\), but got \(3, 4\)"),
        (lambda tokens: torch.cat([tokens] * 3, 1), "1 to 4 new tokens"),
        (lambda tokens: tokens[:2], "1 to 4 new tokens"),
        (lambda tokens: tokens.float(), "1 to 4 new tokens"),
        (lambda tokens: [tokens], "1 to 4 new tokens.*but got list"),
        (lambda tokens: torch.cat([tokens[:, :2], tokens], 1), "the first tokens that it returned are others"),
    ],
)
def test_functions_that_return_something_else_are_refused_in_words(written: Any, words: str) -> None:
    def generate(student: Any, *, input_ids: Tensor, **settings: Any) -> Any:
        return written(input_ids)

    refused(words, OnPolicyDistillation(**ALWAYS, generate=generate))


def test_texts_longer_than_the_student_has_positions_are_refused_in_words() -> None:
    on_policy = OnPolicyDistillation(1.0, max_new_tokens=32)
    words = "at most 32 tokens, as many as the student has positions, but got 4 and max_new_tokens=32"
    refused(words, on_policy, module=Module(language_model("gpt2")))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_gets_an_iterator_is_refused_in_words() -> None:
    class Takes(Module):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise AssertionError

    words, module = "`training_step` that gets a batch", Takes(language_model("llama"))
    refused(words, OnPolicyDistillation(**ALWAYS), module=module, error=MisconfigurationException)


def test_a_second_callback_is_refused_in_words() -> None:
    callbacks = [
        DistillCallback(teacher(), on_policy=OnPolicyDistillation(**ALWAYS)),
        DistillCallback(teacher(), SequenceDistillation(), name="second"),
    ]
    with pytest.raises(MisconfigurationException, match=r"one DistillCallback where on_policy is given.*but got 2"):
        Trainer(callbacks=callbacks, max_epochs=1, **QUIET).fit(Module(language_model("llama")), answers())
