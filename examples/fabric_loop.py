"""Distiller under Lightning Fabric: `python examples/fabric_loop.py`.

It prints the accuracy after ten epochs: teacher 97 %, student alone 86 %, distilled 81 %, which is worse.
"""

from __future__ import annotations

import torch
from common import accuracy, digits, show, train
from lightning.fabric import Fabric
from networks import cnn
from torch import nn

from lightning_distill import Distiller, FeatureDistillation, LogitsDistillation


def main(epochs: int = 10) -> dict[str, float]:
    """As in the plain loop, with Fabric's device, precision and backward."""
    training, test = digits()
    torch.manual_seed(0)
    teacher, alone, network = train(cnn(24), training, epochs), train(cnn(3), training, epochs), cnn(3)
    fabric = Fabric(accelerator="cpu", devices=1)
    student, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(training)
    terms = [LogitsDistillation(weight=0.9), FeatureDistillation("4", "4", weight=1.0)]
    with Distiller(student, teacher, terms, task_weight=0.1) as distiller:
        distiller.follow(optimizer)
        for _ in range(epochs):
            for images, labels in loader:
                with distiller.record():
                    loss = nn.functional.cross_entropy(student(images), labels)
                optimizer.zero_grad()
                fabric.backward(distiller.total(loss, (images, labels)))
                optimizer.step()
    scores = {"teacher": accuracy(teacher, test), "student alone": accuracy(alone, test)}
    return show("Fabric", {**scores, "student distilled": accuracy(network, test)})


if __name__ == "__main__":
    main()
