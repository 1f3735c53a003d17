"""One step of distillation without logits."""

from __future__ import annotations

from typing import Any

from language_models import (
    HEADS,
)
from torch import Tensor, nn

from lightning_distill import (
    Distiller,
    FusedLinearDistillation,
    SoftTargetLoss,
)


def fused_term(name: str = "llama", **settings: Any) -> FusedLinearDistillation:
    head = HEADS.get(name, "lm_head")
    defaults = {"loss": SoftTargetLoss(temperature=2.0), "weight": 0.7, "task_weight": 0.3}
    return FusedLinearDistillation(head, head, **{**defaults, **settings})


def distiller_of(student: nn.Module, teacher: nn.Module, term: Any = None) -> Distiller:
    return Distiller(student, teacher, fused_term() if term is None else term, task_weight=0)


def step(distiller: Distiller, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Any]:
    """The loss of one step, and the student's output."""
    with distiller.record(batch={"labels": labels}):
        output = distiller.student(**inputs)
    return distiller.loss({"labels": labels}), output
