"""Language models: Python's standard library, as in the demonstration, with several divergences."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.classifier import TRAINER, trained_once
from lightning_distill import (
    GeneralizedJSDLoss,
    ReverseKLLoss,
    SequenceDistillation,
    SkewKLLoss,
    SoftTargetLoss,
    TeacherCache,
    TotalVariationLoss,
)
from lightning_distill.demo.language.networks import GPT, LanguageModel
from lightning_distill.demo.language.text import IGNORED, Text, load_text

VOCABULARY, LENGTH, ROWS, BATCH = 512, 96, 1600, 16
LARGE, SMALL = (96, 3), (32, 2)  # width and depth
DIVERGENCES = {  # all at temperature 1
    "KL": SoftTargetLoss(1.0),
    "reverse KL": ReverseKLLoss(),
    "Jensen-Shannon": GeneralizedJSDLoss(),
    "skew KL": SkewKLLoss(),
    "total variation": TotalVariationLoss(),
}


@cache
def text() -> Text:
    """The sources, with a tokenizer that is trained on them."""
    return load_text(VOCABULARY)


def gpt(width: int, depth: int) -> GPT:
    """A network with random weights."""
    return GPT(VOCABULARY, LENGTH, width, depth)


class Student(LanguageModel):
    """Logs the bits that it needs for a byte of validation text."""

    def __init__(self, size: tuple[int, int] = SMALL, lr: float = 5e-3) -> None:
        super().__init__(gpt(*size), lr)
        self.sizes = text().token_bytes

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        tokens, following = batch
        nats = F.cross_entropy(
            self.net(tokens).flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = int(self.sizes[following[following != IGNORED]].sum())  # weighs this batch in the mean
        self.log("bits_per_byte", nats / math.log(2) / count, batch_size=count)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Rows of the files to train on, in another order in each epoch, and rows of other files."""
    train, validation = text().train.windows(LENGTH, ROWS), text().test.windows(LENGTH, 300)
    shuffled = DataLoader(TensorDataset(*train), BATCH, shuffle=True, drop_last=True)
    return shuffled, DataLoader(TensorDataset(*validation), 50)


def divergences(epochs: int, folder: Path) -> dict[str, Any]:
    """One divergence for each method, on the tokens of the text."""
    teacher = trained_once(partial(Student, LARGE, 3e-3), loaders()[:1], 6, folder / "teacher.pt")
    terms = {name: SequenceDistillation(loss, weight=0.75, shift=False) for name, loss in DIVERGENCES.items()}
    dataset = loaders()[0].dataset
    outputs = TeacherCache.build(teacher, dataset, folder / "teacher cache", batch_size=50, progress=False)
    return {
        "module": Student,
        "data": loaders,
        "teacher": outputs,
        "student": "net",
        "methods": {name: {"terms": [term], "task_weight": 0.25} for name, term in terms.items()},
        "trainer": {**TRAINER, "max_epochs": epochs},
    }
