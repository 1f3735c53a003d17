"""The ready module for two causal language models: what it trains, measures and logs."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_models import language_model
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from token_nets import LENGTHS, QUIET, CausalModel, Sequences, by_hand, close, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import CausalLMDistillModule, DistillModule, FusedLinearDistillation, SequenceDistillation


class Characters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def module_of(terms: Any = None, **settings: Any) -> CausalLMDistillModule:
    return CausalLMDistillModule(CausalModel(), CausalModel(7, seed=1), terms, optimizer=sgd, **settings)


def fitted(module: CausalLMDistillModule, data: Any, validation: Any = None, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 1, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(module, data, validation)
    return trainer


def cross_entropy_of(student: nn.Module, rows: Any) -> Tensor:
    """The mean cross entropy over all tokens, sequence by sequence."""
    values = []
    for row in rows:
        logits = student(row["input_ids"][None], row["attention_mask"][None])["logits"][0, :-1]
        every = F.cross_entropy(logits, row["labels"][1:], reduction="none", ignore_index=-100)
        values.append(every[row["labels"][1:] != -100])
    return torch.cat(values).mean()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_divergence_is_that_of_the_loop_by_hand(accumulate: int) -> None:
    module = module_of(FusedLinearDistillation(weight=2.0))
    fitted(module, loader(8 // accumulate), accumulate_grad_batches=accumulate)
    close(module.student.state_dict(), by_hand(3, micro_batches=accumulate, task_weight=0.0))


def test_the_default_adds_the_cross_entropy_of_the_whole_step() -> None:
    rows = [Sequences()[index] for index in range(len(LENGTHS))]
    student, module = CausalModel(), module_of(task_weight=0.5)
    teacher = CausalModel(7, seed=1)
    fitted(module, loader(2), accumulate_grad_batches=12)
    optimizer = sgd(student.parameters())
    distances = []
    for row in rows:
        logits = [
            network(row["input_ids"][None], row["attention_mask"][None])["logits"] for network in (student, teacher)
        ]
        log_p, log_q = logits[1].detach().log_softmax(-1), logits[0].log_softmax(-1)
        every = (log_p.exp() * (log_p - log_q)).sum(-1)[0, :-1]
        distances.append(every[row["labels"][1:] != -100])
    (torch.cat(distances).mean() + 0.5 * cross_entropy_of(student, rows)).backward()
    optimizer.step()
    close(module.student.state_dict(), student.state_dict())


def test_terms_on_logits_get_the_same_weights_as_those_without() -> None:
    states = []
    for terms in (FusedLinearDistillation(task_weight=0.5), SequenceDistillation()):
        module = module_of(terms, task_weight=0.5)
        fitted(module, loader(24))
        states.append(module.student.state_dict())
    close(*states)


def test_perplexity_is_over_all_tokens_and_not_a_mean_of_batches() -> None:
    module = module_of()
    trainer = fitted(module, loader(8), loader(2))
    expected = cross_entropy_of(module.student, [Sequences()[index] for index in range(len(LENGTHS))])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val_loss"] == pytest.approx(float(expected.detach()), abs=1e-6)
    assert logged["val_perplexity"] == pytest.approx(math.exp(float(expected.detach())), rel=1e-6)
    assert {"distill/tokens_loss", "distill/tokens_task_loss", "distill/val_tokens_loss"} <= set(logged)
    assert {"distill/val_teacher_agreement", "distill/val_task_loss"} <= set(logged)
    tested = trainer.test(module, loader(2), verbose=False)[0]
    assert tested["test_perplexity"] == pytest.approx(logged["val_perplexity"], rel=1e-6)


def test_batches_without_labels_count_the_tokens_that_are_not_padding() -> None:
    class Unlabelled(Sequences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {name: row[name] for name in ("input_ids", "attention_mask")}

    class Labelled(Sequences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {**row, "labels": torch.where(row["attention_mask"] == 0, -100, row["input_ids"])}

    states = []
    for data in (Unlabelled(), Labelled()):
        module = module_of()
        fitted(module, DataLoader(data, batch_size=4), accumulate_grad_batches=2)
        states.append(module.student.state_dict())
    close(*states)


def test_prompts_are_continued_after_validation_and_logged(tmp_path: Any) -> None:
    module = module_of(tokenizer=Characters(), prompts=["ab", "c"], max_new_tokens=3)
    logger = TensorBoardLogger(tmp_path)
    fitted(module, loader(8), loader(8), logger=logger)
    assert list(module.samples) == ["ab", "c"]
    for prompt, text in module.samples.items():
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + 3
        tokens = torch.tensor([Characters().encode(text)])
        likeliest = module.student(tokens)["logits"].argmax(-1)[0]
        assert tokens[0, len(prompt) :].tolist() == likeliest[len(prompt) - 1 : -1].tolist()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert module.samples["ab"].encode() in files


def test_models_of_hugging_face_train_without_logits() -> None:
    student, teacher = language_model("llama").float(), language_model("llama", 24, 1).float()
    rows = [
        {"input_ids": torch.randint(3, 200, (7,)), "attention_mask": torch.ones(7, dtype=torch.int64)} for _ in range(8)
    ]
    module = CausalLMDistillModule(student, teacher, optimizer=lambda p: torch.optim.SGD(p, 0.01))
    before = copy.deepcopy(student.state_dict())
    data = DataLoader(rows, batch_size=4)
    trainer = fitted(module, data, data)
    assert not torch.equal(before["lm_head.weight"], student.lm_head.weight)
    assert math.isfinite(trainer.callback_metrics["val_perplexity"])
    assert not any(name.startswith("teacher") for name in module.state_dict())


def test_wrong_settings_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="`tokenizer` to encode the prompts"):
        module_of(prompts=["a"])
    with pytest.raises(ValueError, match="`max_new_tokens` to be greater than 0"):
        module_of(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"terms\[0\].student_layer.*'lm_heat'"):
        fitted(module_of(student_head="lm_heat"), loader(8))
    with pytest.raises(TypeError, match="batch to be a dict of the student's keyword arguments"):
        fitted(module_of(), DataLoader([torch.ones(3, dtype=torch.int64)] * 4))


def test_a_configuration_file_may_name_every_setting_of_the_module_that_it_extends() -> None:
    jsonargparse = pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    names = [
        set(jsonargparse.ArgumentParser().add_class_arguments(kind, fail_untyped=False))
        for kind in (CausalLMDistillModule, DistillModule)
    ]
    assert {"on_policy", "labels", "teacher_dtype", "prog_bar"} <= names[0]
    assert names[1] <= names[0]
