"""Three specialists teach one student: `python examples/several_teachers.py`.

It prints the accuracy over three cameras. Teachers are sure of themselves where they know nothing, so their mean is of
little use; the student needs to know which teacher to ask:

    teacher of upright images      37.2 %
    teacher of negative images     37.9 %
    teacher of turned images       39.6 %
    student alone, 150 labels      69.6 %
    student with the mean of all   20.3 %
    student with each image's own  86.3 %
"""

from __future__ import annotations

from typing import Any

import torch
from common import QUIET, accuracy, digits, show, train
from lightning.pytorch import Trainer, seed_everything
from networks import cnn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillModule, LogitsDistillation, SoftTargetLoss

VIEWS = {  # a camera each: the digits as they are, negatives, and turned by a quarter
    "upright": lambda images: images,
    "negative": lambda images: 1 - images,
    "turned": lambda images: images.rot90(1, (2, 3)),
}
LABELLED = 50  # images of each camera


def views(images: Tensor) -> Tensor:
    """The images of all cameras, one camera after the other."""
    return torch.cat([view(images) for view in VIEWS.values()])


def main(epochs: int = 8) -> dict[str, float]:
    """Each teacher knows one camera. The student learns to see through all, without labels."""
    training, test = digits()
    x, y = training.dataset.tensors  # type: ignore[attr-defined]
    x_test, y_test = test.dataset.tensors  # type: ignore[attr-defined]
    everything = DataLoader(TensorDataset(views(x_test), y_test.repeat(3)), 256)
    teachers, scores = [], {}
    for name, view in VIEWS.items():
        seed_everything(0, verbose=False)
        teachers.append(train(cnn(24), DataLoader(TensorDataset(view(x), y), 32, shuffle=True), epochs))
        scores[f"teacher of {name} images"] = accuracy(teachers[-1], everything)

    seed_everything(1, verbose=False)
    few = TensorDataset(views(x[:LABELLED]), y[:LABELLED].repeat(3))
    many = epochs * len(x) // LABELLED  # as many steps as the others
    scores["student alone, 150 labels"] = accuracy(train(cnn(8), DataLoader(few, 64, shuffle=True), many), everything)

    data = TensorDataset(views(x), torch.arange(3).repeat_interleave(len(x)))
    settings: dict[str, dict[str, Any]] = {
        "the mean of all": {"mix": "probabilities"},
        "each image's own": {"route": 1},  # its place in the batch
    }
    for name, setting in settings.items():
        seed_everything(1, verbose=False)
        student = cnn(8)
        distill = DistillModule(
            student,
            teachers,
            LogitsDistillation(SoftTargetLoss(temperature=2.0)),
            task_weight=0,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
            **setting,
        )
        Trainer(max_epochs=epochs, **QUIET).fit(distill, DataLoader(data, 64, shuffle=True))
        scores[f"student with {name}"] = accuracy(student, everything)
    return show("Three specialists", scores)


if __name__ == "__main__":
    main()
