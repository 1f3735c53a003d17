"""Caches at a URL (C19): built, read with a local copy of limited size, and from a store that fails now and then."""

from __future__ import annotations

import functools
import http.server
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from cache_nets import Module, network, table
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch import Trainer

from distill_core import remote
from distill_core.manifest import CacheError
from distill_core.remote import RemoteFolder
from lightning_distill import DistillCallback, TeacherCache

URL = "memory://bucket/cache"
SETTINGS: dict[str, Any] = {"dtype": "float32", "batch_size": 4, "shard_bytes": 200, "progress": False}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_WAIT", 0.0)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "local"
    assert TeacherCache.build(network(8), table(), path, **SETTINGS).manifest.shards == 10
    return path


@pytest.fixture
def stored(folder: Path) -> MemoryFileSystem:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/cache", recursive=True)
    return store


def outputs(seed: int = 0) -> np.ndarray:
    """The teacher's outputs, in the batches of the build: a matrix product of others may round in another way."""
    with torch.no_grad():
        batches = table().tensors[0].split(SETTINGS["batch_size"])
        return torch.cat([network(8, seed=seed)(batch) for batch in batches]).numpy()


def arrays(local: Path) -> list[Path]:
    return sorted(local.rglob("*.npy"))


def test_a_cache_is_built_at_a_url_as_in_a_folder(folder: Path) -> None:
    cache = TeacherCache.build(network(8), table(), URL, **SETTINGS)

    store = fsspec.filesystem("memory")
    names = {Path(place).name: place for place in store.ls("/bucket/cache", detail=False)}
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    assert {name: store.cat_file(place) for name, place in names.items()} == expected
    np.testing.assert_allclose(cache.read(range(40))["output"], outputs(), rtol=1e-6)


def test_a_read_file_is_copied_once_and_the_others_not_at_all(stored: MemoryFileSystem, tmp_path: Path) -> None:
    cache = TeacherCache.open(URL, local=tmp_path / "here")
    assert arrays(tmp_path / "here") == []

    np.testing.assert_allclose(cache.read([0, 3, 9])["output"], outputs()[[0, 3, 9]], rtol=1e-6)
    assert [path.name[:11] for path in arrays(tmp_path / "here")] == ["shard-00000", "shard-00002"]
    stored.rm("/bucket/cache/shard-00000.output.values.npy")
    np.testing.assert_allclose(TeacherCache.open(URL, local=tmp_path / "here").read([1])["output"], outputs()[[1]])


def test_the_local_copy_keeps_to_its_limit(stored: MemoryFileSystem, tmp_path: Path) -> None:
    size = stored.info("/bucket/cache/shard-00000.output.values.npy")["size"]
    cache = TeacherCache.open(URL, local=tmp_path / "here", local_bytes=3 * size)

    for rows in np.random.default_rng(0).integers(40, size=(30, 2)):
        np.testing.assert_allclose(cache.read(rows)["output"], outputs()[rows], rtol=1e-6)
        assert len(arrays(tmp_path / "here")) <= 3
    np.testing.assert_allclose(cache.read(range(40))["output"], outputs(), rtol=1e-6)  # more shards than fit
    with pytest.raises(CacheError, match=f"Expected `local_bytes` to hold a file of {size} bytes, but got 100"):
        TeacherCache.open(URL, local=tmp_path / "small", local_bytes=100).read([0])


class Failing:
    """Makes every third opening of a file fail, in one of two ways."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.failures, self.original = 0, 0, MemoryFileSystem._open
        monkeypatch.setattr(MemoryFileSystem, "_open", lambda store, path, *a, **k: self.open(store, path, *a, **k))

    def open(self, store: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count % 3:
            return self.original(store, path, *args, **kwargs)
        self.failures += 1
        if self.failures % 2:
            raise RuntimeError("connection reset")
        file = self.original(store, path, *args, **kwargs)
        content = file.read()
        return fsspec.implementations.memory.MemoryFile(None, None, content[: len(content) // 2])


def test_a_store_that_fails_every_third_time_gives_the_same_numbers(
    stored: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch)

    np.testing.assert_allclose(TeacherCache.open(URL).read(range(40))["output"], outputs(), rtol=1e-6)
    assert failing.failures > 5


def test_a_store_that_always_fails_is_an_error_that_names_the_file(
    stored: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TeacherCache.open(URL)
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda *a, **k: (_ for _ in ()).throw(TimeoutError("too late")))

    with pytest.raises(CacheError, match=r"shard-00000\.json to be readable, but reading failed 5 times: too late"):
        cache.read([0])


def test_missing_damaged_and_oversized_files_are_named(stored: MemoryFileSystem) -> None:
    with pytest.raises(CacheError, match=r"memory://bucket/none/manifest\.json to exist, but it does not"):
        TeacherCache.open("memory://bucket/none")
    stored.rm("/bucket/cache/shard-00001.output.values.npy")
    content = bytearray(stored.cat_file("/bucket/cache/shard-00002.output.values.npy"))
    stored.pipe_file("/bucket/cache/shard-00003.output.values.npy", bytes(content) + b"0" * 100)
    content[-1] ^= 1
    stored.pipe_file("/bucket/cache/shard-00002.output.values.npy", bytes(content))
    cache = TeacherCache.open(URL)

    for row, words in (
        (4, "to exist, but it does not"),
        (8, "checksum differs"),
        (12, "bytes at most, but it has more"),
    ):
        with pytest.raises(CacheError, match=rf"shard-0000{row // 4}\.output\.values\.npy.*{words}"):
            cache.read([row])


def test_a_copy_that_was_damaged_here_is_fetched_again(stored: MemoryFileSystem, tmp_path: Path) -> None:
    TeacherCache.open(URL, local=tmp_path / "here").read([0])
    (copy,) = arrays(tmp_path / "here")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")

    cache = TeacherCache.open(URL, local=tmp_path / "here")
    np.testing.assert_allclose(cache.read([0])["output"], outputs()[:1], rtol=1e-6)


def test_another_cache_at_the_same_url_is_not_mixed_with_the_first(stored: MemoryFileSystem, tmp_path: Path) -> None:
    TeacherCache.open(URL).read(range(40))
    TeacherCache.build(network(8, seed=7), table(), tmp_path / "other", **SETTINGS)
    stored.put(str(tmp_path / "other"), "/bucket/cache", recursive=True)
    for path in (tmp_path / "other").iterdir():
        stored.put_file(str(path), f"/bucket/cache/{path.name}")

    np.testing.assert_allclose(TeacherCache.open(URL).read(range(40))["output"], outputs(seed=7), rtol=1e-6)


def test_a_copy_to_a_store_that_cannot_be_written_keeps_the_build(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(CacheError, match=r"memory://bucket/cache to be writable, but: PermissionError: no\."):
        TeacherCache.build(network(8), table(), URL, **SETTINGS)
    monkeypatch.undo()
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "home"))

    built = [path for path in (tmp_path / "home").rglob("*.npy") if "build" in path.parts]
    assert len(built) == 10
    changed = {path: path.stat().st_mtime_ns for path in built}
    TeacherCache.build(network(8), table(), URL, **SETTINGS)  # copies alone
    assert {path: path.stat().st_mtime_ns for path in built} == changed
    assert len(fsspec.filesystem("memory").ls("/bucket/cache")) == 21


@pytest.fixture
def http_url(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """No-op: the tests print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_training_reads_from_a_http_server_in_its_workers(http_url: str, folder: Path) -> None:
    def trained(path: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Module(table(), num_workers=2, shuffle=False)
        cache = TeacherCache.open(path)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(
            max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[DistillCallback(cache)], **quiet
        ).fit(module)
        return [parameter.detach() for parameter in module.model.parameters()]

    for weight, expected in zip(trained(http_url), trained(folder), strict=True):
        assert torch.equal(weight, expected)


def test_a_reader_may_be_sent_to_another_process(stored: MemoryFileSystem) -> None:
    reader = pickle.loads(pickle.dumps(TeacherCache.open(URL).reader))

    np.testing.assert_allclose(reader.read(np.arange(40))["output"], outputs(), rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        (Path("s3://bucket/cache"), {}, "Expected a URL to be a string, but got PosixPath"),
        ("nowhere://x/y", {}, "Expected fsspec to know the store of nowhere://x/y, but: .*Install fsspec"),
        (URL, {"local_bytes": 0}, "Expected `local_bytes` to be a whole number of 1 or more, but got 0"),
        ("folder", {"local": "x"}, "Expected `local` and `local_bytes` to be None for a folder on this machine"),
    ],
)
def test_wrong_settings_are_refused(path: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(path, **settings)


def test_fsspec_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)

    with pytest.raises(CacheError, match="Install fsspec and the package of the store"):
        RemoteFolder(URL)
    shutil.rmtree("home", ignore_errors=True)


def test_a_url_that_holds_another_cache_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = TeacherCache.build(network(8), table(), URL, **SETTINGS).read(range(40))["output"]
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "another machine"))

    with pytest.raises(CacheError, match=r"Expected memory://bucket/cache to be empty or to hold the same cache, but"):
        TeacherCache.build(network(8, seed=7), table(), URL, **SETTINGS)
    np.testing.assert_array_equal(TeacherCache.open(URL).read(range(40))["output"], first)


def test_files_of_equal_size_from_another_copy_are_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    TeacherCache.build(network(8), table(), URL, **SETTINGS)
    store.rm_file("/bucket/cache/manifest.json")  # a copy that was stopped
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "another machine"))

    cache = TeacherCache.build(network(8, seed=7), table(), URL, **SETTINGS)
    np.testing.assert_allclose(cache.read(range(40))["output"], outputs(seed=7), rtol=1e-6)


def test_an_open_reader_does_not_read_the_cache_that_took_the_place_of_its_own(
    stored: MemoryFileSystem, tmp_path: Path
) -> None:
    cache = TeacherCache.open(URL)
    cache.read([0])
    TeacherCache.build(network(8, seed=7), table(), tmp_path / "other", **SETTINGS)
    for path in (tmp_path / "other").iterdir():
        stored.put_file(str(path), f"/bucket/cache/{path.name}")

    np.testing.assert_allclose(cache.read([1])["output"], outputs()[[1]], rtol=1e-6)
    for _ in range(2):
        with pytest.raises(CacheError, match="another one has taken its place"):
            cache.read([39])
