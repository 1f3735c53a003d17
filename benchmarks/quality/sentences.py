"""A sentence encoder that finds the code of a docstring, and a student of it with one of its layers."""

from __future__ import annotations

import ast
import copy
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.classifier import TRAINER, trained_once
from lightning_distill import FeatureDistillation, ListwiseKLLoss, LogitsDistillation

PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib", "networkx", "sympy")
WORDS, LENGTH, WIDTH, BATCH = 5000, 24, 64, 64
LAYERS = 4  # of the teacher
PADDING, RARE = 0, 1  # numbers of tokens


def documented(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The words of the first paragraph of each docstring in a file, and those of the code below it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)) and node.body[1:]:
            code = " ".join(ast.unparse(part) for part in node.body[1:])
            words = [re.findall("[a-z]+", part.lower()) for part in (text.split("\n\n")[0], code)]
            if min(map(len, words)) >= 4:
                yield words[0], words[1]


def sources() -> Iterator[tuple[str, Path]]:
    """The modules of the standard library and of the packages, by name; their tests are left out."""
    installed = Path(sysconfig.get_path("purelib"))
    roots = {"": Path(sysconfig.get_path("stdlib")), **{f"{name}/": installed / name for name in PACKAGES}}
    for name, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root)
            if not {"test", "tests", "lib2to3", "idlelib", "site-packages"} & set(place.parts):
                yield name + place.as_posix(), path


@cache
def pairs() -> tuple[Tensor, Tensor]:
    """Tokens ``(N, 2, 24)`` of docstrings and code: to train on, and those of other files.

    A checksum of its name decides the part of a file.
    """
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    for name, path in sources():
        part = parts[zlib.crc32(name.encode()) % 32 == 0]
        part.extend(words[:LENGTH] for pair in documented(path) for words in pair)
    common = Counter(word for words in parts[0] for word in words).most_common(WORDS - 2)
    numbers = {word: place for place, (word, _) in enumerate(common, start=2)}
    tokens = [
        [[numbers.get(word, RARE) for word in words] + [PADDING] * (LENGTH - len(words)) for words in part]
        for part in parts
    ]
    train, test = (torch.tensor(part).unflatten(0, (-1, 2)) for part in tokens)
    return train, test


class Encoder(nn.Module):
    """Scores ``(N, N)`` of each docstring for the code of every function in the batch, its own first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=PADDING)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))
        self.pooled = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(N, 64)`` of length 1: the mean over the words."""
        padding = tokens == PADDING
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        means = x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return F.normalize(self.pooled(means), dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """The scores of pairs ``(N, 2, 24)`` of a docstring and its code."""
        docstrings, codes = self.embed(tokens.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        own = torch.arange(len(tokens))
        return (self.scale * docstrings @ codes.T).gather(1, (own[:, None] + own) % len(tokens))


class Retriever(LightningModule):
    """Learns which code belongs to a docstring; ``rank`` is the mean of 1 / (place of the right code of all)."""

    def __init__(self, layers: int, teacher: Encoder | None = None) -> None:
        super().__init__()
        self.net = Encoder(layers)
        if teacher is not None:  # layer reduction: the student begins as the teacher's first layers
            self.net.load_state_dict(copy.deepcopy(teacher.state_dict()), strict=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        scores = self.net(batch[0])
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        scores = self.net(batch[0])
        places = 1 + (scores > scores[:, :1]).sum(1)
        self.log("rank", (1 / places).mean(), batch_size=len(places))
        self.log("accuracy", (places == 1).float().mean(), batch_size=len(places))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Shuffled pairs for training, and all pairs of the test in one batch: each docstring has all of them to choose."""
    train, test = (TensorDataset(part) for part in pairs())
    return DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(test, len(test))


def layer_reduction(epochs: int, folder: Path) -> dict[str, Any]:
    """The student learns the teacher's ranking of the batch, its embeddings, or both."""
    teacher = trained_once(partial(Retriever, LAYERS), loaders()[:1], 8, folder / "teacher.pt")
    ranking, embeddings = LogitsDistillation(ListwiseKLLoss()), FeatureDistillation("pooled", "pooled", "cosine")
    return {
        "module": partial(Retriever, 1, teacher),
        "data": loaders,
        "teacher": teacher,
        "student": "net",
        "methods": {
            "ranking": {"terms": [ranking]},
            "embeddings": {"terms": [embeddings]},
            "both, and no labels": {"terms": [ranking, embeddings], "task_weight": 0.0},
        },
        "trainer": {**TRAINER, "max_epochs": epochs, "check_val_every_n_epoch": epochs},
    }


def of_first_layer(folder: Path) -> dict[str, float]:
    """The rank of the teacher's first layer, which every student begins as."""
    teacher = trained_once(partial(Retriever, LAYERS), (), 0, folder / "teacher.pt")
    assert isinstance(teacher, Encoder)
    with torch.no_grad():
        scores = Retriever(1, teacher).net.eval()(pairs()[1])
    rank = (1 / (1 + (scores > scores[:, :1]).sum(1))).mean()
    return {"the teacher's first layer, not trained further": float(rank)}
