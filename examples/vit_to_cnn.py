"""A vision transformer teaches a convolutional network without labels: `python examples/vit_to_cnn.py`.

It prints the accuracy on handwritten digits:

    teacher, all labels                                93.5 %
    student, untrained maps, 50 labels                 69.3 %
    student, maps distilled without labels, 50 labels  83.7 %
    student alone, all of it trained, 50 labels        83.3 %
"""

from __future__ import annotations

import copy

import torch
from common import QUIET, accuracy, digits, show, train
from lightning.pytorch import Trainer, seed_everything
from networks import ViT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillModule, FeatureDistillation

LABELLED = 50


def network() -> nn.Sequential:
    """A convolutional network with maps of 4 x 4 positions."""
    maps = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    )
    return nn.Sequential(maps, nn.Flatten(), nn.Linear(256, 10))


def probed(student: nn.Sequential, few: DataLoader[tuple[Tensor, ...]], epochs: int) -> nn.Module:
    """The network with frozen maps, after the training of its linear layer."""
    student[0].requires_grad_(False)
    return train(student, few, epochs)


def main(epochs: int = 10) -> dict[str, float]:
    """The student learns the teacher's tokens of all images, and its linear layer 50 labels."""
    training, test = digits()
    images, labels = training.dataset.tensors  # type: ignore[attr-defined]
    few = DataLoader(TensorDataset(images[:LABELLED], labels[:LABELLED]), 10, shuffle=True)
    seed_everything(0, verbose=False)
    teacher = train(ViT(), training, epochs)

    seed_everything(1, verbose=False)
    student = network()
    untrained, alone = copy.deepcopy(student), copy.deepcopy(student)
    distill = DistillModule(
        student,
        teacher,
        FeatureDistillation("0", "layers", "cosine"),  # 16 patches become a map, the class token is left out
        task_weight=0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    Trainer(max_epochs=2 * epochs, **QUIET).fit(distill, DataLoader(images, 32, shuffle=True))
    scores = {"teacher, all labels": accuracy(teacher, test)}
    for name, probe in (("untrained maps", untrained), ("maps distilled without labels", student)):
        scores[f"student, {name}, 50 labels"] = accuracy(probed(probe, few, 10 * epochs), test)
    scores["student alone, all of it trained, 50 labels"] = accuracy(train(alone, few, 10 * epochs), test)
    return show("Tokens to maps", scores)


if __name__ == "__main__":
    main()
