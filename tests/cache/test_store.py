"""The folder: its format, its metadata, and the ways in which it can be broken."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import ITEMS, network, table
from torch import nn

from distill_core import cache_files
from distill_core.codecs import TopKCodec
from distill_core.store import CacheError
from lightning_distill import TeacherCache

ROOT = Path(__file__).parents[2]


def built(folder: Path, teacher: nn.Module | None = None, **settings: Any) -> TeacherCache:
    """Ten shards of four rows."""
    settings = {"batch_size": 4, "shard_bytes": 1, "progress": False, "layers": ["1"], "dtype": "float32", **settings}
    return TeacherCache.build(teacher or network(32), table(), folder, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_c4_numpy_and_json_alone_read_the_folder(tmp_path: Path) -> None:
    """C4, C8: no pickle anywhere."""
    teacher = network(32)
    built(tmp_path, teacher)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["layers"] == {"feature0": "1|output"}
    shards = sorted(tmp_path.glob("shard-*.output.values.npy"))
    assert len(shards) == -(-ITEMS // manifest["shard_rows"]) == 10
    rows = np.concatenate([np.load(file, allow_pickle=False) for file in shards])
    with torch.no_grad():
        np.testing.assert_allclose(rows, teacher(table().tensors[0]).numpy(), rtol=1e-6, atol=1e-6)


def test_c5_the_manifest_says_where_everything_comes_from(tmp_path: Path) -> None:
    """C5"""
    manifest = built(tmp_path, top_k=3, dtype="uint8", views=2, transform_seed=1).manifest
    assert (manifest.version, manifest.length, manifest.views, manifest.rows) == (2, ITEMS, 2, 2 * ITEMS)
    assert manifest.arrays["output"] == {"shape": [10], "dtype": "uint8", "top_k": 3}
    assert manifest.arrays["feature0"] == {"shape": [32], "dtype": "float16"}
    assert manifest.teacher["class"] == "Sequential"
    assert len(manifest.teacher["fingerprint"]) == len(manifest.data["fingerprint"]) == 32
    assert manifest.versions.keys() == {"torch", "numpy"}


def test_c5_another_teacher_or_other_data_are_refused(tmp_path: Path) -> None:
    """C5"""
    teacher = network(32)
    built(tmp_path, teacher)
    TeacherCache.open(tmp_path, teacher=network(32), dataset=table())  # equal ones will do
    with torch.no_grad():
        teacher[0].weight[0, 0] += 1e-3
    with pytest.raises(CacheError, match=r"to be of this teacher, but it was built with another Sequential"):
        TeacherCache.open(tmp_path, teacher=teacher)
    with pytest.raises(CacheError, match=r"to have the 40 items that the cache was built from, but got 8"):
        TeacherCache.open(tmp_path, dataset=table(8))
    with pytest.raises(CacheError, match=r"but some items differ"):
        TeacherCache.open(tmp_path, dataset=table(seed=2))


def test_c1_the_teacher_is_restored(tmp_path: Path) -> None:
    """C1: trained with batch statistics, it still answers in eval mode; buffers, flags and hooks stay."""
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    cache = built(tmp_path, teacher)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        expected = teacher.eval()(table().tensors[0]).numpy()
    np.testing.assert_allclose(cache.read(range(ITEMS))["output"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [[0], [39, 0, 17, 17], list(range(40))[::-1], []])
def test_c15_any_rows_come_in_their_order(tmp_path: Path, rows: list[int]) -> None:
    """C15"""
    cache = built(tmp_path)
    everything = cache.read(range(ITEMS))["output"]
    np.testing.assert_array_equal(cache.read(rows)["output"], everything[rows])


def test_c15_rows_that_are_not_there_raise(tmp_path: Path) -> None:
    """C15"""
    with pytest.raises(IndexError, match=r"^Expected rows from 0 to 39, but got 3 to 40\.$"):
        built(tmp_path).read([3, 40])


def test_c15_reading_a_batch_needs_the_memory_of_a_batch(tmp_path: Path) -> None:
    """C15: 64 rows of a cache of 20 MB."""
    teacher, data = nn.Linear(4, 2500), torch.utils.data.TensorDataset(torch.randn(2000, 4))
    cache = TeacherCache.build(teacher, data, tmp_path, dtype="float32", progress=False)
    cache.read(range(0, 2000, 100))  # checksums are taken in pieces of a megabyte
    tracemalloc.start()
    cache.read(np.random.default_rng(0).integers(0, 2000, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 64 * 2500 * 4


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "foreign", "no list", "wrong list", "no manifest"])
def test_c11_a_broken_file_is_named(tmp_path: Path, harm: str) -> None:
    """C11: at opening, or when it is first read; nothing is ever silently zero."""
    built(tmp_path)
    file = tmp_path / "shard-00003.output.values.npy"
    listed = tmp_path / "shard-00003.json"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif harm == "flipped":
        damaged = bytearray(file.read_bytes())
        damaged[-5] ^= 1
        file.write_bytes(bytes(damaged))
    elif harm == "missing":
        file.unlink()
    elif harm == "foreign":
        file.write_bytes((tmp_path / "shard-00004.output.values.npy").read_bytes())
    elif harm == "no list":
        file = listed
        listed.unlink()
    elif harm == "wrong list":
        file = listed
        listed.write_text("{}")
    else:
        file = tmp_path / "manifest.json"
        file.write_text("{]")
    with pytest.raises(CacheError, match=file.name):
        TeacherCache.open(tmp_path).read([13])
    with pytest.raises(CacheError, match=file.name):
        TeacherCache.open(tmp_path).verify()


def test_c11_a_folder_without_a_cache_says_so(tmp_path: Path) -> None:
    """C11"""
    with pytest.raises(CacheError, match=r"^Expected a cache's manifest\.json in .*, but the folder has none\.$"):
        TeacherCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(CacheError, match=r"to be of format version 1 to 2, but got 99"):
        TeacherCache.open(tmp_path)


def test_c12_a_build_that_filled_the_disk_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C12: the same bytes as of a build in one go."""
    built(tmp_path / "whole")
    write, written = cache_files.write, []

    def full(path: Path, content: Any) -> dict[str, Any]:
        written.append(path)
        if len(written) == 12:
            path.with_name(f".{path.name}.distill-partial").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(cache_files, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        built(tmp_path / "resumed")
    with pytest.raises(CacheError, match=r"but it is not complete: build it with resume=True"):
        TeacherCache.open(tmp_path / "resumed")
    with pytest.raises(CacheError, match=r"to be empty, but it holds a cache\. Pass resume=True"):
        built(tmp_path / "resumed", resume=False)
    begun = len(written)
    built(tmp_path / "resumed")
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")
    assert len(written) - begun < begun + 20  # whole shards were not built again


SLOW = """
import itertools, sys
sys.path[:0] = [{root!r}, {tests!r}]
from cache_nets import network, table
from lightning_distill import TeacherCache

batches = itertools.count(1)

def forward(teacher, batch):
    print("batch", flush=True)
    if next(batches) == 5:
        sys.stdin.read()  # until the process is killed
    return teacher(batch[0])

settings = dict(layers=["1"], dtype="float32", batch_size=4, shard_bytes=1, forward=forward, progress=False)
TeacherCache.build(network(32), table(), sys.argv[1], **settings)
"""


def process(folder: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(SLOW.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_c12_c13_a_killed_build_is_completed_and_its_lock_is_free(tmp_path: Path) -> None:
    """C1, C12 and C13: kill -9 in the middle, another process refused meanwhile, the same bytes in the end."""
    built(tmp_path / "whole")
    first = process(tmp_path / "killed")
    assert first.stdout is not None
    for _ in range(5):
        assert first.stdout.readline() == "batch\n"
    with pytest.raises(CacheError, match=r"to be free, but another process is building there"):
        built(tmp_path / "killed")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    num_shards = len(list((tmp_path / "killed").glob("shard-*.json")))
    assert 0 < num_shards < 10
    built(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_c12_a_folder_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    """C12"""
    built(tmp_path)
    with pytest.raises(CacheError, match=r"it was begun with arrays=.*'float32'.*, and now it is .*'float16'"):
        built(tmp_path, dtype="float16")
    with pytest.raises(CacheError, match=r"it was begun with teacher="):
        built(tmp_path, network(32, seed=9))


def _rank(rank: int, folder: str, meeting: str) -> None:
    # a file, since another test may take a port that was free before
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    built(Path(folder))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_c1_two_processes_share_the_work(tmp_path: Path) -> None:
    """C1: the same bytes as one process."""
    built(tmp_path / "one")
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "two"), str(tmp_path / "meeting")), nprocs=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_c10_the_size_is_printed_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C1, C10: and one progress bar."""
    built(tmp_path, progress=True)
    printed = capsys.readouterr().out
    assert "40 rows, 0.0 MiB in 10 shards; 10 to build" in printed
    assert "40/40" in printed


def test_c15_all_logits_are_held_for_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C15: a shard of 64 MiB comes from gigabytes of logits, of which only a few bytes a row are kept."""
    seen: list[int] = []
    encode = TopKCodec.encode
    monkeypatch.setattr(TopKCodec, "encode", lambda self, rows, seed: (seen.append(len(rows)), encode(self, rows))[1])
    cache = built(tmp_path, top_k=3, dtype="float16", shard_bytes=2**20)
    assert (cache.manifest.shards, seen) == (1, [4] * 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_c1_workers_give_the_same_bytes(tmp_path: Path, workers: int) -> None:
    """C1"""
    built(tmp_path / "plain")
    built(tmp_path / "workers", num_workers=workers)
    assert content(tmp_path / "workers") == content(tmp_path / "plain")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, r"^Expected `dtype` to be one of float16, bfloat16, float32, but got dtype='int8'\.$"),
        ({"dtype": "uint8"}, r"to be float16, bfloat16 or float32 without top_k, but got 'uint8'"),
        ({"layers": ["9"]}, r"^Expected `layers\[0\]` to name a module of the teacher, but got '9'"),
        ({"layers": [], "outputs": False}, r"^Expected something to keep, but got outputs=False and no layers"),
        (
            {"forward": lambda teacher, batch: teacher(batch[0]).sum(0)},
            r"^Expected 'output' to have one entry for each of the 4",
        ),
    ],
)
def test_c1_wrong_settings_raise_before_anything_is_written(tmp_path: Path, settings: Any, words: str) -> None:
    """C1: and the teacher is restored."""
    teacher = network(32).train()
    with pytest.raises(ValueError, match=words):
        built(tmp_path / "new", teacher, **settings)
    assert not (tmp_path / "new").exists()
    assert teacher.training
    assert multiprocessing.active_children() == []
