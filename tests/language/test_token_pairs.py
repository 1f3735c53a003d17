"""Token terms together with other features: validation, caches, schedules, other terms, two callbacks, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from token_nets import (
    LENGTHS,
    QUIET,
    CausalModel,
    LanguageModule,
    Sequences,
    by_hand,
    close,
    divergence,
    loader,
    own_loss,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import (
    DistillCallback,
    FeatureDistillation,
    FusedLinearDistillation,
    LogitsDistillation,
    SequenceDistillation,
    TeacherCache,
    schedules,
)

ROWS = [Sequences()[index] for index in range(len(LENGTHS))]


class Validated(LanguageModule):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return own_loss(self.model(batch["input_ids"], batch["attention_mask"])["logits"])


class Silent(LanguageModule):
    """Its step makes no loss, since the heads are skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch["input_ids"], batch["attention_mask"])


def fitted(module: Any, terms: Any, data: Any, validation: Any = None, teacher: Any = None, **settings: Any) -> Trainer:
    callback = DistillCallback(CausalModel(7, seed=1) if teacher is None else teacher, terms)
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer = Trainer(**{**QUIET, "max_epochs": 1, **settings}, callbacks=callbacks)
    trainer.fit(module, data, validation)
    return trainer


def token_values(student: Any, teacher: Any) -> Tensor:
    """The divergence of every token that counts."""
    values = []
    for row in ROWS:
        with torch.no_grad():
            logits = [
                network(row["input_ids"][None], row["attention_mask"][None])["logits"] for network in (student, teacher)
            ]
        values.append(divergence(*logits)[0, :-1][row["labels"][1:] != -100])
    return torch.cat(values)


@pytest.mark.parametrize("term", [SequenceDistillation(weight=2.0), FusedLinearDistillation(weight=2.0)])
def test_validation_is_the_mean_over_all_tokens(term: Any) -> None:
    class Both(Validated, Silent):
        pass

    module = (Both if isinstance(term, FusedLinearDistillation) else Validated)()
    trainer = fitted(module, term, loader(8), loader(2))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = float(token_values(module.model, CausalModel(7, seed=1)).mean())
    assert logged["distill/val_tokens_loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["distill/val_distillation_loss"] == pytest.approx(2 * expected, rel=1e-6)
    assert logged["distill/val_loss"] == pytest.approx(2 * expected + logged["distill/val_task_loss"], rel=1e-6)


def test_validation_in_several_calls_is_the_mean_over_the_tokens_of_all_of_them() -> None:
    class InTwoCalls(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            parts = [{name: rows[place] for name, rows in batch.items()} for place in (slice(2), slice(2, None))]
            return torch.stack([own_loss(self.model(**part)["logits"]) for part in parts]).mean()

    module = InTwoCalls()
    trainer = fitted(module, SequenceDistillation(), loader(8), loader(8))
    expected = float(token_values(module.model, CausalModel(7, seed=1)).mean())
    assert float(trainer.callback_metrics["distill/val_tokens_loss"]) == pytest.approx(expected, rel=1e-6)


def test_the_agreement_is_over_the_tokens_that_count() -> None:
    module = Validated()
    trainer = fitted(module, SequenceDistillation(), loader(8), loader(2))
    agreeing = []
    for row in ROWS:
        with torch.no_grad():
            chosen = [
                network(row["input_ids"][None], row["attention_mask"][None])["logits"].argmax(-1)[0, :-1]
                for network in (module.model, CausalModel(7, seed=1))
            ]
        agreeing.append((chosen[0] == chosen[1])[row["labels"][1:] != -100])
    expected = float(torch.cat(agreeing).double().mean())
    assert float(trainer.callback_metrics["distill/val_teacher_agreement"]) == pytest.approx(expected, rel=1e-6)


def test_a_cache_of_the_likeliest_tokens_gives_the_divergence_over_merged_tokens(tmp_path: Path) -> None:
    teacher = CausalModel(7, seed=1)
    whole = TeacherCache.build(teacher, Sequences(), tmp_path / "whole", dtype="float32", progress=False)
    likeliest = TeacherCache.build(teacher, Sequences(), tmp_path / "k", top_k=12, progress=False)
    states = []
    for cache in (whole, likeliest):  # of 13 tokens all but one: merging changes nothing
        module = LanguageModule()
        fitted(
            module,
            SequenceDistillation(weight=2.0),
            DataLoader(Sequences(), 2),
            teacher=cache,
            accumulate_grad_batches=4,
        )
        states.append(module.model.state_dict())
    close(*states, atol=1e-3)  # the likeliest are stored in float16
    close(states[0], by_hand(3, micro_batches=4), atol=1e-6)


class Weights(Callback):
    """Notes the weight that each step used."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        parts = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.append(parts["distill/distillation_loss"] / parts["distill/tokens_loss"])


@pytest.mark.parametrize(("kind", "term"), [(LanguageModule, SequenceDistillation), (Silent, FusedLinearDistillation)])
def test_a_scheduled_weight_counts_in_its_own_step(kind: Any, term: Any) -> None:
    weights = Weights()
    fitted(kind(), term(weight=schedules.Linear(1.0, 3.0, duration=2, over="steps")), loader(8), callbacks=[weights])
    assert weights.seen == pytest.approx([1.0, 2.0, 3.0], rel=1e-5)


def test_features_of_the_same_step_are_read_while_the_heads_are_skipped() -> None:
    students, feature = [], FeatureDistillation("body", "body", "mse", weight=0.5, adapter=None)
    for kind, term in ((LanguageModule, SequenceDistillation), (Silent, FusedLinearDistillation)):
        module, teacher, calls = kind(CausalModel(7)), CausalModel(7, seed=1), []
        teacher.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        callback = DistillCallback(teacher, [term(weight=2.0), feature], task_weight=0.0)
        Trainer(callbacks=callback, max_epochs=1, **QUIET).fit(module, loader(8))
        assert len(calls) == 3  # once in each step
        students.append(module.model)
    close(*[student.state_dict() for student in students])


def test_two_callbacks_count_the_same_window() -> None:
    module = LanguageModule()
    second = DistillCallback(CausalModel(7, seed=1), SequenceDistillation(), name="second")
    fitted(module, SequenceDistillation(), loader(2), callbacks=[second], accumulate_grad_batches=4)
    close(module.model.state_dict(), by_hand(3, micro_batches=4))


def test_terms_on_logits_and_on_tokens_stand_side_by_side() -> None:
    module = LanguageModule()
    terms = [SequenceDistillation(weight=2.0), LogitsDistillation(mask=lambda batch: batch["labels"] == -7, weight=1.0)]
    fitted(module, terms, loader(2), accumulate_grad_batches=4)  # the second counts no position
    close(module.model.state_dict(), by_hand(3, micro_batches=4))


def test_copies_in_mid_fit_are_plain_and_resuming_is_exact(tmp_path: Path) -> None:
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            copies.append(copy.deepcopy(pl_module.model))

    whole, halves = Silent(), Silent()
    fitted(whole, FusedLinearDistillation(weight=2.0), loader(8), max_epochs=2, callbacks=[Copy()])
    assert all("forward" not in copied.lm_head.__dict__ for copied in copies)
    trainer = fitted(halves, FusedLinearDistillation(weight=2.0), loader(8))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Silent()
    callback = DistillCallback(CausalModel(7, seed=1), FusedLinearDistillation(weight=2.0))
    trainer = Trainer(callbacks=callback, max_epochs=2, **QUIET)
    trainer.fit(resumed, loader(8), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    close(resumed.model.state_dict(), whole.model.state_dict(), atol=0)


@pytest.mark.parametrize(("kind", "term"), [(LanguageModule, SequenceDistillation), (Silent, FusedLinearDistillation)])
@pytest.mark.parametrize(("size", "accumulate"), [(24, 1), (2, 5), (2, 24), (5, 5)])
def test_the_logged_mean_of_an_epoch_is_over_all_tokens_for_every_cut(
    kind: Any, term: Any, size: int, accumulate: int
) -> None:
    module = kind(learning_rate=0.0)
    trainer = fitted(module, term(weight=2.0), loader(size), accumulate_grad_batches=accumulate)
    expected = float(token_values(module.model, CausalModel(7, seed=1)).mean())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["distill/tokens_loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["distill/distillation_loss"] == pytest.approx(2 * expected, rel=1e-6)


class Halves(LanguageModule):
    """Calls the student for each half of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = []
        for part in (slice(None, 2), slice(2, None)):
            inputs = {name: batch[name][part] for name in ("input_ids", "attention_mask", "labels")}
            losses.append(own_loss(self.model(**inputs)["logits"]))
        return torch.stack(losses).mean()


class Twice(LanguageModule):
    """Calls the student twice for the whole batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [own_loss(self.model(batch["input_ids"], batch["attention_mask"])["logits"]) for _ in range(2)]
        return torch.stack(losses).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Halves, Twice])
def test_several_calls_of_a_step_give_the_mean_over_their_tokens(kind: Any, accumulate: int) -> None:
    module = kind()
    data = loader(4)
    if accumulate == 1:
        fitted(module, SequenceDistillation(weight=2.0), data)
        close(module.model.state_dict(), by_hand(6, sequences=4))
    else:
        fitted(module, SequenceDistillation(weight=2.0), data, accumulate_grad_batches=2)
        close(module.model.state_dict(), by_hand(3, micro_batches=2))


class SilentHalves(Silent):
    """Calls the student for each half of the batch, and makes no loss of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for part in (slice(None, 2), slice(2, None)):
            self.model(**{name: rows[part] for name, rows in batch.items()})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_logged_mean_of_several_calls_without_logits_is_over_their_tokens(accumulate: int) -> None:
    module = SilentHalves(learning_rate=0.0)
    trainer = fitted(module, FusedLinearDistillation(weight=2.0), loader(4), accumulate_grad_batches=accumulate)
    expected = float(token_values(module.model, CausalModel(7, seed=1)).mean())
    assert float(trainer.callback_metrics["distill/tokens_loss"]) == pytest.approx(expected, rel=1e-6)


class Skips(Silent):
    """Returns nothing for every second batch, without a call of the student."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_call_skips_its_batch() -> None:
    module, reference = Skips(), Silent()
    fitted(module, FusedLinearDistillation(weight=2.0), loader(4))
    rows = [row for start in range(0, 24, 8) for row in ROWS[start : start + 4]]
    fitted(reference, FusedLinearDistillation(weight=2.0), DataLoader(rows, batch_size=4))
    close(module.model.state_dict(), reference.model.state_dict())


class Tuples(LanguageModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return own_loss(self.model(input_ids=batch[0], attention_mask=batch[1])["logits"])


@pytest.mark.parametrize("labels", [None, 2])
def test_numbers_in_a_tuple_that_may_be_labels_are_asked_for(labels: int | None) -> None:
    rows = [(row["input_ids"], row["attention_mask"], row["labels"]) for row in ROWS]
    module, data = Tuples(), DataLoader(rows, batch_size=8)
    term = SequenceDistillation(weight=2.0, labels=labels)
    if labels is None:
        with pytest.raises(ValueError, match="know whether a batch has labels"):
            fitted(module, term, data)
    else:
        fitted(module, term, data)
        close(module.model.state_dict(), by_hand(3))


class Positional(LanguageModule):
    """Passes the attention mask by position, from a batch that does not name it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return own_loss(self.model(batch[0], batch[1])["logits"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_attention_mask_counts_by_position_too(side: str) -> None:
    modules = []
    for kind, names in ((Positional, None), (LanguageModule, ("input_ids", "attention_mask", "labels"))):
        rows = [
            [row[name] if side == "right" else row[name].flip(0) for name in ("input_ids", "attention_mask", "labels")]
            for row in ROWS
        ]
        data = rows if names is None else [dict(zip(names, row, strict=True)) for row in rows]
        modules.append(kind())
        labels = 2 if names is None else None
        fitted(modules[-1], SequenceDistillation(weight=2.0, labels=labels), DataLoader(data, batch_size=8))
    close(modules[0].model.state_dict(), modules[1].model.state_dict(), atol=0)
