"""Pruning, then quantisation-aware training, both distilled: `python examples/prune_and_quantize.py`."""

from __future__ import annotations

import torch
from common import accuracy, digits, show, train
from compression import distil, fake_quantized, pruning, quantized, sparsity, student
from networks import cnn
from torch import nn


def main(epochs: int = 6) -> dict[str, float]:
    """A pruned student goes on in 8 bits; what was pruned stays 0."""
    training, test = digits()
    torch.manual_seed(0)
    teacher, network = train(cnn(24), training, epochs), student()
    distil(network, teacher, training, epochs, [pruning(network, 0.5, epochs)])
    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    gone = [layer.weight == 0 for layer in layers]
    for layer, zeros in zip(layers, gone, strict=True):
        layer.weight.register_hook(lambda gradient, zeros=zeros: gradient.masked_fill(zeros, 0.0))
    fake_quantized(network)
    distil(network, teacher, training, max(1, epochs // 2))
    pruned = sparsity(network)
    scores = {"teacher": accuracy(teacher, test), "student distilled": accuracy(network, test)}
    scores["student in 8 bits"] = accuracy(quantized(network).eval(), test)
    return show("Pruning and quantisation", {**scores, "share of weights that are 0": pruned})


if __name__ == "__main__":
    main()
