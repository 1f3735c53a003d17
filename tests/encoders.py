"""Encoders of Hugging Face with random weights in float64, batches for them, and the papers' formulas by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_distill import Distiller

KINDS = ("bert", "distilbert", "roberta", "vit", "gpt2")
TOKENS = 61
SELF = "bert.encoder.layer.{}.attention.self"


def encoder(
    kind: str = "bert", layers: int = 2, width: int = 8, heads: int = 2, seed: int = 0, **settings: Any
) -> nn.Module:
    """A model in training mode, without dropout, with attention maps."""
    torch.manual_seed(seed)
    settings = {"attn_implementation": "eager", **settings}
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": heads}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    common = {**sizes, **dropout, **settings}
    if kind == "vit":
        config: Any = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **common)
        model: Any = transformers.ViTForImageClassification(config)
    elif kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": TOKENS}
        config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "distilbert":
        sizes = {"dim": width, "hidden_dim": 16, "n_layers": layers, "n_heads": heads, "vocab_size": TOKENS}
        config = transformers.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0, **settings)
        model = transformers.DistilBertForSequenceClassification(config)
    elif kind == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=TOKENS, **common))
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=TOKENS, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)  # so that layers and attention maps differ
    double: nn.Module = model.double().train()
    return double


def batch(kind: str = "bert", seed: int = 0) -> dict[str, Tensor]:
    """The arguments of a model: images, or two sequences of five and three tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)}
    tokens = torch.randint(3, TOKENS, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": torch.where(mask.bool(), tokens, 1), "attention_mask": mask}


def counted(inputs: dict[str, Tensor], length: int) -> list[list[int]]:
    """The positions of each example that are not padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return [list(range(length))] * len(next(iter(inputs.values())))
    return [row.nonzero().flatten().tolist() for row in mask]


def mean_squared(student: Tensor, teacher: Tensor, positions: list[list[int]]) -> Tensor:
    """TinyBERT, equation 8: the mean squared difference of the tokens that count."""
    rows = [(n, i) for n, row in enumerate(positions) for i in row]
    return sum(((student[n, i] - teacher[n, i]) ** 2).mean() for n, i in rows) / len(rows)


def attention_divergence(student: Tensor, teacher: Tensor, positions: list[list[int]]) -> Tensor:
    """MobileBERT, equation 3: the KL of the rows of attention, over heads and the queries that count."""
    examples = []
    for n, row in enumerate(positions):
        values = []
        for head in range(student.shape[1]):
            for i in row:
                pairs = [(teacher[n, head, i, j], student[n, head, i, j]) for j in row]
                values.append(sum(p * (p.log() - q.log()) for p, q in pairs if p > 0))
        examples.append(torch.stack(values).mean())
    return torch.stack(examples).mean()


def attention_squares(student: Tensor, teacher: Tensor, positions: list[list[int]]) -> Tensor:
    """TinyBERT, equation 7, on the pairs of tokens that count."""
    examples = []
    for n, row in enumerate(positions):
        places = [(n, head, i, j) for head in range(student.shape[1]) for i in row for j in row]
        examples.append(torch.stack([(student[place] - teacher[place]) ** 2 for place in places]).mean())
    return torch.stack(examples).mean()


def relation_divergence(student: Tensor, teacher: Tensor, heads: int, positions: list[list[int]]) -> Tensor:
    """MiniLMv2, equations 5 to 8: the KL of the relations between the tokens that count, over relation heads."""
    examples = []
    for n, row in enumerate(positions):
        values: list[Tensor] = []
        for head in range(heads):
            logs = []
            for vectors in (student, teacher):
                size = vectors.shape[2] // heads
                part = vectors[n, row, head * size : (head + 1) * size]
                logs.append((part @ part.T / math.sqrt(size)).log_softmax(-1))
            values += [*(logs[1].exp() * (logs[1] - logs[0])).sum(-1)]
        examples.append(torch.stack(values).mean())
    return torch.stack(examples).mean()


class Layered(nn.Module):
    """A plain module that returns a dict with the features of all its layers, and needs no argument for it."""

    def __init__(self, width: int = 4, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(TOKENS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        hidden = [self.embedding(tokens)]
        maps = []
        for layer in self.layers:
            maps.append((hidden[-1] @ hidden[-1].mT).softmax(-1))  # (N, L, L)
            hidden.append(torch.tanh(layer(maps[-1] @ hidden[-1])))
        return {"logits": hidden[-1][:, 0], "hidden_states": tuple(hidden), "attentions": maps}


class Answers(nn.Module):
    """Returns stored hidden states."""

    def __init__(self, hidden: list[Tensor]) -> None:
        super().__init__()
        self.hidden = nn.ParameterList(nn.Parameter(tensor.clone()) for tensor in hidden)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden_states": tuple(tensor * 1 for tensor in self.hidden)}


def distilled(student: nn.Module, teacher: Any, term: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """The term's value and its copy that was trained; the gradients are on the student."""
    student.zero_grad()
    distiller = Distiller(student, teacher, term, task_weight=0, **settings)
    with distiller:
        with distiller.record(batch=inputs):
            student(**inputs)
        value = distiller.total(torch.zeros(()), inputs)
        value.backward()
    return value.detach(), distiller.terms[0]
