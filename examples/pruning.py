"""Distillation while Lightning's ModelPruning takes weights away: `python examples/pruning.py`.

It prints the accuracy: teacher 96 %, student with half of its weights 72 %.
"""

from __future__ import annotations

import torch
from common import accuracy, digits, show, train
from compression import distil, pruning, sparsity, student
from networks import cnn


def main(epochs: int = 6) -> dict[str, float]:
    """Remove half of the weights; the teacher helps the others."""
    training, test = digits()
    torch.manual_seed(0)
    teacher, network = train(cnn(24), training, epochs), student()
    distil(network, teacher, training, epochs, [pruning(network, 0.5, epochs)])
    scores = {"teacher": accuracy(teacher, test), "student distilled": accuracy(network, test)}
    return show("Pruning", {**scores, "share of weights that are 0": sparsity(network)})


if __name__ == "__main__":
    main()
