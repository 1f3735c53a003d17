"""Text of the student where the teacher has another tokenizer: both read the new text, each in its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross_tokenizer_models import STUDENT, Module, gpt2, rows, span_values, term
from lightning.pytorch import Callback, Trainer
from token_nets import QUIET
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import DistillCallback, OnPolicyDistillation, SequenceDistillation

WRITTEN = " + name[x]; return self.os"
LENGTH = rows()[0]["input_ids"].shape[0]


def writes(count: int, other: bool = False) -> Any:
    """A function that continues each prompt with the same text, or with bytes that do not spell any."""

    def generate(student: Any, *, input_ids: Tensor, max_new_tokens: int, **rest: Any) -> Tensor:
        tokens = torch.tensor(STUDENT.encode([WRITTEN])[0])[:max_new_tokens]
        if other:
            tokens = torch.full((max_new_tokens,), STUDENT.pieces.index(b"\xff"))
        return torch.cat([input_ids, tokens.to(input_ids.device).expand(len(input_ids), -1)], 1)

    return OnPolicyDistillation(
        1.0, max_new_tokens=count, generate=generate, prompt=lambda batch: torch.arange(LENGTH) < 1
    )


class Seen(Callback):
    """The batches of the steps, their losses, and those of the loop by hand."""

    def __init__(self, teacher: Any, method: str) -> None:
        self.teacher, self.method = teacher, method
        self.values: list[float] = []
        self.expected: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["distill/tokens_loss"]))


class Kept(Module):
    """A module that works out the loss of each batch by hand before its step."""

    seen: Seen

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = [{name: batch[name][index] for name in batch if name != "teacher_tokens"} for index in range(2)]
        spans = [span_values(self.model, self.seen.teacher, row, self.seen.method) for row in each]
        self.seen.expected.append(torch.stack([span for of_row in spans for span in of_row]).mean().item())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["uld", "chunks"])
@pytest.mark.parametrize("collates", [True, False])
@pytest.mark.parametrize("count", [6, LENGTH - 1])  # with the second the new rows are as long as the old ones
def test_the_teacher_reads_the_new_text(method: str, collates: bool, count: int) -> None:
    made, seen = term(method), Seen(gpt2(420, 12, seed=1), method)
    module = Kept()
    module.__dict__["seen"] = seen
    data = DataLoader(rows(), 2, collate_fn=made.collate() if collates else None)

    callback = DistillCallback(seen.teacher, made, on_policy=writes(count))
    Trainer(callbacks=[callback, seen], max_epochs=1, **QUIET).fit(module, data)

    assert min(seen.expected) > 1e-3
    assert seen.values == pytest.approx(seen.expected, rel=1e-5)  # logged in float32


def test_random_bytes_of_the_student_do_not_speak_against_the_tokenizers() -> None:
    callback = DistillCallback(gpt2(420, 12, seed=1), term("uld"), on_policy=writes(12, other=True))
    trainer = Trainer(callbacks=[callback], max_epochs=1, **QUIET)

    trainer.fit(Module(), DataLoader(rows(), 2))

    assert trainer.callback_metrics["distill/tokens_loss"] < 1e-6


def test_a_function_that_builds_the_batch_gets_none_of_the_old_tokens() -> None:
    names = []

    def build(batch: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        names.append(sorted(batch))
        return {**batch, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    on_policy, made = writes(6), term("uld")
    on_policy.build = build
    data = DataLoader(rows(), 2, collate_fn=made.collate())

    Trainer(callbacks=[DistillCallback(gpt2(420, 12, seed=1), made, on_policy=on_policy)], max_epochs=1, **QUIET).fit(
        Module(), data
    )

    assert names[0] == ["attention_mask", "input_ids", "labels"]
    assert SequenceDistillation.token_entries == ()
