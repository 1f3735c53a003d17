"""A detector learns from a larger one: its feature pyramid, and its features through the teacher's head.

`python examples/detection.py` takes a minute on one core and prints the average precision at an overlap of 0.5:

    teacher                             47.5 %
    student alone                        2.6 %
    student with the teacher's pyramid   9.0 %
    student through the teacher's head   4.8 %
"""

from __future__ import annotations

from typing import Any

import torch
from common import QUIET, show
from drawn_scenes import Detector, average_precision, detection_loss, draw, loader
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_distill import CrossHeadDistillation, DistillCallback, FeatureDistillation, FocalGlobalLoss, Tap


class Detection(LightningModule):
    """A detector and its own loss on the boxes of a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Detector(width)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return detection_loss(self.net(batch["images"]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(width: int, scenes: list[Any], epochs: int, *callbacks: DistillCallback) -> Detection:
    """A trained detector."""
    torch.manual_seed(0)
    module = Detection(width)
    trainer = Trainer(max_epochs=epochs, callbacks=[*callbacks], **QUIET)
    trainer.fit(module, loader(scenes))
    return module.eval()


def main(epochs: int = 15) -> dict[str, float]:
    """The teacher sees four times as many scenes."""
    scenes, test = draw(600, seed=0), loader(draw(100, seed=1), shuffle=False)
    teacher = fit(32, scenes, epochs)
    pyramid = Tap("neck", output="*")  # both levels, each through an adapter
    into_head = Tap("head", output="*", where="input")
    terms = {
        "with the teacher's pyramid": FeatureDistillation(
            pyramid, pyramid, FocalGlobalLoss(), weight=10.0, boxes="boxes"
        ),
        "through the teacher's head": CrossHeadDistillation(into_head, Tap("head", output="scores"), weight=300.0),
    }
    students = {"alone": fit(12, scenes[:150], epochs)}
    for name, term in terms.items():
        distill = DistillCallback(teacher.net, term, student="net", validate=False)
        students[name] = fit(12, scenes[:150], epochs, distill)
    results = {"teacher": average_precision(teacher.net, test)}
    results |= {f"student {name}": average_precision(student.net, test) for name, student in students.items()}
    return show("Detection", results, "average precision")


if __name__ == "__main__":
    main()
