"""The networks of the recipes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from common import BANDS, LENGTH, LETTERS, MODULES, PAIR_WORDS, WORDS
from torch import Tensor, nn


def cnn(width: int) -> nn.Sequential:
    """A convolutional network for the digits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


class ViT(nn.Module):
    """A small vision transformer for the digits, with one or more class tokens before its 16 patches."""

    def __init__(self, width: int = 32, layers: int = 2, class_tokens: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.tokens = nn.Parameter(torch.randn(1, class_tokens, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, class_tokens + 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (N, L, C), those of the classes first."""
        patches = self.patches(images).flatten(2).mT
        tokens: Tensor = self.layers(torch.cat([self.tokens.expand(len(images), -1, -1), patches], 1) + self.places)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(images)[:, 0])


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ResNet(nn.Module):
    """A small residual network: ``layer1``, ``layer2``, each of some blocks."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.layer1 = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.layer2 = nn.Sequential(*(Residual(2 * width) for _ in range(blocks)))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.down(self.layer1(self.stem(x))))
        return self.head(x.mean((2, 3)))


class MultiExit(nn.Module):
    """A network with a classifier after each stage; the deepest is its answer."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU())
        # each shallow stage is weighted by an attention map of its own
        self.attention1 = nn.Sequential(nn.Conv2d(width, 1, 3, padding=1), nn.Sigmoid())
        self.exit1 = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
        self.exit2 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
        self.exit3 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.stage1(x)
        second = self.stage2(first)
        return self.exit3(self.stage3(second)), self.exit2(second), self.exit1(first * self.attention1(first))


def bert() -> nn.Module:
    """A small BERT encoder with a classifier, from a configuration: no weights are loaded."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_sizes(), num_labels=len(MODULES)))


class BiLSTM(nn.Module):
    """Embedding, an LSTM in both directions, a classifier."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(MODULES))

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.words(tokens))
        return self.head(states.amax(1))


class BlendCNN(nn.Module):
    """Embedding, convolutions one after the other of which all are pooled and blended, a classifier."""

    def __init__(self, width: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(layers * width, width), nn.ReLU(), nn.Linear(width, len(MODULES)))

    def forward(self, tokens: Tensor) -> Tensor:
        x, pooled = self.words(tokens).transpose(1, 2), []
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
            pooled.append(x.amax(2))
        return self.head(torch.cat(pooled, 1))


class Encoder(nn.Module):
    """Scores (N, N) of each docstring for the code of every function in the batch, its own first."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(PAIR_WORDS, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))
        self.pooled = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, width): the mean over the words."""
        padding = tokens == 0
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        means = x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        embeddings: Tensor = self.pooled(means)
        return embeddings

    def forward(self, pairs: Tensor) -> Tensor:
        """Scores for pairs (N, 2, L) of a docstring and its function's code."""
        queries, codes = F.normalize(self.embed(pairs.flatten(0, 1)), dim=-1).unflatten(0, (-1, 2)).unbind(1)
        others = torch.arange(len(pairs))
        return (self.scale * queries @ codes.T).gather(1, (others[:, None] + others) % len(pairs))


class QuestionAnswering(nn.Module):
    """A DistilBERT encoder whose head scores each token as the start and as the end of the answer."""

    def __init__(self, width: int, layers: int) -> None:
        from transformers import DistilBertConfig, DistilBertForQuestionAnswering

        super().__init__()
        sizes: dict[str, Any] = {"dim": width, "hidden_dim": 2 * width, "n_layers": layers, "n_heads": 4}
        config = DistilBertConfig(
            vocab_size=WORDS, max_position_embeddings=LENGTH, dropout=0.0, qa_dropout=0.0, **sizes
        )
        self.encoder = DistilBertForQuestionAnswering(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, 2, L): of the start, of the end."""
        output = self.encoder(tokens, attention_mask=(tokens > 0).long())
        return torch.stack([output.start_logits, output.end_logits], 1)


class Recogniser(nn.Module):
    """Scores (N, T, 27) of the letters at each frame, the blank first."""

    def __init__(self, width: int, layers: int, streaming: bool) -> None:
        super().__init__()
        self.layers = nn.GRU(BANDS, width, layers, batch_first=True, bidirectional=not streaming)
        self.head = nn.Linear(width if streaming else 2 * width, len(LETTERS) + 1)

    def forward(self, spectra: Tensor) -> Tensor:
        """The scores."""
        scores: Tensor = self.head(self.layers(spectra)[0])
        return scores


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": LENGTH,
        "hidden_dropout_prob": 0.1,
    }
