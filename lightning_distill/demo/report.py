"""The demonstration's proof: its best student, saved and loaded without this library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core.demo_report import Run, best_run, proof
from lightning_distill.demo.digits import Student, hit_rate, predict


def prove_plain(
    path: Path,
    runs: Sequence[Run],
    students: Mapping[tuple[str, str, int], dict[str, Tensor]],
    test: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """The best student with few labels, saved, loaded strictly into the bare network and tested again.

    Args:
        path: File to write.
        runs: The teacher's run, then the students'.
        students: Each student's state_dict by labels, method and seed.
        test: Images ``(N, 1, 8, 8)`` and classes ``(N,)``.

    Returns:
        The saved run, its accuracy before and after, and the proof in words.
    """
    best = best_run(runs)
    weights = students[best.labels, best.method, best.seed]
    torch.save(weights, path)
    bare = Student()
    bare.load_state_dict(torch.load(path, weights_only=True), strict=True)
    accuracy = hit_rate(predict(bare, test[0]) == test[1])
    return proof(path, best, "strictly into the bare network", accuracy)
