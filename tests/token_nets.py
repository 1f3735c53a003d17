"""A causal model of a few parameters, ragged batches, and the training loop written by hand to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from device import ACCELERATOR
from lightning.pytorch import LightningModule
from plain_trainer import PLAIN
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY, LENGTH = 13, 9
LENGTHS = (9, 2, 5, 7, 3, 9, 2, 6, 8, 4, 9, 2, 3, 9, 5, 2, 7, 2, 9, 9, 2, 4, 6, 5)  # of the sequences, in order
QUIET: dict[str, Any] = {**PLAIN, "accelerator": ACCELERATOR, "log_every_n_steps": 1}


class CausalModel(nn.Module):
    """Position t sees the mean of the embeddings up to t, and scores token t + 1."""

    def __init__(self, width: int = 5, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.body = nn.Linear(width, width)
            self.lm_head = nn.Linear(width, vocabulary)
        self.double()

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rows = self.embedding(input_ids)
        weights = torch.ones_like(rows) if attention_mask is None else attention_mask.unsqueeze(-1).expand_as(rows)
        seen = (rows * weights).cumsum(1) / weights.cumsum(1).clamp(min=1)
        return torch.tanh(self.body(seen))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> dict[str, Tensor]:
        return {"logits": self.lm_head(self.hidden(input_ids, attention_mask))}


class LanguageModule(LightningModule):
    """A user's module; its own loss is a mean over the sequences of a micro-batch."""

    def __init__(self, model: nn.Module | None = None, learning_rate: float = 0.5) -> None:
        super().__init__()
        self.model = CausalModel() if model is None else model
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return own_loss(self.model(batch["input_ids"], batch["attention_mask"])["logits"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class Sequences(Dataset[dict[str, Tensor]]):
    """Right-padded sequences of the lengths above, with labels that ignore the padding and a prompt of two tokens."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTHS[index]).long()
        labels = torch.where((mask == 0) | (torch.arange(LENGTH) < 2), -100, tokens)
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def loader(batch_size: int, **settings: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Sequences(), batch_size=batch_size, **settings)


def own_loss(logits: Tensor) -> Tensor:
    return logits[:, 0].square().mean()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of every position, at temperature 1."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def by_hand(
    steps: int, sequences: int = 8, micro_batches: int = 1, normalize: str = "tokens", task_weight: float = 1.0
) -> dict[str, Tensor]:
    """The student's parameters after so many optimizer steps of equal numbers of sequences."""
    starts = [step * sequences % len(LENGTHS) for step in range(steps)]
    windows = [range(start, min(start + sequences, len(LENGTHS))) for start in starts]
    return by_hand_windows(windows, micro_batches, normalize, task_weight, sequences // micro_batches)


def by_hand_windows(
    windows: Sequence[Sequence[int]],
    micro_batches: int | Sequence[int],
    normalize: str = "tokens",
    task_weight: float = 1.0,
    size: int = 2,
) -> dict[str, Tensor]:
    """The student's parameters after a loop over whole optimizer steps, token by token.

    Args:
        windows: The sequences of each optimizer step.
        micro_batches: Number of micro-batches that the own loss is averaged over, for all steps or for each.
        normalize: As in the term.
        task_weight: Factor of the own loss.
        size: Sequences of a micro-batch.
    """
    student, teacher = CausalModel(), CausalModel(7, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    for step, window in enumerate(windows):
        divided_by = micro_batches if isinstance(micro_batches, int) else micro_batches[step]
        task, values = torch.zeros((), dtype=torch.float64), []
        for start in range(0, len(window), size):
            rows = [Sequences()[index] for index in window[start : start + size]]
            inputs = [torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")]
            task = task + own_loss(student(*inputs)["logits"]) / divided_by
        for index in window:
            tokens, mask, labels = Sequences()[index].values()
            logits = student(tokens[None], mask[None])["logits"]
            with torch.no_grad():
                target = teacher(tokens[None], mask[None])["logits"]
            every = divergence(logits, target)[0]
            values.append([every[place] for place in range(LENGTH - 1) if labels[place + 1] != -100])
        flat = [value for of_sequence in values for value in of_sequence]
        means = [sum(of_sequence) / len(of_sequence) for of_sequence in values if of_sequence]
        averaged = flat if normalize == "tokens" else means
        distillation = sum(averaged) / max(len(averaged), 1)
        optimizer.zero_grad()
        (task_weight * task + 2.0 * distillation).backward()
        optimizer.step()
    return {name: value.detach() for name, value in student.state_dict().items()}


def close(got: dict[str, Any], expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    """Compare parameters by name, whatever prefix they have."""
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(got[name], dtype=torch.float64), value, rtol=0, atol=atol)
