"""A GPT that returns plain logits, in the manner of LitGPT, and a cache: `python examples/litgpt_style.py`.

It prints how often the next byte of Python code is the likeliest: teacher 33 %, student alone 31 %, distilled 31 %,
from a cache 32 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from common import QUIET, accuracy, show, sources
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_distill import DistillCallback, SequenceDistillation, TeacherCache

BYTES, LENGTH = 128, 64


class GPT(nn.Module):
    """Logits (B, T, 128) of bytes (B, T); no labels go in, and no loss comes out."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(BYTES, width), nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.lm_head = nn.Linear(width, BYTES, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.wte(tokens) + self.wpe.weight, self.mask, is_causal=True))


class LanguageModel(LightningModule):
    """A step as in LitGPT: the labels are the inputs, shifted by the data set."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, targets = batch
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(model: GPT, loader: Any, epochs: int, callbacks: Sequence[Callback] = ()) -> GPT:
    """The model after a training by Lightning; the module is the same with a callback and without."""
    trainer = Trainer(max_epochs=epochs, callbacks=[*callbacks], **QUIET)
    trainer.fit(LanguageModel(model), loader)
    return model.eval()


def main(epochs: int = 3) -> dict[str, float]:
    """The teacher beside the student, and its eight likeliest bytes from a cache."""
    data, training, test = sources(LENGTH)
    torch.manual_seed(0)
    teacher = fit(GPT(64, 2), training, epochs)
    # shift=False: the labels stand where the next byte is predicted
    terms = [SequenceDistillation(weight=0.5, shift=False)]
    results = {"teacher": accuracy(teacher, test)}
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.build(teacher, data, folder, top_k=8, progress=False)
        for name, source in (("alone", None), ("distilled", teacher), ("distilled from a cache", cache)):
            torch.manual_seed(1)
            callbacks = [] if source is None else [DistillCallback(source, terms, task_weight=0.5)]
            results[f"student {name}"] = accuracy(fit(GPT(32, 1), training, epochs, callbacks), test)
    return show("The next byte of Python code", results)


if __name__ == "__main__":
    main()
