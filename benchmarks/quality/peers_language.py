"""The programs of peers.py for language models: two small Llamas on the sources of Python's standard library.

Every program minimises the generalized Jensen-Shannon divergence (beta = 0.5) between the student's and the teacher's
distributions of the next token, on the text alone, with AdamW.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, LENGTH, BATCH, EPOCHS, LR, BETA = 800, 96, 16, 2, 5e-3, 0.5
LARGE, SMALL = (96, 3), (32, 2)  # width and depth
TEACHER = Path(__file__).parent / "results" / "peers" / "teacher_language.pt"
Model = Any


def llama(width: int, depth: int) -> Model:
    """A model of Hugging Face with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.quality.text import VOCABULARY

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def plain_pytorch(student: Model, teacher: Model, rows: Any) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    optimizer = torch.optim.AdamW(student.parameters(), LR, weight_decay=0.0)
    teacher.eval()
    student.train()
    for _ in range(EPOCHS):
        for batch in DataLoader(rows, BATCH, shuffle=True):
            with torch.no_grad():
                q = F.log_softmax(teacher(batch["input_ids"]).logits[:, :-1], -1)
            p = F.log_softmax(student(batch["input_ids"]).logits[:, :-1], -1)
            mixture = torch.logaddexp(p, q) - math.log(2)
            both = [F.kl_div(mixture, each, reduction="none", log_target=True).sum(-1).mean() for each in (p, q)]
            loss = 0.5 * both[0] + 0.5 * both[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def lightning_distill(student: Model, teacher: Model, rows: Any) -> None:
    import torch
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from lightning_distill import CausalLMDistillModule, GeneralizedJSDLoss, SequenceDistillation

    module = CausalLMDistillModule(
        student,
        teacher,
        SequenceDistillation(GeneralizedJSDLoss(beta=BETA)),
        task_weight=0.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, LR, weight_decay=0.0),
    )
    Trainer(max_epochs=EPOCHS, accelerator="cpu").fit(module, DataLoader(rows, BATCH, shuffle=True))


def trl(student: Model, teacher: Model, rows: Any) -> None:
    import pyarrow
    from datasets import Dataset
    from torch.utils.data import default_collate
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from benchmarks.quality.text import text

    config = GKDConfig(
        output_dir=str(TEACHER.parent / "trl"),
        lmbda=0.0,
        beta=BETA,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text().tokenizer, pad_token="<end>", eos_token="<end>")
    table = pyarrow.Table.from_pylist([{name: part.tolist() for name, part in row.items()} for row in rows])
    GKDTrainer(
        student,
        teacher,
        config,
        data_collator=default_collate,
        train_dataset=Dataset(table, fingerprint="rows").with_format("torch"),
        processing_class=tokenizer,
    ).train()


LANGUAGE = "language"
PEERS: dict[str, tuple[Callable[[Model, Model, Any], None], str, str]] = {
    "text: a loop in plain PyTorch": (plain_pytorch, LANGUAGE, "torch"),
    "text: lightning_distill, CausalLMDistillModule": (lightning_distill, LANGUAGE, "lightning-distill"),
    "text: TRL, GKDTrainer": (trl, LANGUAGE, "trl"),
}


def rows() -> Any:
    """The text that is learnt from: dicts with ``input_ids``, ``attention_mask`` and ``labels``."""
    import torch

    from benchmarks.quality.text import text

    tokens = text().train.windows(LENGTH, ROWS)[0]
    labels = tokens.clone()
    labels[:, 0] = -100  # nothing predicts the first token of a row
    parts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return [dict(zip(parts, entries, strict=True)) for entries in zip(*parts.values(), strict=True)]


def bits_per_byte(model: Model) -> float:
    """The bits that a model needs for a byte of other files."""
    import torch.nn as nn

    from benchmarks.quality.text import text
    from lightning_distill.demo.language import networks

    class Logits(nn.Module):
        def forward(self, tokens: Any) -> Any:
            return model(tokens).logits

    model.eval()
    return networks.bits_per_byte(Logits(), text().test.windows(LENGTH, 300), text().token_bytes)


def trained_teacher() -> Model:
    """The teacher: trained on the text once with seed 0, then read from its file."""
    import torch
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    teacher = llama(*LARGE)
    if TEACHER.exists():
        teacher.load_state_dict(torch.load(TEACHER, weights_only=True))
        return teacher
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3)
    for _ in range(4):
        for batch in DataLoader(rows(), BATCH, shuffle=True):
            loss = teacher(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    TEACHER.parent.mkdir(parents=True, exist_ok=True)
    torch.save(teacher.state_dict(), TEACHER)
    return teacher


def measured(program: Callable[[Model, Model, Any], None], seed: int) -> tuple[float, float]:
    """Bits per byte of a student, and seconds of the processor for its training."""
    import torch

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    for _ in range(2):
        teacher, examples = trained_teacher(), rows()
        torch.manual_seed(seed)
        student = llama(*SMALL)
        start = time.process_time()
        program(student, teacher, examples)
        seconds = time.process_time() - start
    return bits_per_byte(student), seconds
