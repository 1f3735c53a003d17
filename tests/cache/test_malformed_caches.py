"""Falsified folders are refused with the name of the file, in Python and on the command line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import FIRST, LISTS, MANIFESTS, falsify, manifest, write_cache

from distill_core import cache_files
from distill_core.cli.lightning import main
from distill_core.store import CacheError, Reader, begin

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    write_cache(folder)
    return folder


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "cache"))


def assert_refused(cache: Path, file: str, capsys: Capture, actions: tuple[str, ...] = ("info", "verify")) -> None:
    """Reading raises a CacheError that names the file; the commands exit with 1 and one line that names it."""
    with pytest.raises(CacheError) as raised:
        Reader(cache).verify()
    assert file in str(raised.value)
    assert len(str(raised.value)) < 1000
    for action in actions:
        assert main(["cache", action, str(cache)]) == 1
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert file in error
        assert "Traceback" not in error


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_falsified_manifest_is_refused_when_the_cache_is_opened(cache: Path, capsys: Capture, case: str) -> None:
    falsify(cache / "manifest.json", MANIFESTS[case])
    with pytest.raises(CacheError):
        Reader(cache)
    # a manifest that does not fit its files is refused at the first file that differs
    contradicts = case in {
        "shard_rows of 10**15",
        "a length of 10**15",
        "a length and shard_rows of 10**15",
        "views of 10**12",
        "a shape of 10**14",
        "another shape of as many bytes for each row",
        "another dtype",
        "ragged rows that are not",
        "keys that are not stored",
    }
    assert_refused(cache, "shard-0000" if contradicts else "manifest.json", capsys)


@pytest.mark.parametrize("case", LISTS)
def test_a_falsified_list_of_a_shard_is_refused_when_the_cache_is_opened(
    cache: Path, capsys: Capture, case: str
) -> None:
    falsify(cache / "shard-00000.json", LISTS[case])
    with pytest.raises(CacheError):
        Reader(cache)
    assert_refused(cache, FIRST if case == "another size" else "shard-00000.json", capsys)


def relisted(cache: Path, content: bytes, file: str = FIRST) -> None:
    """Replace a file, and list its new size and checksum, as an attacker would."""
    (cache / file).write_bytes(content)
    listed = json.loads((cache / "shard-00000.json").read_text())
    listed[file] = {"bytes": len(content), "blake2b": cache_files.checksum(cache / file)}
    (cache / "shard-00000.json").write_text(json.dumps(listed))


def npy(folder: Path, array: Any, **saving: Any) -> bytes:
    np.save(folder / "array.npy", array, **saving)
    return (folder / "array.npy").read_bytes()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(4 * 3 * 4)


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "more columns": lambda folder: npy(folder, np.zeros((3, 4), "float32")),
    "columns first": lambda folder: npy(folder, np.asfortranarray(np.zeros((4, 3), "float32"))),
    "one dimension": lambda folder: npy(folder, np.zeros(12, "float32")),
    "another dtype": lambda folder: npy(folder, np.zeros((4, 3), "int32")),
    "another byte order": lambda folder: npy(folder, np.zeros((4, 3), ">f4")),
    "objects": lambda folder: npy(folder, np.array([["x"] * 3] * 4, object), allow_pickle=True).ljust(176, b" "),
    "a header of too many rows": lambda folder: header("(400000000000, 3)"),
    "a header that is not a tuple": lambda folder: header("[[4, 3]]"),
    "a header of a deep nest": lambda folder: header("(" * 50),
    "a header that calls": lambda folder: header("__import__('os').getpid()"),
    "no header": lambda folder: bytes(176),
    "a zip file": lambda folder: b"PK\x03\x04".ljust(176, b"\0"),
    "NaN": lambda folder: npy(folder, np.full((4, 3), np.nan, "float32")),
    "an infinity": lambda folder: npy(folder, np.float32([[1, 2, 3]] * 3 + [[1, 2, np.inf]])),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_verify_reads_every_shard_as_training_does(cache: Path, tmp_path: Path, capsys: Capture, case: str) -> None:
    """The checksum is right, since an attacker can alter it too."""
    relisted(cache, ARRAYS[case](tmp_path))
    assert_refused(cache, FIRST, capsys, ("verify",))
    if case not in ("NaN", "an infinity"):  # these are numbers; wrong numbers are the only harm that a cache can do
        with pytest.raises(CacheError, match=FIRST):
            Reader(cache).read([0])


def test_indices_of_classes_that_do_not_exist_are_refused(cache: Path, tmp_path: Path, capsys: Capture) -> None:
    """Three bits hold the indices of five classes, and could hold a seventh: the loss would read out of bounds."""
    name = "shard-00000.output.high.npy"
    relisted(cache, npy(tmp_path, np.full_like(np.load(cache / name), 255)), name)
    assert_refused(cache, "shard-00000.output", capsys, ("verify",))
    with pytest.raises(CacheError, match="class indices below 5, but got 7"):
        Reader(cache).read([0])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["link out of the folder", "link to itself", "folder", "pipe"])
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.json", FIRST])
def test_a_name_that_is_not_a_plain_file_of_the_folder_is_refused(
    cache: Path, tmp_path: Path, capsys: Capture, name: str, kind: str
) -> None:
    file = cache / name
    file.rename(tmp_path / "elsewhere")
    if kind == "link out of the folder":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    assert_refused(cache, name, capsys)


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_read(cache: Path, tmp_path: Path) -> None:
    (cache / FIRST).rename(cache / "renamed.npy")
    (cache / FIRST).symlink_to("renamed.npy")
    (tmp_path / "linked").symlink_to(cache)
    Reader(tmp_path / "linked").verify()


def test_a_good_cache_passes_and_every_file_is_reported(cache: Path, capsys: Capture) -> None:
    names: list[str] = []
    Reader(cache).verify(names.append)
    assert sorted(names) == sorted(path.name for path in cache.glob("*.npy"))
    assert main(["cache", "verify", str(cache)]) == 0
    assert capsys.readouterr().out == f"{cache}: OK\n"


def test_a_reader_pickles_without_its_memory_maps(tmp_path: Path) -> None:
    write_cache(tmp_path, arrays={"output": {"shape": [3000], "dtype": "float32"}}, layers={}, shard_rows=1)
    reader = Reader(tmp_path)
    rows = reader.read(range(8))["output"]
    pickled = pickle.dumps(reader)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).read(range(8))["output"], rows)


def test_a_file_is_compared_with_its_checksum_once_in_a_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read, checksum = Reader(cache), [], cache_files.checksum
    monkeypatch.setattr(cache_files, "checksum", lambda path: (read.append(path.name), checksum(path))[1])
    for _ in range(2):
        reader.read([0, 1])
    assert len(read) == len(set(read)) == 4  # the columns of the first shard


def test_a_build_removes_only_its_own_unfinished_files(tmp_path: Path) -> None:
    begin(tmp_path, manifest(), resume=True)
    kept = ["thesis.tmp", "shard-00000.json.tmp", ".thesis.distill-partial", ".shard-1.json.distill-partial"]
    removed = [f".{FIRST}.distill-partial", ".building.json.distill-partial"]
    for name in kept + removed:
        (tmp_path / name).write_text("x")
    write_cache(tmp_path)
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in removed if (tmp_path / name).exists()] == []


@pytest.mark.parametrize("name", ["thesis.tmp", "shard-00000.json", "data"])
def test_a_folder_that_holds_other_things_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("my thesis")
    (tmp_path / ".gitignore").write_text("*")
    with pytest.raises(CacheError, match=rf"to be empty or to hold a cache, but it holds '{name}'\. Choose a new"):
        begin(tmp_path, manifest(), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".gitignore", name])
    (tmp_path / name).unlink()
    write_cache(tmp_path)
    Reader(tmp_path).verify()


def test_a_manifest_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(CacheError, match=r"manifest\.json to be of format version 1 to 2, but got none"):
        begin(tmp_path, manifest(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_that_no_reader_accepts_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="`views`"):
        begin(tmp_path / "cache", manifest(views=0), resume=True)
    assert not list((tmp_path / "cache").glob("*"))
