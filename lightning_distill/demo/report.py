"""The demonstration's proof: its best student, saved and loaded without this library."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill_core.demo_report import best_run, proof
from distill_core.guidance.comparison import Comparison
from lightning_distill.demo.digits import Student, hit_rate, predict


def prove_plain(path: Path, comparison: Comparison, test: tuple[Tensor, Tensor]) -> str:
    """The best student with few labels, saved, loaded strictly into the bare network and tested again.

    Args:
        path: File to write.
        comparison: The comparison with few labels, which has kept the weights of its students.
        test: Images ``(N, 1, 8, 8)`` and classes ``(N,)``.

    Returns:
        The proof in words.
    """
    best = best_run(comparison)
    weights = torch.load(comparison.folder / str(best.weights), weights_only=True)
    torch.save({name.removeprefix("net."): value for name, value in weights.items()}, path)
    bare = Student()
    bare.load_state_dict(torch.load(path, weights_only=True), strict=True)
    accuracy = hit_rate(predict(bare, test[0]) == test[1])
    return proof(path, best, "strictly into the bare network", accuracy)
