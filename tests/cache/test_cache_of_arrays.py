"""Outputs that were computed elsewhere become a cache (C21)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import Module, network, table
from cache_nets import difference as weights_differ
from cache_nets import trained as fitted
from ragged_data import Padding, Sentences, difference, teacher, trained
from torch import Tensor

from lightning_distill import CacheError, FeatureDistillation, LogitsDistillation, TeacherCache


def outputs() -> Tensor:
    with torch.no_grad():
        return network(32)(table().tensors[0])


def sequences() -> list[Tensor]:
    with torch.no_grad():
        return [teacher()(torch.tensor([sample["input_ids"]]))["logits"][0] for sample in Sentences()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: rows.numpy(), lambda rows: {"output": rows}])
def test_c21_the_weights_are_those_of_a_live_teacher(tmp_path: Path, make: Any) -> None:
    """C21: from a tensor, an array, or a dict of them; the data are compared if they were given."""
    cache = TeacherCache.from_arrays(make(outputs()), tmp_path, dataset=table(), dtype="float32", shard_bytes=500)
    assert cache.manifest.shards > 1
    cache.verify()
    live, cached = (fitted(Module(table()), source, [LogitsDistillation()]) for source in (network(32), cache))
    assert weights_differ(live, cached) < 1e-6
    with pytest.raises(CacheError, match=r"but some items differ"):
        TeacherCache.open(tmp_path, dataset=table(seed=9))


def test_c21_features_have_the_names_of_layers(tmp_path: Path) -> None:
    """C21: without the data, their number is compared."""
    with torch.no_grad():
        hidden = network(32)[:2](table().tensors[0])
    cache = TeacherCache.from_arrays({"1": hidden}, tmp_path, dtype="float32")
    terms = [FeatureDistillation("1", "1")]
    live, cached = (fitted(Module(table()), source, terms) for source in (network(32), cache))
    assert weights_differ(live, cached) < 1e-6
    with pytest.raises(CacheError, match=r"to have the 40 items that the cache was built from, but got 8"):
        TeacherCache.open(tmp_path, dataset=table(8))


@pytest.mark.parametrize("source_of_keys", ["keys", "dataset", "neither"])
def test_c21_sequences_are_a_list_of_arrays(tmp_path: Path, source_of_keys: str) -> None:
    """C17, C18, C21: with keys, with the data to take them from, or by number."""
    data = [Sentences()[index] for index in range(24)]
    settings: dict[str, Any] = {
        "keys": {"key": "id", "keys": [sample["id"] for sample in data]},
        "dataset": {"key": "id", "dataset": data},
        "neither": {},
    }[source_of_keys]
    cache = TeacherCache.from_arrays(sequences(), tmp_path, dtype="float32", shard_bytes=1000, **settings)
    data = data[::-1] if source_of_keys != "neither" else data
    live, cached = (trained(source, Padding("left"), data) for source in (teacher(), cache))
    assert difference(live, cached) < 1e-6


def test_c21_a_teacher_and_large_files_are_noted(tmp_path: Path) -> None:
    """C21: memory-mapped arrays; a finished cache is kept, one of other numbers refused."""
    np.save(tmp_path / "rows.npy", outputs().numpy())
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    TeacherCache.from_arrays(rows, tmp_path / "cache", teacher=network(32), top_k=4, dtype="uint8")
    assert TeacherCache.open(tmp_path / "cache", teacher=network(32)).manifest.arrays["output"]["top_k"] == 4
    TeacherCache.from_arrays(rows, tmp_path / "again")
    TeacherCache.from_arrays(rows, tmp_path / "again")
    with pytest.raises(CacheError, match=r"it was begun with teacher="):
        TeacherCache.from_arrays(rows + 1, tmp_path / "again")
    with pytest.raises(CacheError, match=r"to be empty, but it holds a cache\. Pass resume=True"):
        TeacherCache.from_arrays(rows, tmp_path / "again", resume=False)


def test_c21_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """C21"""
    rows = outputs()
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (r"^Expected `arrays` to have as many rows each, 1 or more, but got \{'output': 40, 'body': 2\}", 0, {}),
        (r"^Expected `arrays` to have as many rows each, 1 or more, but got \{\}", {}, {}),
        (r"^Expected `dataset` to have 40 items, one for each row, but got 8", rows, {"dataset": table(8)}),
        (r"^Expected `keys` to have 40 entries, one for each row, but got 2", rows, {"key": 0, "keys": [1, 2]}),
        (r"^Expected `key` to say where a sample has its key, but got None with `keys`", rows, {"keys": [1]}),
        (r"^Expected `keys` or `dataset` to be given with `key`, but got None", rows, {"key": "id"}),
        (r"of its own, but samples 0 and 39 have the same", rows, {"key": 0, "keys": [*range(39), 0]}),
        (r"^Expected 'output' to be a list of sequences of the shape \(tokens, \.\.\.\)", list(rows), {}),
        (r"^Expected 'output' to hold numbers, but got dtype <U1", np.array(["a", "b"]), {}),
        (r"^Expected 'output' to hold numbers, but got dtype complex64", torch.complex(rows, rows), {}),
        (r"^Expected 'output' to hold numbers, but got dtype bool", rows > 0, {}),
        (r"^Expected 'output' to have a value everywhere", np.ma.masked_greater(rows.numpy(), 0), {}),
        (r"^Expected the teacher's outputs to be logits, but got probabilities", rows.softmax(-1), {"top_k": 3}),
        (r"^Expected the teacher's outputs to be finite in float16", rows * 1e6, {}),
    ]
    for number, (words, arrays, settings) in enumerate(cases):
        arrays = {"output": rows, "body": rows[:2]} if isinstance(arrays, int) else arrays
        with pytest.raises(ValueError, match=words):
            TeacherCache.from_arrays(arrays, tmp_path / str(number), **settings)


@pytest.mark.parametrize("kind", [torch.complex64, torch.bool])
@pytest.mark.parametrize("layers", [(), ("0",)], ids=["output", "layer"])
def test_a_teacher_that_returns_no_real_numbers_is_refused(tmp_path: Path, kind: torch.dtype, layers: Any) -> None:
    """The stored number of a complex one would be its real part alone."""

    class Converts(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(kind)

    teacher = torch.nn.Sequential(Converts())
    name = "feature0" if layers else "output"
    with pytest.raises(CacheError, match=rf"^Expected '{name}' to hold numbers, but got dtype {str(kind)[6:]}"):
        TeacherCache.build(teacher, table(), tmp_path, layers=layers, outputs=not layers, progress=False)
