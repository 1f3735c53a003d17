"""Two small GPT-2 models with tokenizers of their own, their data, and the training loop written by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from oracle_spans import shared_spans, span_losses
from torch import Tensor, nn
from two_tokenizers import byte_level

from distill_core.token_bytes import TokenBytes
from lightning_distill import CrossTokenizerDistillation

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
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Module(LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = gpt2(300, 8, seed=0) if model is None else model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return task_loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def term(method: Any, **settings: Any) -> CrossTokenizerDistillation:
    temperature = 2.0 if method == "uld" else 3.0
    return CrossTokenizerDistillation(
        byte_level(300), byte_level(420), method, temperature=temperature, weight=0.7, **settings
    )


def span_values(student: nn.Module, teacher: nn.Module, row: dict[str, Tensor], method: str) -> list[Tensor]:
    """The loss of each span of a row that counts, from both models called with that row alone."""
    length = int(row["attention_mask"].sum())
    own, labels = row["input_ids"][:length], row["labels"]
    other = torch.tensor(TEACHER.encode([STUDENT.spell(own.tolist()).decode()])[0], device=own.device)
    spans = shared_spans([STUDENT.pieces[n] for n in own], [TEACHER.pieces[n] for n in other])[1:]
    spans = [span for span in spans if bool((labels[span[0]] != -100).all())]
    with torch.no_grad():
        teacher_logits = teacher(other[None])["logits"][0]
    pair = (student(own[None])["logits"][0], own.tolist()), (teacher_logits, other.tolist())
    return span_losses(spans, *pair, method, 2.0 if method == "uld" else 3.0)


def by_hand(
    method: str, batch_size: int, micro_batches: int, models: Any = None, task_weight: float = 1.0
) -> dict[str, Tensor]:
    """The student's weights after one epoch: each step's spans are averaged over the whole step."""
    student, teacher = models or (gpt2(300, 8, seed=0), gpt2(420, 12, seed=1))
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
        (task_weight * task / micro_batches + 0.7 * torch.stack(spans).mean()).backward()
        optimizer.step()
    return student.state_dict()
