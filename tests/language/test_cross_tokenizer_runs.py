"""Two GPT-2 models with tokenizers of their own under a Trainer, compared with a loop written by hand."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from oracle_spans import shared_spans, span_losses
from token_nets import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_tokenizers import byte_level, of_transformers, sentence_piece

from distill_core.token_bytes import TokenBytes
from lightning_distill import CrossTokenizerDistillation, DistillCallback, Distiller, SequenceDistillation

TEXTS = [
    "import os\n",
    "x = [1, 2]  # é",
    "def f(self):\n    return 字",
    "y",
    "return self.name",
    "a\tb",
    "for i in x:",
    "# 1",
]
STUDENT, TEACHER = (TokenBytes("tokenizer", byte_level(size)) for size in (300, 420))
RATE = 0.2


def gpt2(vocabulary: int, width: int, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": vocabulary}
    model: Any = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.double()


@functools.cache
def rows() -> list[dict[str, Tensor]]:
    """Padded on the right, with labels that leave out padding and the beginning of some rows."""
    encoded = STUDENT.encode(TEXTS)
    longest = max(map(len, encoded))
    made = []
    for index, numbers in enumerate(encoded):
        mask = torch.arange(longest) < len(numbers)
        tokens = F.pad(torch.tensor(numbers), (0, longest - len(numbers)))
        labels = torch.where(mask & (torch.arange(longest) >= index % 3), tokens, -100)
        made.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return made


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross entropy in float64, where the library transformers takes float32."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2(300, 8, seed=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return task_loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Validated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return task_loss(self.model, batch)


def term(method: Any, **settings: Any) -> CrossTokenizerDistillation:
    temperature = 2.0 if method == "uld" else 3.0
    return CrossTokenizerDistillation(
        byte_level(300), byte_level(420), method, temperature=temperature, weight=0.7, **settings
    )


def span_values(student: nn.Module, teacher: nn.Module, row: dict[str, Tensor], method: str) -> list[Tensor]:
    """The loss of each span of a row that counts, from both models called with that row alone."""
    length = int(row["attention_mask"].sum())
    own, labels = row["input_ids"][:length], row["labels"]
    other = torch.tensor(TEACHER.encode([STUDENT.spell(own.tolist()).decode()])[0])
    spans = shared_spans([STUDENT.pieces[n] for n in own], [TEACHER.pieces[n] for n in other])[1:]
    spans = [span for span in spans if bool((labels[span[0]] != -100).all())]
    with torch.no_grad():
        teacher_logits = teacher(other[None]).logits[0]
    pair = (student(own[None]).logits[0], own.tolist()), (teacher_logits, other.tolist())
    return span_losses(spans, *pair, method, 2.0 if method == "uld" else 3.0)


def by_hand(method: str, batch_size: int, micro_batches: int) -> dict[str, Tensor]:
    """The student's weights after one epoch: each step's spans are averaged over the whole step."""
    student, teacher = gpt2(300, 8, seed=0), gpt2(420, 12, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    size = batch_size * micro_batches
    for start in range(0, len(rows()), size):
        step = rows()[start : start + size]
        task = torch.zeros((), dtype=torch.float64)
        for first in range(0, size, batch_size):
            batch = {name: torch.stack([row[name] for row in step[first : first + batch_size]]) for name in step[0]}
            task = task + task_loss(student, batch)
        spans = [value for row in step for value in span_values(student, teacher, row, method)]
        optimizer.zero_grad()
        (task / micro_batches + 0.7 * torch.stack(spans).mean()).backward()
        optimizer.step()
    return student.state_dict()


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
