"""Random combinations of features equal a loop written by hand; random_lightning.py runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs.random_lightning import check, draw

SEEDS = range(12, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the caches, which are built once."""
    return tmp_path_factory.mktemp("random")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_combination_equals_the_loop_by_hand(seed: int, folder: Path) -> None:
    check(seed, folder)


def test_the_seeds_meet_every_kind_of_loss_teacher_situation_and_optimization() -> None:
    drawn = [draw(seed) for seed in SEEDS]
    assert {case.teacher for case in drawn} == {"live", "cache", "several"}
    assert {case.loss for case in drawn} == {"soft", "decoupled", "mse", "curriculum"}
    assert {case.manual for case in drawn} == {True, False}
    assert {case.situation for case in drawn} == {"", "finder", "reload", "copy", "second", "resume"}
