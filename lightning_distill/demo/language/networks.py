"""The demonstration's language models and their LightningModule, which do not depend on distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_distill.demo.language.text import IGNORED

HEADS = 4


class Block(nn.Module):
    """Causal attention and a perceptron, each on normalised inputs and added to them.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """States ``(B, T, C)`` of states ``(B, T, C)``."""
        projected = self.projections(self.attention_norm(states)).unflatten(-1, (3, HEADS, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
        states = states + self.merge(attended)
        added: Tensor = states + self.perceptron(self.perceptron_norm(states))
        return added


class GPT(nn.Module):
    """A causal transformer: logits ``(B, T, V)`` of tokens ``(B, T)``. Embedding and head share their weights.

    Args:
        vocabulary: Number of tokens.
        length: Largest number of tokens of a sequence.
        width: Number of channels.
        depth: Number of blocks.
    """

    def __init__(self, vocabulary: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.length = length
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token that follows each token."""
        positions = self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.lm_head(self.norm(self.blocks(self.embedding(tokens) + positions)))
        return logits


class LanguageModel(LightningModule):
    """A plain LightningModule without distillation.

    Args:
        net: Network from tokens to logits.
        lr: Highest learning rate.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean cross entropy of the next tokens, in nats."""
        tokens, following = batch
        return F.cross_entropy(self.net(tokens).flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@torch.no_grad()
def bits_per_byte(net: nn.Module, windows: tuple[Tensor, Tensor], token_bytes: Tensor, batch_size: int = 32) -> float:
    r"""Bits that a network in eval mode needs for a byte of text, which can be compared between tokenizers.

    .. math:: \frac{-\sum_t \log_2 p(x_t \mid x_{<t})}{\text{number of bytes}}

    The sum is over all labels; a token sees the earlier tokens of its window only.

    Args:
        net: The network.
        windows: Inputs and labels ``(rows, T)``.
        token_bytes: Number of bytes of each token ``(V,)``.
        batch_size: Number of rows at a time.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, tokens):
        ...         return torch.zeros(*tokens.shape, 4)
        >>> windows = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
        >>> bits = bits_per_byte(Uniform(), windows, torch.tensor([0, 1, 3, 1]))  # 4 bits, 4 bytes
        >>> round(bits, 3)
        1.0
    """
    nats, training = 0.0, net.training
    net.eval()
    for tokens, following in zip(*(torch.split(part, batch_size) for part in windows), strict=True):
        logits = net(tokens).flatten(0, 1)
        nats += float(F.cross_entropy(logits, following.flatten(), ignore_index=IGNORED, reduction="sum"))
    net.train(training)
    labels = windows[1][windows[1] != IGNORED]
    return nats / math.log(2) / int(token_bytes[labels].sum())


def written(net: GPT, input_ids: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
    """Rows of tokens, each followed by tokens that are drawn from the network's probabilities.

    Args:
        net: The network.
        input_ids: The rows, of equal lengths without padding, ``(B, P)``.
        max_new_tokens: Number of tokens to add.
        temperature: Softening of the probabilities.
    """
    for _ in range(max_new_tokens):
        logits = net(input_ids[:, -net.length :])[:, -1]
        input_ids = torch.cat([input_ids, torch.multinomial((logits / temperature).softmax(-1), 1)], 1)
    return input_ids


@torch.no_grad()
def continued(net: GPT, tokens: Tensor, count: int, generator: torch.Generator, temperature: float = 0.8) -> Tensor:
    """Tokens, followed by tokens that are drawn from the network's probabilities.

    Args:
        net: The network.
        tokens: The first tokens ``(T,)``.
        count: Number of tokens to add.
        generator: The source of randomness.
        temperature: Softening of the probabilities.
    """
    for _ in range(count):
        logits = net.eval()(tokens[None, -net.length :])[0, -1]
        tokens = torch.cat([tokens, torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)])
    return tokens
