"""Reading a cache of 10^8 rows takes memory for a batch (C15)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from distill_core import cache_files
from distill_core.manifest import MANIFEST, Manifest
from distill_core.store import Reader

ROWS, SHARD_ROWS, NUMBERS = 10**8, 2**25, 1


def sparse_cache(folder: Path) -> Path:
    """A cache of zeros, whose files take no room on the disk."""
    manifest = Manifest(
        length=ROWS,
        views=1,
        shard_rows=SHARD_ROWS,
        arrays={"output": {"shape": [NUMBERS], "dtype": "float16"}},
        layers={},
        teacher={"class": "zeros", "fingerprint": "0"},
        data={"fingerprint": "0", "transform_seed": None, "stale": False, "kind": "torch"},
    )
    for shard in range(manifest.shards):
        path = folder / cache_files.array_name(shard, "output", "values")
        shape = (len(manifest.shard_range(shard)), NUMBERS)
        np.lib.format.open_memmap(path, "w+", "float16", shape).flush()
        facts = {"bytes": path.stat().st_size, "blake2b": cache_files.checksum(path)}
        (folder / cache_files.list_name(shard)).write_text(json.dumps({path.name: facts}), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def test_reading_takes_memory_for_a_batch_of_a_hundred_million_rows(tmp_path: Path) -> None:
    reader = Reader(sparse_cache(tmp_path))
    generator = np.random.default_rng(0)
    reader.read(np.arange(4))
    before = own_memory()

    for _ in range(20):
        values = reader.read(generator.integers(ROWS, size=256))["output"]

    assert values.shape == (256, NUMBERS)
    assert own_memory() - before < 2**24
