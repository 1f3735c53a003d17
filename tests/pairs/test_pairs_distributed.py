"""Features in two processes, which may differ: all equal one process that sees the halves of every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs.by_hand import Batch, Hand, Place, places
from pairs.lightning_cell import close, same
from pairs.lightning_table import BATCH, FEATURES, ROWS, student
from pairs.lightning_two_processes import CASES, HALF, rests
from processes import run_processes
from torch import Tensor

SCRIPT = Path(__file__).parent / "lightning_two_processes.py"
REFUSED = ("skipping", "sharded_average")
CELLS = [(feature, case) for case, features in CASES.items() if case not in REFUSED for feature in features]
pytestmark = [pytest.mark.distributed]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes for all cases: the processes are started once."""
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("pair"))


def tensors(values: dict[str, Any] | None) -> dict[str, Tensor]:
    return {key: torch.tensor(value) for key, value in (values or {}).items()}


def by_hand(name: str, case: str, ended: list[dict[str, Any]]) -> Hand:
    """One process, for which every batch of the two is a part of the same step."""
    feature = FEATURES[name]
    rows = feature.rows()
    accumulate = {"accumulation": 3, "resting_and_accumulating": 2}.get(case, 1)
    once = case in ("resting", "resting_and_accumulating", "manual", "sharded_and_resting")
    batches = [[rows.batch(start + rank * HALF, HALF) for rank in (0, 1)] for start in range(0, ROWS, BATCH)]
    epochs = [ROWS // BATCH] * (1 if once else 2)
    steps: list[list[tuple[Batch, Place]]] = [
        [(half, place) for place in window for half in batches[place.batch]] for window in places(epochs, accumulate)
    ]
    if case == "resumed":  # Lightning starts the data over, but goes on counting
        shown = [[Batch(x=torch.tensor(end["batches"][index])) for end in ended] for index in range(len(steps) - 2)]
        whole = {tuple(half["x"].flatten().tolist()): half for pair in batches for half in pair}
        for step, halves in zip(range(2, len(steps)), shown, strict=True):
            place = steps[step][0][1]
            steps[step] = [(whole[tuple(half["x"].flatten().tolist())], place) for half in halves]
    resting = "resting" in case or case == "manual"
    hand = Hand(
        feature.formula,
        student(),
        tensors(ended[0]["start"]),
        views=feature.views,
        task_weight=feature.task_weight,
        dtype=None if feature.cache is None else torch.float32,
        decay=feature.decay,
        device="cpu",
    )
    return hand.train(
        steps,
        divide_by=2 * accumulate,
        distils=(lambda number: not rests(number % 2, number // 2)) if resting else (lambda number: True),
        weighs_task=case != "manual",
    )


@pytest.mark.parametrize(("feature", "case"), CELLS)
def test_two_processes_equal_one_that_sees_all_batches(pair, feature: str, case: str) -> None:
    ended = [rank[f"{case}/{feature}"] for rank in pair]
    hand = by_hand(feature, case, ended)
    skipped = 2 if case == "resumed" else 0
    for rank in (0, 1):
        close(ended[rank]["losses"], hand.losses[rank::2][skipped:], 5e-6)
        same(tensors(ended[rank]["student"]), hand.after[-1], 5e-6)
        same(tensors(ended[rank]["learned"]), hand.values(), 5e-6)
        if hand.decay is not None:
            same(tensors(ended[rank]["average"]), hand.teacher.state_dict(), 5e-6)
    assert ended[0]["student"] == ended[1]["student"]
    assert ended[0]["learned"] == ended[1]["learned"]
    assert ended[0]["average"] == ended[1]["average"]


def test_the_average_of_a_sharded_student_is_refused_in_both_processes(pair) -> None:
    for rank in pair:
        assert "is a shard of FSDP. Use DDP, or one device" in rank["sharded_average/moving average"]["error"]


def test_a_step_without_a_loss_is_refused_by_lightning_in_both_processes(pair) -> None:
    for rank in pair:
        assert "returning None in distributed training is not supported" in rank["skipping/adapter"]["error"]
