"""``lightning-distill cache build|merge|info|verify`` (C16, C20)."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_core.cli.lightning import main
from lightning_distill import TeacherCache

FILE = """
path: cache
teacher: {class_path: cache_nets.network, init_args: {width: 32}}
dataset: {class_path: cache_nets.table}
layers: ["1"]
top_k: 3
dtype: uint8
"""
Capture = pytest.CaptureFixture[str]


def written(folder: Path, text: str = FILE) -> str:
    (folder / "cache.yaml").write_text(text)
    return str(folder / "cache.yaml")


def test_c16_a_cache_is_built_described_and_verified(tmp_path: Path, capsys: Capture) -> None:
    """C16"""
    assert main(["cache", "build", written(tmp_path)]) == 0
    assert "40 rows" in capsys.readouterr().out
    assert TeacherCache.open(tmp_path / "cache").manifest.arrays["output"]["top_k"] == 3
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("40 items in 1 view(s)", "top 3, uint8", "feature0 (1, output)"))
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.endswith("cache: OK\n")


def test_c16_a_stream_is_built_by_key(tmp_path: Path, capsys: Capture) -> None:
    """C16, C18, C22: and described."""
    text = FILE.replace("cache_nets.table", "cache_nets.Numbered").replace("top_k: 3\ndtype: uint8", "sampled: 3")
    assert main(["cache", "build", written(tmp_path, text)]) == 2
    assert "or give `key` for a stream" in capsys.readouterr().err
    assert main(["cache", "build", written(tmp_path, text + "key: 1\nfeature_dtype: uint8\n")]) == 0
    assert "a stream, about " in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("40 items", "rows by key: 1", "3 drawn at random", "uint8"))
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0


def test_c16_a_broken_cache_exits_1_and_names_the_file(tmp_path: Path, capsys: Capture) -> None:
    """C16"""
    main(["cache", "build", written(tmp_path)])
    file = tmp_path / "cache" / "shard-00000.output.values.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    capsys.readouterr()
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lightning-distill cache verify: ")
    assert file.name in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (FILE.replace("top_k", "topk"), 2, "Expected `topk` to be a known key, but it is not. Closest: 'top_k'."),
        (FILE.replace("path: cache\n", ""), 2, "Expected `path` to be given, but it is not."),
        (FILE.replace("cache_nets.table", "cache_nets.tables"), 2, "Expected `dataset` to be a class_path"),
        (FILE.replace("top_k: 3", "top_k: 30"), 2, "Expected `top_k` to be 1 to 9"),
        (FILE.replace("top_k: 3", "top_k: 03"), 2, "Expected numbers without a leading 0 or a colon"),
        (FILE.replace("top_k: 3", "top_k: 1:30"), 2, "but got 1:30, line "),
        (FILE + "device: gpu\n", 2, "Expected `device` to name a device, but got device='gpu'."),
        (FILE + "device: cuda:9999\n", 2, "Expected `device` to be a device of this machine, but got device='cuda:9"),
        ("{]", 2, "Expected a YAML file"),
    ],
)
def test_c16_a_wrong_file_exits_2(tmp_path: Path, capsys: Capture, text: str, code: int, words: str) -> None:
    """C16: and nothing is written."""
    assert main(["cache", "build", written(tmp_path, text)]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("action", ["info", "verify", "build"])
def test_c16_a_missing_folder_exits_1(tmp_path: Path, capsys: Capture, action: str) -> None:
    """C16"""
    assert main(["cache", action, str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_parts_are_built_and_merged(tmp_path: Path, capsys: Capture) -> None:
    file = written(tmp_path, FILE + "shard_bytes: 100\nbatch_size: 8\n")
    folders = [str(tmp_path / f"cache-part-{number}-of-2") for number in (1, 2)]
    for number in (1, 2):
        assert main(["cache", "build", file, "--part", f"{number}/2"]) == 0
    capsys.readouterr()

    assert main(["cache", "merge", str(tmp_path / "cache"), folders[0]]) == 1
    assert "are missing, such as [1" in capsys.readouterr().err
    assert main(["cache", "merge", str(tmp_path / "cache"), *folders]) == 0
    assert capsys.readouterr().out.endswith("shards\n")
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0


@pytest.mark.parametrize(("part", "words"), [("3/2", "from 1/2 to 2/2, but got 3/2"), ("two", "like '3/16'")])
def test_a_part_that_does_not_exist_exits_2(tmp_path: Path, capsys: Capture, part: str, words: str) -> None:
    assert main(["cache", "build", written(tmp_path), "--part", part]) == 2
    assert words in capsys.readouterr().err


def test_a_cache_at_a_url_is_built_and_described(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "copies"))
    url = f"file://{tmp_path}/a store/cache"
    text = FILE.replace("path: cache\n", f"path: {url}\n")

    assert main(["cache", "build", written(tmp_path, text)]) == 0
    assert (tmp_path / "a store" / "cache" / "manifest.json").exists()
    assert main(["cache", "info", url]) == main(["cache", "verify", url]) == 0
    assert main(["cache", "build", written(tmp_path, text), "--part", "1/2"]) == 1
    assert "Expected a part of a cache to be in a folder on this machine" in capsys.readouterr().err
