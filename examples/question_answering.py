"""Question answering heads, start and end of an answer: `python examples/question_answering.py`.

It prints the share of exact answers: teacher 91 %, student alone 82 %, distilled 79 %, which is worse.
"""

from __future__ import annotations

from typing import Any

import torch
from common import QUIET, questions, show
from lightning.pytorch import Trainer
from networks import QuestionAnswering
from torch import Tensor, nn

from lightning_distill import DistillModule, FeatureDistillation, LogitsDistillation, SoftTargetLoss, Tap


def span_loss(scores: Tensor, spans: Tensor) -> Tensor:
    """Cross entropy of the start and of the end."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), spans.flatten())


@torch.no_grad()
def exact(model: nn.Module, loader: Any) -> float:
    """The share of answers of which start and end are right."""
    model.eval()
    right = torch.cat([(model(tokens).argmax(-1) == spans).all(-1) for tokens, spans in loader])
    return float(right.float().mean())


def fit(module: DistillModule, loader: Any, test: Any, epochs: int) -> nn.Module:
    """The student after a training by Lightning."""
    Trainer(max_epochs=epochs, **QUIET).fit(module, loader, test)
    return module.student.eval()


def main(epochs: int = 8) -> dict[str, float]:
    """The scores of each token are the logits; the last layer of both encoders is compared as well."""
    training, test = questions()
    torch.manual_seed(0)
    optimizer: Any = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)  # noqa: E731

    def small() -> nn.Module:
        return QuestionAnswering(16, 1)

    idle = [LogitsDistillation(weight=0.0)]
    settings: dict[str, Any] = {"task_loss": span_loss, "optimizer": optimizer}
    teacher = fit(DistillModule(QuestionAnswering(48, 2), small(), idle, **settings), training, test, epochs)
    alone = fit(DistillModule(small(), teacher, idle, **settings), training, test, epochs)
    terms = [
        LogitsDistillation(SoftTargetLoss(temperature=2.0), weight=1.0),
        FeatureDistillation(Tap("encoder.distilbert", output=0), Tap("encoder.distilbert", output=0), weight=0.1),
    ]
    student = fit(DistillModule(small(), teacher, terms, task_weight=0.5, **settings), training, test, epochs)
    scores = {"teacher": exact(teacher, test), "student alone": exact(alone, test)}
    return show("Question answering, exact spans", {**scores, "student distilled": exact(student, test)})


if __name__ == "__main__":
    main()
