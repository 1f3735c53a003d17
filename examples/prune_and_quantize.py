"""Pruning and quantisation-aware training in one distilled run: `python examples/prune_and_quantize.py`.

It prints the accuracy: teacher 96 %, student with half of its weights 71 %, and 71 % in 8 bits.
"""

from __future__ import annotations

import torch
from common import accuracy, digits, show, train
from compression import distil, fake_quantized, pruning, quantized, sparsity, student
from networks import cnn


def main(epochs: int = 6) -> dict[str, float]:
    """Half of the weights go while the rest learns to be 8 bits wide; the teacher helps with both."""
    training, test = digits()
    torch.manual_seed(0)
    teacher, network = train(cnn(24), training, epochs), fake_quantized(student())
    distil(network, teacher, training, epochs, [pruning(network, 0.5, epochs)])
    pruned = sparsity(network)
    scores = {"teacher": accuracy(teacher, test), "student distilled": accuracy(network, test)}
    scores["student in 8 bits"] = accuracy(quantized(network).eval(), test)
    return show("Pruning and quantisation", {**scores, "share of weights that are 0": pruned})


if __name__ == "__main__":
    main()
