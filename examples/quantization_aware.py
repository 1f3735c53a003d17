"""Distillation during quantisation-aware training, with torchao: `python examples/quantization_aware.py`.

It prints the accuracy: teacher 96 %, student 70 %, and 70 % in 8 bits.
"""

from __future__ import annotations

import torch
from common import accuracy, digits, show, train
from compression import distil, fake_quantized, quantized, student
from networks import cnn


def main(epochs: int = 6) -> dict[str, float]:
    """The student learns with its linear layers as they will be in 8 bits."""
    training, test = digits()
    torch.manual_seed(0)
    teacher = train(cnn(24), training, epochs)
    network = fake_quantized(student())
    distil(network, teacher, training, epochs)
    trained = accuracy(network, test)
    scores = {"teacher": accuracy(teacher, test), "student distilled": trained}
    return show("Quantisation-aware", {**scores, "student in 8 bits": accuracy(quantized(network).eval(), test)})


if __name__ == "__main__":
    main()
