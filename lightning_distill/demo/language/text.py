"""The demonstration's text: Python's own standard library, split by file, and a byte-pair tokenizer trained on it."""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<end>"  # stands before the first file and after each file
IGNORED = -100  # cross entropy ignores this label
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """The text of some files.

    Args:
        names: Names of the files.
        tokens: Numbers of the tokens ``(N + 1,)``, of which the first is not predicted.
        size: Number of bytes of the files.
    """

    names: tuple[str, ...]
    tokens: Tensor
    size: int

    def windows(self, length: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and labels ``(rows, length)``: the label is the next token, and each token is a label once.

        Args:
            length: Number of tokens of a row. The labels of the last row are padded with :data:`IGNORED`.
            limit: Number of rows to keep, evenly spaced; ``None`` keeps all.

        Example:
            >>> Part(("a.py",), torch.tensor([0, 5, 6, 7]), 3).windows(2)
            (tensor([[0, 5],
                    [6, 0]]), tensor([[   5,    6],
                    [   7, -100]]))
        """
        count = len(self.tokens) - 1
        rows = math.ceil(count / length)
        padding = rows * length - count
        inputs = torch.nn.functional.pad(self.tokens[:-1], (0, padding)).view(rows, length)
        labels = torch.nn.functional.pad(self.tokens[1:], (0, padding), value=IGNORED).view(rows, length)
        if limit is None or limit >= rows:
            return inputs, labels
        kept = torch.arange(limit) * rows // limit
        return inputs[kept], labels[kept]


@dataclass(frozen=True)
class Text:
    """The tokenizer, and the three parts, which have no file in common.

    Args:
        tokenizer: The tokenizer.
        token_bytes: Number of bytes of each token ``(V,)``; 0 for :data:`END`.
        train: The text to learn from.
        validation: The text that chose the settings, and that the curves are measured on.
        test: The text of the table, used once.
    """

    tokenizer: Tokenizer
    token_bytes: Tensor
    train: Part
    validation: Part
    test: Part


def source_files(folder: Path | None = None) -> dict[str, list[Path]]:
    """The modules at the top of the standard library, by part and in alphabetical order.

    A checksum of its name decides the part of a file, so it is the same for every version of Python. Modules whose
    names begin with an underscore are left out.

    Args:
        folder: Folder of the modules; ``None`` is the one of the interpreter that runs this code.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in sorted(folder.glob("[!_]*.py")):
        parts[{0: "test", 1: "validation"}.get(zlib.crc32(path.name.encode()) % 20, "train")].append(path)
    return parts


def load_text(vocabulary: int, files: int | None = None) -> Text:
    """The standard library's sources as tokens.

    Args:
        vocabulary: Number of tokens, at least 257.
        files: Number of files of each part; ``None`` takes all.

    Raises:
        OSError: If a file of the standard library cannot be read.
    """
    paths = {part: members[:files] for part, members in source_files().items()}
    named = {part: [(path.name, path.read_text("utf-8")) for path in members] for part, members in paths.items()}
    tokenizer = train_tokenizer([text for _, text in named["train"]], vocabulary)
    parts = {part: encode(tokenizer, members) for part, members in named.items()}
    return Text(tokenizer, token_sizes(tokenizer), **parts)


def token_sizes(tokenizer: Tokenizer) -> Tensor:
    """Number of bytes of each token ``(V,)``: the tokenizer writes a byte as a character. 0 for :data:`END`."""
    numbers = tokenizer.get_vocab()
    return torch.tensor([0 if name == END else len(name) for name in sorted(numbers, key=numbers.__getitem__)])


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A tokenizer whose tokens are single bytes and the pairs that are most frequent in the texts.

    Args:
        texts: The texts.
        vocabulary: Number of tokens, at least 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, named: Sequence[tuple[str, str]]) -> Part:
    """The tokens of several files, with :data:`END` before the first and after each.

    Args:
        tokenizer: The tokenizer.
        named: Name and text of each file.
    """
    end = tokenizer.token_to_id(END)
    tokens = [end]
    for encoded in tokenizer.encode_batch([text for _, text in named]):
        tokens += [*encoded.ids, end]
    names, size = tuple(name for name, _ in named), sum(len(text.encode()) for _, text in named)
    return Part(names, torch.tensor(tokens), size)
