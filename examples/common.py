"""Small real data sets that need no download, and functions that the recipes share."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from tables import show as show
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MODULES = ("argparse", "fractions", "ipaddress", "calendar")
WORDS, LENGTH = 400, 16
DOCUMENTED = (
    "argparse", "ast", "asyncio.events", "bdb", "calendar", "cmd", "codecs", "configparser", "datetime", "decimal",
    "difflib", "doctest", "email.message", "filecmp", "fractions", "ftplib", "gzip", "http.client", "http.cookiejar",
    "imaplib", "inspect", "ipaddress", "logging", "mailbox", "optparse", "pathlib", "pdb", "pickletools", "plistlib",
    "pydoc", "random", "sched", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "tarfile",
    "tempfile", "threading", "trace", "traceback", "typing", "unittest.case", "urllib.request", "uuid", "zipfile",
)  # fmt: skip
PAIR_WORDS = 1500
LETTERS, BANDS, FRAMES, LONGEST = "abcdefghijklmnopqrstuvwxyz", 16, 32, 8
# Settings of a Trainer that writes and prints nothing.
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def digits(batch_size: int = 32) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Handwritten digits: images (N, 1, 8, 8) and labels, to train and to test."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return _split(images, torch.from_numpy(data.target).long(), batch_size)


def lines(batch_size: int = 32) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Lines of Python's standard library: word numbers (N, 16), padded with 0, and the module of each line."""
    texts = [(re.findall(r"[A-Za-z]+", line), label) for label, name in enumerate(MODULES) for line in _source(name)]
    texts = [(words, label) for words, label in texts if len(words) >= 3]
    common = Counter(word for words, _ in texts for word in words).most_common(WORDS - 2)
    numbers = {word: index + 2 for index, (word, _) in enumerate(common)}
    rows = [[numbers.get(word, 1) for word in words[:LENGTH]] for words, _ in texts]
    return _split(_padded(rows), torch.tensor([label for _, label in texts]), batch_size)


def questions(batch_size: int = 32) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Lines with one call in them, as numbers of tokens (N, 16); the answer is the span of its arguments (N, 2)."""
    calls = []
    for name in MODULES:
        for line in _source(name):
            tokens = re.findall(r"\w+|[()]", line)[:LENGTH]
            if tokens.count("(") == tokens.count(")") == 1 and tokens.index(")") > tokens.index("(") + 1:
                calls.append((tokens, tokens.index("(") + 1, tokens.index(")") - 1))
    common = Counter(token for tokens, _, _ in calls for token in tokens).most_common(WORDS - 2)
    numbers = {token: index + 2 for index, (token, _) in enumerate(common)}
    rows = [[numbers.get(token, 1) for token in tokens] for tokens, _, _ in calls]
    return _split(_padded(rows), torch.tensor([(start, end) for _, start, end in calls]), batch_size)


def sources(length: int = 64, batch_size: int = 16) -> tuple[TensorDataset, DataLoader[Any], DataLoader[Any]]:
    """Code as bytes: inputs (N, length) and the bytes that follow each; rows, their loader, and another module's."""
    rows = []
    for names in (MODULES[2:3], MODULES[3:]):
        code = "\n".join(line for name in names for line in _source(name)).encode("ascii", "replace")
        numbers = torch.tensor([*code])
        count = (len(numbers) - 1) // length
        rows.append(TensorDataset(*(numbers[start:][: count * length].view(count, length) for start in (0, 1))))
    generator = torch.Generator().manual_seed(0)
    return rows[0], DataLoader(rows[0], batch_size, shuffle=True, generator=generator), DataLoader(rows[1], 64)


def docstrings(batch_size: int = 50) -> tuple[DataLoader[Any], Tensor]:
    """Pairs (N, 2, 16) of the words of a function's docstring and of its code: a loader, and those to test."""
    pairs = []
    for name in DOCUMENTED:
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(name)))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
                code = " ".join(ast.unparse(part) for part in node.body[1:])
                pairs.append([re.findall("[a-z]+", text.split("\n\n")[0].lower()), re.findall("[a-z]+", code.lower())])
    pairs = [pair for pair in pairs if min(map(len, pair)) >= 4]
    common = Counter(word for pair in pairs for words in pair for word in words).most_common(PAIR_WORDS - 2)
    numbers = {word: index + 2 for index, (word, _) in enumerate(common)}
    rows = [[numbers.get(word, 1) for word in words[:16]] for pair in pairs for words in pair]
    data = torch.tensor([row + [0] * (16 - len(row)) for row in rows]).unflatten(0, (-1, 2))
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data[300:], batch_size, shuffle=True, drop_last=True, generator=generator), data[:300]


def recordings() -> tuple[TensorDataset, TensorDataset]:
    """Spectra (N, 32, 16) of words, their letters (N, 8) from 1, and numbers of frames (N,), to train and to test.

    A letter lasts 2 to 4 frames and sounds like the one after it in the last; all frames have noise.
    """
    code = " ".join(inspect.getsource(importlib.import_module(name)) for name in DOCUMENTED[:8])
    words = sorted(set(re.findall(rf"\b[a-z]{{3,{LONGEST}}}\b", code)))
    generator = torch.Generator().manual_seed(0)
    sounds = torch.randn(len(LETTERS), BANDS, generator=generator)
    spectra = torch.zeros(len(words), FRAMES, BANDS)
    letters, lengths = torch.zeros(len(words), LONGEST, dtype=torch.long), torch.zeros(len(words), dtype=torch.long)
    for row, word in enumerate(words):
        numbers = torch.tensor([LETTERS.index(letter) for letter in word])
        frames = numbers.repeat_interleave(torch.randint(2, 5, (len(word),), generator=generator))
        clear = 0.6 * sounds[frames] + 0.4 * sounds[frames.roll(-1)]
        spectra[row, : len(frames)] = clear + 0.8 * torch.randn(clear.shape, generator=generator)
        letters[row, : len(word)], lengths[row] = numbers + 1, len(frames)
    halves = [TensorDataset(*(part[start::2] for part in (spectra, letters, lengths))) for start in (0, 1)]
    return halves[0], halves[1]


def train(
    model: nn.Module, loader: Iterable[Any], epochs: int, loss: Callable[..., Tensor] = nn.functional.cross_entropy
) -> nn.Module:
    """The model after a plain training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(logits(model(x)), y).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Any]) -> float:
    """The share of right answers."""
    training = model.training
    model.eval()
    right = torch.cat([logits(model(x)).argmax(-1) == y for x, y in loader])
    model.train(training)
    return float(right.float().mean())


def logits(output: Any) -> Tensor:
    """The logits in the output of a model, with or without an attribute ``logits``."""
    scores: Tensor = getattr(output, "logits", output)
    return scores


def _source(name: str) -> list[str]:
    """The lines of a module's code, without its docstrings and comments."""
    return ast.unparse(ast.parse(inspect.getsource(importlib.import_module(name)))).splitlines()


def _padded(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def _split(x: Tensor, y: Tensor, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, rest = order[: len(x) // 4], order[len(x) // 4 :]
    generator = torch.Generator().manual_seed(0)
    training = DataLoader(TensorDataset(x[rest], y[rest]), batch_size, shuffle=True, generator=generator)
    return training, DataLoader(TensorDataset(x[test], y[test]), 256)
