"""Logits of the language demonstration's networks for a large vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.sentences import sources
from benchmarks.workloads import trainer_for
from lightning_distill.demo.language import QUICK
from lightning_distill.demo.language.networks import GPT, LanguageModel
from lightning_distill.demo.language.text import encode, source_files, train_tokenizer
from lightning_distill.demo.language.training import Settings

PLACES = 8  # of each row
SMALL = 33_000  # the demonstration's text alone has enough words for so many tokens


@dataclass(frozen=True)
class Logits:
    """The scores of two networks at the same places of a text that neither has seen.

    Attributes:
        teacher: Logits ``(N, V)``.
        student: Logits ``(N, V)``.
        hidden: The input of the student's head ``(N, C)``.
        losses: Cross entropy of the teacher and of the student at these places, in nats; None for drawn logits.
        steps: Optimizer steps of the teacher and of the student; None for drawn logits.
    """

    teacher: np.ndarray
    student: np.ndarray
    hidden: np.ndarray
    losses: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None


def demo_logits(number: int, vocabulary: int, quick: bool = False) -> Logits:
    """Train the demonstration's teacher and student on some of its rows, and read their logits.

    The tokenizer learns its tokens from the demonstration's text, and for a large vocabulary from the sources of some
    packages too, since that text alone has too few words. The logits are those of validation files.

    Args:
        number: Number of places, a multiple of 8.
        vocabulary: Number of tokens.
        quick: Whether the networks and the text are tiny.
    """
    settings = replace(QUICK, rows=16, batch_size=4) if quick else replace(Settings(), rows=800, batch_size=4)
    settings = replace(settings, vocabulary=vocabulary)
    paths = source_files()
    held_out = {path.name for part in ("validation", "test") for path in paths[part]}
    named = [(path.name, path.read_text("utf-8")) for path in paths["train"]]
    texts = [text for _, text in named]
    if vocabulary > SMALL and not quick:
        texts = [path.read_text("utf-8", "replace") for name, path in sources() if name not in held_out]
    tokenizer = train_tokenizer(texts, vocabulary)
    train = encode(tokenizer, named)
    validation = encode(tokenizer, [(path.name, path.read_text("utf-8")) for path in paths["validation"]])
    data = TensorDataset(*train.windows(settings.length, settings.rows))
    torch.manual_seed(0)
    teacher, student = (settings.gpt(size) for size in (settings.teacher_size, settings.student_size))
    steps = tuple(
        _trained(net, data, settings, lr, rows)
        for net, lr, rows in (
            (teacher, settings.teacher_lr, len(data)),
            (student, settings.student_lr, len(data) // 4),
        )
    )
    tokens, following = (part[:-1] for part in validation.windows(settings.length))  # the last one has padding
    kept = torch.arange(number // PLACES) * len(tokens) // (number // PLACES)
    read = [_read(net.eval(), tokens[kept], following[kept]) for net in (teacher, student)]
    (of_teacher, _, teacher_loss), (of_student, hidden, student_loss) = read
    return Logits(of_teacher, of_student, hidden, (teacher_loss, student_loss), (steps[0], steps[1]))


def _trained(net: GPT, data: TensorDataset, settings: Settings, lr: float, rows: int) -> int:
    """Train a network on so many rows; returns the number of steps."""
    steps = rows // settings.batch_size
    torch.manual_seed(0)
    trainer = trainer_for([], limit_train_batches=steps, gradient_clip_val=1.0)
    trainer.fit(LanguageModel(net, lr), DataLoader(data, settings.batch_size, shuffle=True, drop_last=True))
    return steps


@torch.no_grad()
def _read(net: GPT, tokens: Tensor, following: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits and hidden states at evenly spaced places of the rows, one row at a time, and the mean cross entropy."""
    places = (torch.arange(PLACES) + 1) * tokens.shape[1] // PLACES - 1
    hidden: list[Tensor] = []
    handle = net.norm.register_forward_hook(lambda layer, inputs, output: hidden.append(output[0, places]))
    logits = torch.cat([net(row[None])[0, places] for row in tokens])
    handle.remove()
    loss = float(F.cross_entropy(logits, following[:, places].flatten()))
    return logits.numpy(), torch.cat(hidden).numpy(), loss
