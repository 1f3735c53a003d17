"""Two processes train from a cache as they do with the live teacher (C2, C9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_nets import ITEMS
from processes import run_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(Path(__file__).parent / "cached_processes.py", "cached", 2, tmp_path_factory.mktemp("cached"))


@pytest.mark.parametrize("views", ["", "views_"], ids=["plain", "views and workers"])
def test_c2_two_processes_end_with_the_weights_of_a_live_teacher(ended: list[dict[str, Any]], views: str) -> None:
    """C2, C9: shuffled by the sampler that Lightning injects; with views and workers too."""
    for result in ended:
        for cached, live in zip(result[f"{views}cached"]["weights"], result[f"{views}live"]["weights"], strict=True):
            np.testing.assert_allclose(cached, live, rtol=0, atol=1e-6)
        assert result[f"{views}cached"]["places"] == result[f"{views}live"]["places"]
    assert ended[0][f"{views}cached"]["weights"] == ended[1][f"{views}cached"]["weights"]


@pytest.mark.parametrize("views", ["", "views_"], ids=["plain", "views and workers"])
def test_c2_the_two_processes_share_the_items_in_another_order_each_epoch(
    ended: list[dict[str, Any]], views: str
) -> None:
    """C2: so that the comparison above is one of shuffled data, each item on one process."""
    runs = [result[f"{views}cached"] for result in ended]
    assert [result["sampler"] for result in runs] == ["DistributedSampler"] * 2
    epochs = np.reshape([result["places"] for result in runs], (2, 3, -1))
    orders = [epochs[:, epoch].ravel().tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(ITEMS)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
