"""The keys of samples are not inputs of the teacher (C18)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import network

from lightning_distill import TeacherCache


@pytest.mark.parametrize("keys", [torch.arange(12), [f"item {index}" for index in range(12)]], ids=["numbers", "words"])
def test_the_teacher_does_not_get_the_keys_of_a_tuple(tmp_path: Path, keys: Any) -> None:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    data = list(zip(keys, inputs, strict=True))
    settings: dict[str, Any] = {"key": 0, "dtype": "float32", "progress": False}

    cache = TeacherCache.build(network(8), data, tmp_path / "with", **settings)
    alone = TeacherCache.build(
        network(8),
        data,
        tmp_path / "without",
        collate_fn=lambda rows: torch.stack([row[1] for row in rows]),
        **settings,
    )
    expected = network(8)(inputs).detach().numpy()
    for built_cache in (cache, alone):
        np.testing.assert_allclose(built_cache.read(range(12))["output"], expected, rtol=1e-5)
