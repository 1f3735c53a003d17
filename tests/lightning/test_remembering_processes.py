"""Losses that remember examples, in two processes: as one process that has the batches of both, in their order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from remembering_processes import QUEUE, ROWS, STEPS, Embedder, inputs
from torch import Tensor

pytestmark = [pytest.mark.distributed]
SCRIPT = Path(__file__).parents[1] / "remembering_processes.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, which are started once."""
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("remembering"))


class ByHand:
    """The memories of one process, whose networks stay as they are, in plain torch.

    Args:
        state: The state before the first step.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.student, self.teacher = Embedder(3, seed=1), Embedder(5, seed=2)
        values = {name: torch.tensor(value) for name, value in state.items()}
        self.maps = [
            [values[f"contrast.learned.0.{side}_embedding.{kind}"] for kind in ("weight", "bias")]
            for side in ("student", "teacher")
        ]
        self.queue = values["queue.learned.0.queue"]
        self.memories = [values[f"contrast.learned.0.{side}_memory"] for side in ("student", "teacher")]
        self.constants: Tensor | None = None

    @torch.no_grad()
    def step(self, rows: list[int], x: Tensor) -> None:
        features = self.student(x), self.teacher(x)
        self.queue = torch.cat([F.normalize(features[1]), self.queue])[:QUEUE]
        fresh = [F.normalize(F.linear(each, *layer)) for each, layer in zip(features, self.maps, strict=True)]
        if self.constants is None:  # every other row is a negative; the temperature is 0.07
            products = [fresh[0] @ self.memories[1].T, fresh[1] @ self.memories[0].T]
            self.constants = torch.stack(
                [(each / 0.07).double().exp().mean().log() + math.log(ROWS) for each in products]
            )
        for side, memory in enumerate(self.memories):
            moved = memory.clone()
            for place, row in enumerate(rows):  # a later one writes over an earlier one
                moved[row] = F.normalize(0.5 * memory[row] + 0.5 * fresh[side][place], dim=0)
            self.memories[side] = moved

    def equals(self, state: dict[str, Any]) -> None:
        close(state["queue.learned.0.queue"], self.queue)
        for side, memory in zip(("student", "teacher"), self.memories, strict=True):
            close(state[f"contrast.learned.0.{side}_memory"], memory)


def close(got: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-6, atol=1e-6)


def both(rows: list[list[int]]) -> tuple[list[int], Tensor]:
    """The rows of both processes, and their inputs."""
    return [*rows[0], *rows[1]], torch.cat([inputs(rows[0], 0), inputs(rows[1], 1)])


def test_memories_are_those_of_one_process_with_the_rows_of_both(pair: list[dict[str, Any]]) -> None:
    """With unequal numbers of rows, none at all, and a row in both processes."""
    before, *after = pair[0]["unequal"]
    assert before == pair[1]["unequal"][0]
    hand = ByHand(before)
    for rows, state in zip(STEPS, after, strict=True):
        hand.step(*both(rows))
        hand.equals(state)


def test_the_constants_are_those_of_the_first_batches_of_both_and_stay(pair: list[dict[str, Any]]) -> None:
    before, *after = pair[0]["unequal"]
    hand = ByHand(before)
    hand.step(*both(STEPS[0]))
    for state in after:
        close(state["contrast.learned.0.log_normalizers"], hand.constants.float())


def test_a_loop_of_fabric_remembers_the_same(pair: list[dict[str, Any]]) -> None:
    before, *after = pair[0]["fabric"]
    hand = ByHand(before)
    for rows, state in zip((STEPS[0], STEPS[2]), after, strict=True):
        hand.step(*both(rows))
        hand.equals(state)


@pytest.mark.parametrize("case", ["fabric", "unequal", "masked", "accumulated", "resumed", "trainer"])
def test_both_processes_remember_the_same(pair: list[dict[str, Any]], case: str) -> None:
    first, second = ([{k: v for k, v in each.items() if k != "loss"} for each in rank[case]] for rank in pair)
    assert first == second


def test_rows_that_do_not_count_are_not_remembered_in_any_process(pair: list[dict[str, Any]]) -> None:
    before, after = pair[0]["masked"]
    hand = ByHand(before)
    hand.step([3], inputs([3], 1))
    hand.equals(after)


def test_batches_of_an_optimizer_step_are_remembered_in_their_order(pair: list[dict[str, Any]]) -> None:
    before, after = pair[0]["accumulated"]
    hand = ByHand(before)
    for rows in ([[1], [2]], [[3], [4]]):
        hand.step(*both(rows))
    hand.equals(after)


@pytest.mark.parametrize("case", ["resumed", "trainer"])
def test_a_resumed_training_is_the_straight_one_to_the_bit(pair: list[dict[str, Any]], case: str) -> None:
    """Negatives are drawn; the checkpoint is that of the first process."""
    for rank in pair:
        straight, again = rank[case]
        assert straight == again


def test_each_process_draws_its_own_negatives(pair: list[dict[str, Any]]) -> None:
    losses = [rank["resumed"][0]["loss"] for rank in pair]
    assert losses[0] != losses[1]


def test_a_loop_without_an_optimizer_to_follow_is_refused(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert "Expected an optimizer to follow, since QueueSimilarityLoss remembers" in rank["without_optimizer"]
        assert "Call distiller.follow(optimizer)." in rank["without_optimizer"]


def test_a_loss_that_is_called_by_itself_has_a_queue_in_each_process(pair: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(pair):
        close(rank["by_itself"][0], F.normalize(inputs([number], number))[0])
    assert pair[0]["by_itself"] != pair[1]["by_itself"]


def test_a_term_of_the_user_s_own_shares_what_its_loss_remembers(pair: list[dict[str, Any]]) -> None:
    teacher = Embedder(4, seed=2)
    for rank in pair:
        close(rank["own_term"][:2], F.normalize(teacher(torch.cat([inputs([0], 0), inputs([1], 1)]))).detach())
    assert pair[0]["own_term"] == pair[1]["own_term"]
