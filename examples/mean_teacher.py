"""A student with few labels and its own moving average, a mean teacher: `python examples/mean_teacher.py`.

It prints the accuracy of a single run with 40 labels, in which the student gains little and its average nothing:

    student alone             83.1 %
    student with its average  84.4 %
    student's average         82.0 %
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import QUIET, accuracy, digits, show
from lightning.pytorch import LightningModule, Trainer, seed_everything
from networks import cnn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillCallback, EMATeacher, LogitsDistillation, SoftTargetLoss, schedules

LABELLED, NONE = 40, -100


class Classifier(LightningModule):
    """Knows nothing of distillation; the label -100 means none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross entropy of images with noise."""
        images, labels = batch
        logits = self.network(images + 0.2 * torch.randn_like(images))
        return F.cross_entropy(logits, labels, ignore_index=NONE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 20) -> dict[str, float]:
    """The student sees the images with noise, its average sees them without; images with a label come ten times."""
    training, test = digits()
    images, labels = training.dataset.tensors  # type: ignore[attr-defined]
    labels[LABELLED:] = NONE
    rows = torch.cat([torch.arange(LABELLED).repeat(9), torch.arange(len(images))])
    data = DataLoader(TensorDataset(images[rows], labels[rows]), 64, shuffle=True)
    scores = {}
    for name in ("alone", "with its average"):
        seed_everything(1, verbose=False)
        network = cnn(16)
        term = LogitsDistillation(SoftTargetLoss(temperature=1.0), weight=schedules.WarmUp(0.3, duration=0.3))
        teacher = EMATeacher(decay=0.98)
        distill = DistillCallback(teacher, term, student="network", teacher_inputs=0, validate=False)
        callbacks = [distill] if name != "alone" else []
        Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(Classifier(network), data)
        scores[f"student {name}"] = accuracy(network, test)
    scores["student's average"] = accuracy(teacher.network, test)
    return show("Mean teacher", scores)


if __name__ == "__main__":
    main()
