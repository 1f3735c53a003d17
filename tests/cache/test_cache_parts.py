"""Caches built in parts by independent jobs, and their merge (C20)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import network, table
from torch import nn

from distill_core import cache_files
from distill_core.manifest import CacheError
from distill_core.parts import Part, merge
from lightning_distill import TeacherCache

SETTINGS: dict[str, Any] = {"layers": ["0"], "batch_size": 4, "shard_bytes": 200, "progress": False}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    cache = TeacherCache.build(network(8), table(), folder, **SETTINGS)
    assert cache.manifest.shards > 6
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        TeacherCache.build_part(network(8), table(), folder / f"part {number}", f"{number}/3", **SETTINGS)
    return folder


@pytest.fixture
def parts(built: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in sorted(built.iterdir())]


def test_merged_parts_are_the_whole_byte_for_byte(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    before = [files(part) for part in parts]
    names: list[str] = []

    merge(tmp_path / "merged", parts[::-1], names.append)

    assert files(tmp_path / "merged") == files(whole)
    assert [files(part) for part in parts] == before
    assert sorted(names) == sorted(name for name in files(whole) if name.endswith(".npy"))
    merge(tmp_path / "merged", parts)  # merging once more changes nothing
    assert files(tmp_path / "merged") == files(whole)


def test_a_part_holds_its_shards_alone_and_is_not_a_cache(parts: list[Path]) -> None:
    lists = [sorted(path.name for path in part.glob("shard-*.json")) for part in parts]

    assert lists[1][:2] == ["shard-00001.json", "shard-00004.json"]
    assert not set(lists[0]) & set(lists[1])
    with pytest.raises(CacheError, match="it is not complete"):
        TeacherCache.open(parts[0])


def test_parts_that_one_folder_gets_one_after_the_other_complete_it(whole: Path, tmp_path: Path) -> None:
    for number in (2, 1):
        TeacherCache.build_part(network(8), table(), tmp_path / "cache", f"{number}/2", **SETTINGS)

    assert files(tmp_path / "cache") == files(whole)


def test_a_part_that_failed_is_named_by_its_shards_and_merged_later(
    whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    (parts[1] / "shard-00004.json").unlink()
    with pytest.raises(CacheError, match=r"1 are missing, such as \[4\]\. Build the parts that hold them"):
        merge(tmp_path / "merged", parts)

    TeacherCache.build_part(network(8), table(), parts[1], "2/3", **SETTINGS)
    merge(tmp_path / "merged", [parts[1]])

    assert files(tmp_path / "merged") == files(whole)


@pytest.mark.parametrize("stop", [1, 7])
def test_a_merge_that_was_stopped_goes_on_to_the_same_bytes(
    whole: Path, parts: list[Path], tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, replace = 0, os.replace

    def killed(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(cache_files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "merged", parts)
    monkeypatch.undo()
    merge(tmp_path / "merged", parts)

    assert files(tmp_path / "merged") == files(whole)


def test_a_full_disk_leaves_whole_shards(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(cache_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        merge(tmp_path / "merged", parts)
    monkeypatch.undo()

    assert not [path for path in (tmp_path / "merged").iterdir() if "partial" in path.name]
    merge(tmp_path / "merged", parts)
    assert files(tmp_path / "merged") == files(whole)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_file_is_named_and_not_taken(parts: list[Path], tmp_path: Path) -> None:
    damaged = parts[2] / "shard-00002.output.values.npy"
    flip(damaged)

    with pytest.raises(CacheError, match=re.escape(f"Expected {damaged} to be unchanged since the build")):
        merge(tmp_path / "merged", parts)
    assert not (tmp_path / "merged" / damaged.name).exists()
    assert not (tmp_path / "merged" / "shard-00002.json").exists()


def test_a_shard_that_is_in_two_parts_must_be_the_same(parts: list[Path], tmp_path: Path) -> None:
    name = "shard-00000.output.values.npy"
    for file in parts[0].glob("shard-00000*"):
        (parts[1] / file.name).write_bytes(file.read_bytes())
    merge(tmp_path / "merged", parts)

    other = np.load(parts[1] / name)
    facts = cache_files.write(parts[1] / name, other + 1)
    listed = parts[1] / "shard-00000.json"
    text = listed.read_text(encoding="utf-8")
    old = cache_files.checksum(parts[0] / name)
    listed.write_text(text.replace(old, facts["blake2b"]), encoding="utf-8")
    with pytest.raises(CacheError, match=r"Expected shard 0 of .*part 2 to equal that of an earlier part"):
        merge(tmp_path / "another", parts)


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        (network(8, seed=5), {}, "with teacher="),
        (network(8), {"dtype": "float32"}, "with arrays="),
        (network(8), {"shard_bytes": 2000}, "with shard_rows="),
    ],
    ids=["teacher", "dtype", "shards"],
)
def test_parts_of_another_build_are_refused(
    parts: list[Path], tmp_path: Path, teacher: nn.Module, settings: dict[str, Any], words: str
) -> None:
    TeacherCache.build_part(teacher, table(), tmp_path / "other", "2/3", **{**SETTINGS, **settings})

    with pytest.raises(CacheError, match=f"other to be a part of the same build as .*part 1, but it was begun {words}"):
        merge(tmp_path / "merged", [parts[0], tmp_path / "other"])
    assert not (tmp_path / "merged").exists()


def test_folders_without_a_part_are_refused(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(CacheError, match="empty to hold a part of a cache, but it holds none"):
        merge(tmp_path / "merged", [parts[0], tmp_path / "empty"])
    with pytest.raises(CacheError, match="Expected folders of parts to merge, but got none"):
        merge(tmp_path / "merged", [])


def test_a_stream_has_no_parts(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([{"id": str(index), "x": torch.ones(6)} for index in range(4)])

    with pytest.raises(CacheError, match="Expected a data set with a length to build part 1 of 2, but got a stream"):
        TeacherCache.build_part(
            network(8), Stream(), tmp_path / "part", "1/2", key="id", progress=False, forward=lambda net, x: net(x["x"])
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3/2", "from 1/2 to 2/2, but got 3/2"),
        ("0/2", "from 1/2 to 2/2, but got 0/2"),
        ("a/b", "like '3/16', the third of sixteen, but got part='a/b'"),
        ("1/0", "from 1/0 to 0/0"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Part.of(text)


def test_parts_are_folders_on_this_machine(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="in a folder on this machine, but got memory://bucket/part"):
        TeacherCache.build_part(network(8), table(), "memory://bucket/part", "1/2")
    with pytest.raises(CacheError, match="in a folder on this machine, but got memory://bucket/part"):
        TeacherCache.merge(tmp_path / "merged", ["memory://bucket/part"])
    with pytest.raises(CacheError, match=r"Expected a list of folders of parts to merge, but got '.*'"):
        TeacherCache.merge(tmp_path / "merged", str(parts[0]))
