"""Models of Hugging Face with random weights, batches for them, and the dense losses that others are compared to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 211
HEADS = {"bert": "cls.predictions.decoder"}
CAPPED = ("gemma2", "cohere", "granite", "litgpt", "capped")  # models that scale or cap their logits


class Capped(nn.Module):
    """In the manner of LitGPT: positional tokens in, plain logits out, capped."""

    def __init__(self, width: int, cap: float) -> None:
        super().__init__()
        self.embedding, self.cap = nn.Embedding(VOCABULARY, width), cap
        self.body = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        logits = self.lm_head(self.body(self.embedding(idx))[0])
        return torch.tanh(logits / self.cap) * self.cap


def language_model(name: str, width: int = 16, seed: int = 0, cap: float = 0.5, tied: bool = True) -> nn.Module:
    """A model in float64 and training mode, with weights so large that its logits differ."""
    import transformers

    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    causal = {**common, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any
    if name == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 32}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**causal))
    elif name == "gemma2":
        config = transformers.Gemma2Config(**causal, head_dim=8, final_logit_softcapping=cap)
        model = transformers.Gemma2ForCausalLM(config)
    elif name == "cohere":
        config = transformers.CohereConfig(**causal, **special, logit_scale=0.0625 * cap)
        model = transformers.CohereForCausalLM(config)
    elif name == "granite":
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**causal, logits_scaling=cap))
    elif name == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
    elif name == "bert":
        config = transformers.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertForMaskedLM(config)
        nn.init.normal_(model.cls.predictions.decoder.bias)
    elif name == "litgpt":
        pytest.importorskip(
            "litgpt.model", reason="litgpt is not installed: its bounds exclude the tested transformers"
        )
        from litgpt.config import Config
        from litgpt.model import GPT

        sizes = {"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": width}
        model = GPT(Config(block_size=32, **sizes, final_logit_softcapping=cap))
    else:
        model = Capped(width, cap)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.ndim > 1}.values():
            parameter.mul_(6)
    double: nn.Module = model.double().train()
    return double


def language_batch(name: str = "llama", number: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Keyword arguments of a model, and labels with a prompt that does not count."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(3, VOCABULARY, (2, 9 + number), generator=generator)
    labels = tokens.clone()
    labels[0, : 5 - number] = -100
    if name in ("litgpt", "capped"):
        return {"idx": tokens}, labels
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return ({**inputs, "decoder_input_ids": tokens.flip(1)} if name == "t5" else inputs), labels


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output."""
    logits: Tensor = output if isinstance(output, Tensor) else output["logits"]
    return logits


def dense_loss(
    student: nn.Module,
    teacher: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    *,
    shift: bool = True,
    reverse: bool = False,
    temperature: float = 2.0,
    weight: float = 0.7,
    task_weight: float = 0.3,
) -> Tensor:
    """The weighted sum of a divergence and the cross entropy from whole logits, written from the papers."""
    student_logits = logits_of(student(**inputs))
    with torch.no_grad():
        teacher_logits = logits_of(teacher(**inputs))
    if shift:
        student_logits, teacher_logits, labels = student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    student_logits, teacher_logits, labels = student_logits[counts], teacher_logits[counts], labels[counts]
    log_student = torch.log_softmax(student_logits / temperature, -1)
    log_teacher = torch.log_softmax(teacher_logits / temperature, -1)
    if reverse:
        divergence = (log_student.exp() * (log_student - log_teacher)).sum(-1).mean()
    else:
        divergence = temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    return weight * divergence + task_weight * F.cross_entropy(student_logits, labels)


def worst_gradient(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference of two models' gradients."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    assert [gradient is None for gradient, _ in pairs] == [gradient is None for _, gradient in pairs]
    return max(float((left - right).abs().max()) for left, right in pairs if left is not None)
