"""Every feature in every situation equals a loop written by hand, or is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs.lightning_cell import Cell
from pairs.lightning_situations import FEW, REFUSED, SITUATIONS
from pairs.lightning_table import FEATURES, REMEMBERING

pytestmark = [
    # the module of the table can validate itself, and most situations do not
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
CELLS = [
    (feature, situation)
    for situation in SITUATIONS
    for feature in FEATURES
    if feature in FEW.get(situation, FEATURES) and feature not in REMEMBERING
    if situation in (FEATURES[feature].situations or SITUATIONS)
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the caches, which are built once."""
    return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize(("feature", "situation"), CELLS)
def test_a_feature_in_a_situation_equals_the_loop_by_hand(
    feature: str, situation: str, tmp_path: Path, shared: Path
) -> None:
    cell = Cell(feature, tmp_path, shared)
    words = REFUSED.get((feature, situation))
    if words is None:
        SITUATIONS[situation](cell)
    else:
        with pytest.raises(Exception, match=words):
            SITUATIONS[situation](cell)


def test_the_table_names_only_features_and_situations_that_exist() -> None:
    assert FEW.keys() <= SITUATIONS.keys()
    assert {feature for few in FEW.values() for feature in few} <= FEATURES.keys()
    assert all(feature in FEATURES and situation in SITUATIONS for feature, situation in REFUSED)
