"""Batches, steps and models as users have them: other containers, other integers, hooks, shared heads."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from token_batches import SEQUENCES, llama, padded
from token_nets import QUIET, CausalModel, LanguageModule, Sequences, by_hand, close, divergence, loader, own_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_distill import (
    CausalLMDistillModule,
    DistillCallback,
    Distiller,
    FusedLinearDistillation,
    SequenceDistillation,
    TeacherCache,
)

BATCH: dict[str, Tensor] = next(iter(loader(6)))
TOKENS, MASK, LABELS = BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"]


def expected(counts: Tensor) -> float:
    """The mean over the marked tokens, by hand."""
    with torch.no_grad():
        student, teacher = (model(TOKENS, MASK)["logits"] for model in (CausalModel(), CausalModel(7, seed=1)))
    return float(divergence(student, teacher)[:, :-1][counts[:, 1:]].mean())


def value(batch: Any, term: Any = None, **arguments: Any) -> float:
    """The term's value where the student is called with tokens and mask."""
    with Distiller(CausalModel(), CausalModel(7, seed=1), term or SequenceDistillation(), **arguments) as distiller:
        with distiller.record(batch=batch):
            distiller.student(TOKENS, attention_mask=MASK)
        return float(distiller.loss(batch).detach())


# Where the labels are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(BATCH, torch.arange(6)), [BATCH], (TOKENS, LABELS)], ids=["index", "list", "pair"])
def test_labels_of_a_dict_inside_the_batch_count(batch: Any) -> None:
    assert value(batch) == pytest.approx(expected(LABELS != -100), rel=1e-12)


def test_two_dicts_with_labels_leave_the_mask_of_the_call() -> None:
    other = {"labels": torch.full_like(LABELS, -100)}
    assert value([other, BATCH]) == pytest.approx(expected(MASK != 0), rel=1e-12)


def test_a_mask_that_stands_where_labels_would_is_refused() -> None:
    with pytest.raises(ValueError, match="0 and 1 alone"):
        value((TOKENS, MASK))
    placed = SequenceDistillation(mask=1, labels=0)
    assert value((TOKENS, MASK), placed) == pytest.approx(expected(MASK != 0), rel=1e-12)


class Pops(LanguageModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        batch.pop("labels")
        return own_loss(self.model(batch["input_ids"], batch["attention_mask"])["logits"])


@pytest.mark.parametrize("kind", ["dict", "OrderedDict", "BatchEncoding", "inside a list"])
def test_a_step_may_take_the_labels_out_of_any_mapping(kind: str) -> None:
    import transformers

    container: Any = {
        "dict": dict,
        "inside a list": lambda rows: [rows, torch.arange(2)],
        "OrderedDict": OrderedDict,
        "BatchEncoding": transformers.BatchEncoding,
    }[kind]
    data = DataLoader(Sequences(), batch_size=2, collate_fn=lambda rows: container(default_collate(rows)))
    module = Pops()
    callback = DistillCallback(CausalModel(7, seed=1), SequenceDistillation(weight=2.0))
    Trainer(callbacks=callback, max_epochs=1, accumulate_grad_batches=4, **QUIET).fit(module, data)
    close(module.model.state_dict(), by_hand(3, micro_batches=4))


# Counting ahead ------------------------------------------------------------------------------------------------------


def fit_with_warning(module: LanguageModule, term: Any, match: str) -> None:
    callback = DistillCallback(CausalModel(7, seed=1), term)
    with pytest.warns(UserWarning, match=match):
        Trainer(callbacks=callback, max_epochs=1, accumulate_grad_batches=4, **QUIET).fit(module, loader(2))


class MasksLater(LanguageModule):
    """Its hook takes tokens out of batches that were counted before."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        labels = batch["labels"].clone()
        labels[:, 4:] = -100
        return {**batch, "labels": labels, "answer": labels != -100}


def test_a_hook_that_changes_the_number_of_tokens_is_noticed_in_the_second_micro_batch() -> None:
    fit_with_warning(MasksLater(), SequenceDistillation(), r"in the training step, but \d+ in the batch")


def test_a_function_that_reads_an_entry_added_later_by_a_hook_gives_a_warning() -> None:
    term = SequenceDistillation(mask=lambda batch: batch["answer"])
    fit_with_warning(MasksLater(), term, "could not be counted before the training step .*KeyError.*answer")


def test_a_window_counts_the_tokens_of_batches_with_rows_of_a_cache(tmp_path: Path) -> None:
    data = Sequences()
    cache = TeacherCache.build(CausalModel(7, seed=1), data, tmp_path / "cache", dtype="float32")
    student, batches = CausalModel(), list(DataLoader(cache.attach(data), batch_size=2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    with Distiller(student, cache, SequenceDistillation(weight=2.0)) as distiller:
        for start in range(0, len(batches), 4):
            optimizer.zero_grad()
            with distiller.window(batches[start : start + 4]):
                for batch in batches[start : start + 4]:
                    with distiller.record():
                        logits = student(batch.batch["input_ids"], batch.batch["attention_mask"])["logits"]
                    (distiller.total(own_loss(logits), batch) / 4).backward()
            optimizer.step()
    close(student.state_dict(), by_hand(3, micro_batches=4), atol=1e-6)  # the cache holds float32


# Without logits ------------------------------------------------------------------------------------------------------


def test_another_prompt_of_the_same_length_is_refused_where_heads_are_skipped() -> None:
    teacher = {"input_ids": TOKENS.roll(1, 1), "attention_mask": MASK.roll(1, 1), "labels": LABELS.roll(1, 1)}
    batch = {**BATCH, "teacher": teacher}
    with pytest.raises(ValueError, match="labels of their own"):
        value(batch, FusedLinearDistillation(), teacher_inputs="teacher")


def test_a_batch_that_only_the_total_gets_is_refused() -> None:
    with Distiller(CausalModel(), CausalModel(7, seed=1), FusedLinearDistillation()) as distiller:
        with distiller.record():
            distiller.student(TOKENS, attention_mask=MASK)
        with pytest.raises(ValueError, match="record\\(batch=batch\\)"):
            distiller.loss(BATCH)


def test_models_may_share_a_frozen_head() -> None:
    gradients = []
    for term in (SequenceDistillation(), FusedLinearDistillation()):
        student, teacher = CausalModel(), CausalModel(seed=1)
        student.lm_head = teacher.lm_head.requires_grad_(False)
        with Distiller(student, teacher, term) as distiller:
            with distiller.record(batch=BATCH):
                student(TOKENS, MASK)
            distiller.loss(BATCH).backward()
        assert "forward" not in vars(student.lm_head)
        gradients.append([p.grad for p in student.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


# The ready module ----------------------------------------------------------------------------------------------------


def by_sequence(model: nn.Module) -> float:
    values = []
    for sequence in SEQUENCES:
        tokens = torch.tensor([sequence])
        logits = model.eval()(input_ids=tokens)["logits"][0, :-1]
        values += F.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
    return sum(values) / len(values)


def packed() -> dict[str, Tensor]:
    tokens = torch.tensor([[token for sequence in SEQUENCES for token in sequence]])
    places = torch.tensor([[place for sequence in SEQUENCES for place in range(len(sequence))]])
    return {"input_ids": tokens, "position_ids": places}


def left() -> dict[str, Tensor]:
    batch = padded(side="left")
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def int32() -> dict[str, Tensor]:
    return {name: rows.int() for name, rows in padded().items()}


@pytest.mark.parametrize("make", [left, packed, int32])
def test_validation_and_training_count_the_same_tokens(make: Any) -> None:
    batch = make()
    module = CausalLMDistillModule(llama(), llama(32, seed=1), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, data, data)
    trained = float(trainer.callback_metrics["distill/tokens_task_loss"])
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(trained, rel=1e-5)
    if make is not packed:  # whose attention also needs the borders
        assert trained == pytest.approx(by_sequence(llama()), rel=1e-5)


def test_the_student_does_not_get_the_inputs_of_the_teacher() -> None:
    batch = {**padded(), "teacher": {name: rows.clone() for name, rows in padded(labels=False).items()}}
    student = CausalModel(vocabulary=64)
    module = CausalLMDistillModule(student, llama(32, seed=1), teacher_inputs="teacher")
    data = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    Trainer(max_epochs=1, **QUIET).fit(module, data, data)
