"""Merges and imports that kill -9 has ended: done again they give the same bytes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_core.arrays import manifest_of_outputs, named_arrays, teacher_of_arrays, write_arrays
from distill_core.parts import merge
from distill_core.storage import Storage

ROOT = Path(__file__).parents[2]
ROWS = np.random.default_rng(0).normal(size=(40, 3))

# kills itself in the middle of a file: half is written, and nothing is renamed
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from distill_core import cache_files
from test_killed import imported
from distill_core.parts import merge

left, fsync = int(sys.argv[3]), os.fsync

def sync(descriptor):
    global left
    left -= 1
    if left < 0:
        os.truncate(descriptor, 7)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

cache_files.os.fsync = sync
folders = [Path(folder) for folder in sys.argv[4:]]
merge(folders[0], folders[1:]) if folders[1:] else imported(folders[0])
"""


def imported(folder: Path) -> None:
    named, layers = named_arrays({"output": ROWS, "layer": ROWS[:, :2]})
    manifest = manifest_of_outputs(
        len(ROWS), layers, kind="torch", data=None, teacher=teacher_of_arrays(named), key=None
    )
    storage = Storage("float32", None, None, None)
    write_arrays(folder, named, manifest, storage, keys=None, mask=None, shard_bytes=100, resume=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def killed(after: int, *folders: Path) -> None:
    """Run the work in a process that is killed while it writes a file."""
    command = [sys.executable, "-c", KILLED, str(ROOT), str(ROOT / "tests" / "cache"), str(after), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    imported(folder)
    return folder


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")


@pytest.mark.parametrize("after", [0, 1, 9])
def test_an_import_that_was_killed_is_completed_to_the_same_bytes(tmp_path: Path, whole: Path, after: int) -> None:
    killed(after, tmp_path / "cache")
    assert len(files(tmp_path / "cache")) < len(files(whole))

    imported(tmp_path / "cache")

    assert files(tmp_path / "cache") == files(whole)


@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_merge_that_was_killed_is_completed_to_the_same_bytes(tmp_path: Path, whole: Path, after: int) -> None:
    parts = [Path(shutil.copytree(whole, tmp_path / str(number))) for number in range(2)]
    for number, part in enumerate(parts):
        for shard in part.glob("shard-*.json"):
            if int(shard.stem[6:]) % 2 != number:
                shard.unlink()
    killed(after, tmp_path / "merged", *parts)
    assert len(files(tmp_path / "merged")) < len(files(whole))

    merge(tmp_path / "merged", parts)

    assert files(tmp_path / "merged") == files(whole)
