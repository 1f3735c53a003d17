"""Small tokenizers of several kinds, trained on files of the standard library."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from lightning_distill import CrossTokenizerDistillation
from lightning_distill.demo.language.text import source_files, train_tokenizer

TEXTS = ["def f(x):\n    return 'é字'", "import os\nx = [1, 2]", "y"]
_FILES = 4


@functools.cache
def texts() -> list[str]:
    """The beginnings of some files."""
    return [path.read_text("utf-8")[:20_000] for path in source_files()["train"][:_FILES]]


@functools.cache
def byte_level(vocabulary: int) -> Tokenizer:
    """A byte-pair tokenizer in the manner of GPT-2, with one special token, ``<end>``."""
    return train_tokenizer(texts(), vocabulary)


@functools.cache
def sentence_piece(vocabulary: int) -> Tokenizer:
    """In the manner of Llama 2: a space in front of the text, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for text in texts() for line in text.splitlines(keepends=True)], trainer)
    return tokenizer


@functools.cache
def lower_case() -> Tokenizer:
    """A tokenizer that changes the text, in the manner of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def of_transformers(tokenizer: Tokenizer, **settings: Any) -> Any:
    """The same tokenizer as the library transformers has it."""
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def cross_term(method: Any = "uld", **settings: Any) -> CrossTokenizerDistillation:
    """The term between two byte-level tokenizers, of 300 tokens and of 420."""
    return CrossTokenizerDistillation(byte_level(300), byte_level(420), method, **settings)


def padded_batch() -> dict[str, Tensor]:
    """The student's tokens of the texts, padded on the right."""
    rows = [encoded.ids for encoded in byte_level(300).encode_batch(TEXTS)]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": padded, "attention_mask": mask}
