"""ContrastiveRepresentationLoss in two processes: maps are the same, memories learn from the examples of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes

pytestmark = [pytest.mark.distributed]
SCRIPT = Path(__file__).parent / "memory_processes.py"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes."""
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("memories"))


def test_student_and_learned_maps_are_the_same(ended: list[dict[str, Any]]) -> None:
    first, second = ended
    assert first["student"] == second["student"]
    for name in ("student_embedding.weight", "teacher_embedding.bias"):
        assert first["learned"][f"learned.0.{name}"] == second["learned"][f"learned.0.{name}"]


def test_memories_begin_alike_and_learn_from_the_rows_of_their_process_alone(ended: list[dict[str, Any]]) -> None:
    name = "learned.0.student_memory"
    starts = [torch.tensor(each["before"][name]) for each in ended]
    torch.testing.assert_close(*starts)
    for each, start in zip(ended, starts, strict=True):
        changed = (torch.tensor(each["learned"][name]) != start).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == each["rows"]
    assert not set(ended[0]["rows"]) & set(ended[1]["rows"])
