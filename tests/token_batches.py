"""Padded batches of tokens, small models of Hugging Face, and one step of distillation on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from token_nets import divergence
from torch import Tensor, nn

from lightning_distill import (
    Distiller,
    SequenceDistillation,
)

PAD, IGNORED = 0, -100
SEQUENCES = ([5, 3, 8, 2, 7], [4, 9], [6, 1, 1, 12])


def llama(width: int = 16, seed: int = 0, vocabulary: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).double()


def t5(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).double()


def bert(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertForMaskedLM(config).double()


def padded(sequences: Any = SEQUENCES, side: str = "right", labels: bool = True) -> dict[str, Tensor]:
    length = max(len(sequence) for sequence in sequences)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sequence in sequences:
        padding = length - len(sequence)
        for name, tokens, filler in (
            ("input_ids", list(sequence), PAD),
            ("attention_mask", [1] * len(sequence), 0),
            ("labels", list(sequence), IGNORED),
        ):
            filled = [filler] * padding
            rows[name].append(tokens + filled if side == "right" else filled + tokens)
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return batch if labels else {name: batch[name] for name in ("input_ids", "attention_mask")}


def distilled(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], term: Any = None, **settings: Any):
    """The term's value for a batch, and the student's gradients."""
    student.zero_grad()
    term = SequenceDistillation() if term is None else term
    with Distiller(student, teacher, term, task_weight=0, **settings) as distiller:
        with distiller.record():
            student(**batch)
        total = distiller.total(torch.zeros((), dtype=torch.float64), batch)
        if total.requires_grad:
            total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def by_sequence(student: nn.Module, teacher: nn.Module, sequences: Any = SEQUENCES) -> float:
    """Each sequence by itself and without padding, token by token."""
    values = []
    for sequence in sequences:
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            outputs = [network.eval()(input_ids=tokens)["logits"] for network in (student, teacher)]
        values += divergence(*outputs)[0, :-1].tolist()
    return sum(values) / len(values)
