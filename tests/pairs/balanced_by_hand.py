"""Balanced weights of a term on the logits and of one on a layer, by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pairs.by_hand import soft_targets, squared
from tiny import Mlp

from lightning_distill import Balanced, DistillationTerm, FeatureDistillation, LogitsDistillation


class BalancedByHand:
    """The squared norms of the gradients in the first steps, and the weights that follow from the ratios so far."""

    def __init__(self) -> None:
        self.squares: dict[str, list[list[float]]] = {"logits": [], "body": []}
        self.last: Any = None
        self.steps = 0  # begun so far

    def __call__(self, result, ask, batch, place, learned):
        teacher = ask(Mlp(7, seed=1))
        adapter = [learned[f"body.adapters.0.{name}"] for name in ("weight", "bias")]
        values = {
            "logits": soft_targets(result["logits"], teacher["logits"], 4.0),
            "body": squared(F.linear(result["body"], *adapter), teacher["body"]),
        }
        task = F.cross_entropy(result["logits"].flatten(0, -2), batch["labels"].flatten())
        self.steps += self.last != place[:2]  # not a further micro-batch
        self.last, total = place[:2], 0.0
        for name, share, steps in (("logits", 0.5, 3), ("body", 2.0, 2)):
            squares = self.squares[name]
            if self.steps <= steps:
                squares += [[0.0, 0.0]] * (self.steps - len(squares))
                norms = [
                    torch.autograd.grad(loss, result[name], retain_graph=True)[0].double().square().sum().item()
                    for loss in (task, values[name])
                ]
                squares[-1] = [old + new for old, new in zip(squares[-1], norms, strict=True)]
            ratios = sorted((a / b) ** 0.5 for a, b in squares)
            middle = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
            total = total + share * (middle[0] * middle[1]) ** 0.5 * values[name]
        return total


def balanced_terms() -> list[DistillationTerm]:
    return [
        LogitsDistillation(weight=Balanced(0.5, steps=3)),
        FeatureDistillation("body", "body", weight=Balanced(2.0, steps=2)),
    ]
