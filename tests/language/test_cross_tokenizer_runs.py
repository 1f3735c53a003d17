"""Two GPT-2 models with tokenizers of their own under a Trainer, compared with a loop written by hand."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cross_tokenizer_models import RATE, TEXTS, Module, by_hand, gpt2, rows, span_values, task_loss, term
from lightning.pytorch import Trainer
from token_nets import QUIET
from torch import Tensor
from torch.utils.data import DataLoader
from two_tokenizers import byte_level, of_transformers, sentence_piece

from lightning_distill import CrossTokenizerDistillation, DistillCallback, Distiller, SequenceDistillation


class Validated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return task_loss(self.model, batch)


def close(state: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=limit, msg=name)


def fitted(made: Any, data: Any, teacher: Any = None, **settings: Any) -> tuple[dict[str, Tensor], Trainer]:
    module = Module()
    callback = DistillCallback(gpt2(420, 12, seed=1) if teacher is None else teacher, made)
    trainer = Trainer(callbacks=[callback], max_epochs=1, **settings, **QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mean over each micro-batch.*")
        trainer.fit(module, data)
    return module.model.state_dict(), trainer


@pytest.mark.parametrize("method", ["uld", "chunks"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 4)])
def test_weights_equal_those_of_the_loop_by_hand(method: str, batch_size: int, accumulate: int) -> None:
    data = DataLoader(rows(), batch_size)

    state, _ = fitted(term(method), data, accumulate_grad_batches=accumulate)

    close(state, by_hand(method, batch_size, accumulate))
    with pytest.raises(AssertionError):
        close(state, by_hand({"uld": "chunks", "chunks": "uld"}[method], batch_size, accumulate), 1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_collated_tokens_give_the_same_weights(workers: int) -> None:
    made = term("uld")
    data = DataLoader(rows(), 2, collate_fn=made.collate(), num_workers=workers)

    state, _ = fitted(made, data, accumulate_grad_batches=2)

    close(state, by_hand("uld", 2, 2))


def test_own_loop_with_a_window_gives_the_weights_of_the_loop_by_hand() -> None:
    student, teacher = gpt2(300, 8, seed=0), gpt2(420, 12, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    batches = list(DataLoader(rows(), 2))
    with Distiller(student, teacher, term("chunks")) as distiller:
        for start in range(0, len(batches), 2):
            optimizer.zero_grad()
            with distiller.window(batches[start : start + 2]):
                for batch in batches[start : start + 2]:
                    with distiller.record():
                        loss = task_loss(student, batch)
                    (distiller.total(loss, batch) / 2).backward()
            optimizer.step()
    close(student.state_dict(), by_hand("chunks", 2, 2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_tokenizers_give_exactly_the_weights_of_sequence_distillation(accumulate: int) -> None:
    data, settings = DataLoader(rows(), 4), {"accumulate_grad_batches": accumulate}
    same = CrossTokenizerDistillation(byte_level(300), copy.deepcopy(byte_level(300)), "chunks", weight=0.7)

    state, _ = fitted(same, data, gpt2(300, 12, seed=1), **settings)

    expected, _ = fitted(SequenceDistillation(weight=0.7), data, gpt2(300, 12, seed=1), **settings)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_validation_logs_the_loss_and_no_agreement_over_two_vocabularies() -> None:
    data = DataLoader(rows(), 4)

    module, teacher = Validated(), gpt2(420, 12, seed=1)

    trainer = Trainer(callbacks=[DistillCallback(teacher, term("uld"))], max_epochs=1, **QUIET)
    trainer.fit(module, data, data)

    assert "distill/val_teacher_agreement" not in trainer.callback_metrics
    expected = [value for row in rows() for value in span_values(module.model, teacher, row, "uld")]
    logged = trainer.callback_metrics["distill/val_tokens_loss"]
    assert float(logged) == pytest.approx(float(torch.stack(expected).mean().detach()), rel=1e-5)


def test_a_teacher_with_another_kind_of_tokenizer_reads_its_first_token_too() -> None:
    """SentencePiece puts a space in front; transformers wraps both tokenizers."""
    student_tokenizer = of_transformers(byte_level(300), eos_token="<end>")
    teacher_tokenizer = of_transformers(sentence_piece(600), eos_token="</s>")
    made = CrossTokenizerDistillation(student_tokenizer, teacher_tokenizer, "chunks")
    teacher = gpt2(600, 12, seed=1)
    read: list[str] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        shown = zip(args[0], kwargs["attention_mask"], strict=True)
        read.extend(teacher_tokenizer.decode(row[mask.bool()]) for row, mask in shown)

    teacher.register_forward_pre_hook(note, with_kwargs=True)
    _, trainer = fitted(made, DataLoader(rows(), 4), teacher)

    assert read == TEXTS
    assert trainer.callback_metrics["distill/distillation_loss"] > 0


def test_the_term_trains_the_student_towards_the_teacher() -> None:
    made = CrossTokenizerDistillation(byte_level(300), byte_level(420), "chunks", temperature=1.0, weight=5.0)
    student, teacher = gpt2(300, 8, seed=0), gpt2(420, 12, seed=1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    batch = next(iter(DataLoader(rows(), 8)))
    losses = []
    with Distiller(student, teacher, made, task_weight=0) as distiller:
        for _ in range(15):
            with distiller.record():
                loss = task_loss(student, batch)
            total = distiller.total(loss, batch)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]
