"""Prompts with answers, and training on the student's own text written by hand, row by row and token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from device import on_cpu
from language_models import VOCABULARY, language_model, logits_of
from lightning.pytorch import LightningModule, Trainer
from token_nets import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_distill import DistillCallback

ROWS, LENGTH, RATE = 12, 9, 0.05
LENGTHS, PROMPTS = (9, 6, 7, 9, 5, 8, 9, 7, 4, 9, 6, 8), (3, 2, 4, 5, 2, 3, 6, 1, 3, 2, 2, 4)


class Answers(Dataset[dict[str, Tensor]]):
    """Prompts and answers of several lengths, padded on one side."""

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        places = torch.arange(LENGTH) - (LENGTH - LENGTHS[index] if self.side == "left" else 0)
        mask = ((places >= 0) & (places < LENGTHS[index])).long()
        tokens = torch.where(mask == 1, tokens.roll(int(-places[0])), 0)
        labels = torch.where((mask == 0) | (places < PROMPTS[index]), -100, tokens)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def answers(batch_size: int = 3, side: str = "right") -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Answers(side), batch_size=batch_size)


class Module(LightningModule):
    """A user's module that keeps the batches that its step gets, on the CPU."""

    def __init__(self, model: nn.Module, rate: float = RATE) -> None:
        super().__init__()
        self.model, self.rate = model, rate
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(on_cpu(batch))
        logits = logits_of(self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
        return cross_entropy(logits, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class WithoutLoss(Module):
    """For terms that skip the heads."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.seen.append(on_cpu(batch))
        self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


# Continuations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], count: int, end: int | None) -> list[int]:
    """The likeliest continuation of one prompt, without padding and without a cache."""
    training = model.training
    model.eval()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and not (len(tokens) > len(prompt) and tokens[-1] == end):
        tokens.append(int(logits_of(model(input_ids=torch.tensor([tokens])))[0, -1].argmax()))
    model.train(training)
    return tokens[len(prompt) :]


def sequences_in(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row."""
    rows = zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True)
    return [
        (tokens[(mask == 1) & (labels == -100)].tolist(), labels[labels != -100].tolist())
        for tokens, mask, labels in rows
    ]


def is_own(batch: dict[str, Tensor], index: int) -> bool:
    """Whether a batch of three rows is not that of the data."""
    expected = [Answers()[row]["input_ids"] for row in range(index * 3 % ROWS, index * 3 % ROWS + 3)]
    return batch["input_ids"].shape[1] != LENGTH or not torch.equal(batch["input_ids"], torch.stack(expected))


# The loss ------------------------------------------------------------------------------------------------------------


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(teacher, student)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.3) -> Tensor:
    """Equation 1 of GKD: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with the teacher p."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


def token_losses(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], divergence: Callable[..., Tensor]
) -> Tensor:
    """The divergence of each token of the answers, from sequences without padding."""
    values = []
    for prompt, answer in sequences_in(batch):
        tokens = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            target = logits_of(teacher.eval()(input_ids=tokens))[0]
        every = divergence(logits_of(student(input_ids=tokens))[0], target)
        values.append(every[len(prompt) - 1 : -1])
    return torch.cat(values)


def trained_by_hand(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[tuple[dict[str, Tensor], bool]],
    divergence: Callable[..., Tensor],
    accumulate: int = 1,
    task_weight: float = 1.0,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """The student's parameters after steps on batches, each with whether it is the student's own text.

    The divergence is the mean over all tokens of an optimizer step, the task loss that over the micro-batches.
    """
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        window = batches[start : start + accumulate]
        every = torch.cat([token_losses(student, teacher, batch, divergence) for batch, _ in window])
        total = weight * every.mean()
        for batch, own in window:
            if not own:
                logits = logits_of(student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
                total = total + task_weight * cross_entropy(logits, batch) / accumulate
        total.backward()
        optimizer.step()
    return {name: value.detach() for name, value in student.state_dict().items()}


# Trainings -----------------------------------------------------------------------------------------------------------

NAMES = ("input_ids", "attention_mask", "labels")
ALWAYS: dict[str, Any] = {"fraction": 1.0, "max_new_tokens": 4, "temperature": 0}


def teacher() -> nn.Module:
    """A wider model."""
    return language_model("llama", 24, 1)


class Rows(Dataset[Any]):
    """Rows that are changed by a function."""

    def __init__(self, change: Any) -> None:
        self.change, self.rows = change, Answers()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.change(self.rows[index])


def changed(change: Any, collate: Any = None) -> DataLoader[Any]:
    return DataLoader(Rows(change), batch_size=3, collate_fn=collate)


def trained(
    module: Any, on_policy: Any, data: Any = None, terms: Any = None, network: Any = None, **settings: Any
) -> Any:
    own = {name: settings.pop(name) for name in ("student", "labels", "teacher_inputs") if name in settings}
    callback = DistillCallback(teacher() if network is None else network, terms, on_policy=on_policy, **own)
    Trainer(callbacks=callback, **{**QUIET, "max_epochs": 1, **settings}).fit(module, data or answers())
    return module
