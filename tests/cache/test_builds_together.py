"""Several processes that build into one folder: locks, and errors that reach every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_nets import network, table

from distill_core.locks import LOCK, locked
from distill_core.store import CacheError, begin
from lightning_distill import TeacherCache
from lightning_distill.cache import building


def build_lightning(folder: Path) -> None:
    TeacherCache.build(network(8), table(4), folder, progress=False)


def build_keras(folder: Path) -> None:
    import keras  # not above: importing it would slow the processes below down

    import keras_distill

    teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    keras_distill.TeacherCache.build(teacher, np.ones((4, 4), "float32"), folder)


@pytest.mark.parametrize("build", [build_lightning, build_keras])
def test_the_locks_file_stays(tmp_path: Path, build: Callable[[Path], None]) -> None:
    """A waiting process has the file open; if it were removed, a third process could lock a new file of that name."""
    with locked(tmp_path):
        file = (tmp_path / LOCK).stat().st_ino
    build(tmp_path)
    assert (tmp_path / LOCK).stat().st_ino == file


@pytest.mark.parametrize("build", [build_lightning, build_keras])
def test_a_build_is_refused_while_another_process_holds_the_lock(tmp_path: Path, build: Callable[[Path], None]) -> None:
    with locked(tmp_path), pytest.raises(CacheError, match="to be free, but another process is building there"):
        build(tmp_path)
    build(tmp_path)


@pytest.mark.parametrize("build", [build_lightning, build_keras])
def test_a_build_into_a_folder_of_other_things_leaves_it_alone(tmp_path: Path, build: Callable[[Path], None]) -> None:
    (tmp_path / "thesis.tmp").write_text("my thesis")
    with pytest.raises(CacheError, match=r"to be empty or to hold a cache, but it holds 'thesis\.tmp'"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tmp"]
    assert (tmp_path / "thesis.tmp").read_text() == "my thesis"


class Failing(torch.utils.data.TensorDataset):
    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk of this machine is gone")


class FailingLater(torch.utils.data.TensorDataset):
    """Fails in the middle of the build."""

    read = 0

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if self.read > 30:
            raise OSError("the disk of this machine is gone")
        return super().__getitem__(index)


def teacher_of(rank: int) -> torch.nn.Module:
    return network(8, seed=rank)


# The build in each rank, and the error's text in rank 0 and in rank 1.
TOGETHER: dict[str, tuple[Callable[[int, Path], Any], str, str]] = {
    "a folder of other things": (
        lambda rank, folder: TeacherCache.build(network(8), table(), folder / "other", progress=False),
        "it holds 'thesis.tmp'",
        "the process of rank 0 failed: CacheError: Expected",
    ),
    "data that rank 1 cannot read": (
        lambda rank, folder: TeacherCache.build(
            network(8), (Failing if rank else torch.utils.data.TensorDataset)(*table().tensors), folder / "a"
        ),
        "the process of rank 1 failed: OSError: the disk",
        "the disk of this machine is gone",
    ),
    "data that rank 0 cannot read to the end": (
        lambda rank, folder: TeacherCache.build(
            network(8),
            (torch.utils.data.TensorDataset if rank else FailingLater)(*table().tensors),
            folder / "b",
            batch_size=4,
            shard_bytes=1,
            progress=False,
        ),
        "the disk of this machine is gone",
        "the process of rank 0 failed: OSError: the disk",
    ),
    "another teacher in each rank": (
        lambda rank, folder: TeacherCache.build(teacher_of(rank), table(), folder / "c", progress=False),
        "the process of rank 1 failed: CacheError: Expected",
        "it was begun with teacher=",
    ),
}


def _rank(rank: int, folder: str, meeting: str) -> None:
    # a rank that is left alone in a barrier raises an error after this time; they meet in a file, since another test
    # may take a port that was free before
    settings = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **settings)
    for number, (build, *_) in enumerate(TOGETHER.values()):
        try:
            build(rank, Path(folder))
            words = "no error"
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        (Path(folder) / f"{number}-{rank}.txt").write_text(words)
    TeacherCache.build(
        network(8), table(), Path(folder) / "d", progress=False
    ).verify()  # the processes are still in step
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_an_error_in_one_rank_ends_the_build_in_every_rank(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tmp").write_text("my thesis")
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), str(tmp_path / "meeting")), nprocs=2)
    for number, (name, (_, *expected)) in enumerate(TOGETHER.items()):
        for rank, words in enumerate(expected):
            assert words in (tmp_path / f"{number}-{rank}.txt").read_text(), (name, rank)


def test_a_process_builds_its_shards_though_another_one_has_begun_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "shard_bytes": 200, "progress": False}
    TeacherCache.build(network(8), table(), tmp_path / "whole", **settings)
    words = building.Builder.words

    def late(self: Any, writer: Any) -> str:
        """Called once the shards are divided: the process of rank 0 is faster and has written its first."""
        for file in (tmp_path / "whole").glob("shard-00000*"):
            shutil.copy(file, writer.folder)
        return words(self, writer)

    begin(tmp_path / "cache", TeacherCache.open(tmp_path / "whole").manifest, resume=False)
    monkeypatch.setattr(building, "process_rank", lambda: (1, 2))
    monkeypatch.setattr(building.Builder, "words", late)
    with pytest.raises(CacheError, match="it is not complete"):
        TeacherCache.build(network(8), table(), tmp_path / "cache", **settings)

    lists = sorted(int(file.stem[6:]) for file in (tmp_path / "cache").glob("shard-*.json"))
    assert lists == [0, 1, 3]
