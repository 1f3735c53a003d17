"""Two Llamas of transformers, without their logits: `python examples/huggingface_language_model.py`.

It prints how often the next byte of Python code is the likeliest: teacher 40 %, student alone 38 %, distilled 39 %.
"""

from __future__ import annotations

from typing import Any

import torch
from common import QUIET, show, sources
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_distill import CausalLMDistillModule

BYTES, LENGTH = 128, 64


def llama(width: int, depth: int) -> nn.Module:
    """A model with random weights; `AutoModelForCausalLM.from_pretrained` takes its place in earnest."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return AutoModelForCausalLM.from_config(config)


def as_dict(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as the models of transformers take it; they shift the labels, so the inputs are the labels too."""
    tokens = torch.stack([inputs for inputs, _ in rows])
    return {"input_ids": tokens, "labels": tokens}


def pretrained(model: nn.Module, loader: Any, epochs: int) -> nn.Module:
    """The model after a plain training on its own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    """The share of next bytes that the model predicts."""
    right = [model.eval()(input_ids=tokens).logits.argmax(-1) == following for tokens, following in loader]
    return float(torch.cat(right).float().mean())


def main(epochs: int = 3) -> dict[str, float]:
    """By default the module skips both heads and makes divergence and cross entropy a few tokens at a time."""
    rows, _, test = sources(LENGTH)
    generator = torch.Generator().manual_seed(0)
    training = DataLoader(rows, 16, shuffle=True, generator=generator, collate_fn=as_dict)
    torch.manual_seed(0)
    teacher, small = pretrained(llama(64, 2), training, epochs), llama(32, 1).state_dict()
    alone, student = llama(32, 1), llama(32, 1)
    alone.load_state_dict(small)
    student.load_state_dict(small)
    pretrained(alone, training, epochs)
    optimizer: Any = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)  # noqa: E731
    module = CausalLMDistillModule(student, teacher, task_weight=1.0, optimizer=optimizer)
    Trainer(max_epochs=epochs, **QUIET).fit(module, training)
    results = {"teacher": accuracy(teacher, test), "student alone": accuracy(alone, test)}
    return show("The next byte of Python code", {**results, "student distilled": accuracy(student, test)})


if __name__ == "__main__":
    main()
