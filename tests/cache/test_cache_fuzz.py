"""Thousands of random edits of a cache: numbers of the right shape, or an error that names a file (C25)."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import manifest, write_cache

from distill_core import cache_files
from distill_core.columns import Ragged
from distill_core.store import CacheError, Manifest, Reader, Writer, begin

EDITS = 600
MOST_MEMORY = 2**22  # bytes; the files have a few kilobytes, and checksums are taken in pieces of a megabyte
LENGTHS = [3, 0, 2, 1, 4, 2, 2, 1]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    2**31,
    2**53,
    2**70,
    1.5,
    "",
    "x",
    "../../secret",
    [],
    {},
    [5],
    [2**40],
]
VALUES += [[-1], ["a"], "float16", "uint8", "attention_mask", {"kind": "function"}, {"kind": "column", "column": "id"}]
FIELDS = ("length", "views", "shard_rows", "shape", "dtype", "top_k", "sampled", "channels", "ragged", "key", "version")


def write_ragged(folder: Path) -> None:
    """Two shards of sequences with keys, drawn classes and features in 8 bits."""
    described: Manifest = manifest(
        arrays={
            "output": {"shape": [20], "dtype": "uint8", "sampled": 3, "ragged": "attention_mask"},
            "feature0": {"shape": [3], "dtype": "uint8", "channels": 0, "ragged": "attention_mask"},
            "feature1": {"shape": [2], "dtype": "bfloat16"},
        },
        layers={"feature0": "body|output", "feature1": "pool|output"},
        key={"kind": "column", "column": "id"},
    )
    begin(folder, described, resume=True)
    writer, generator = Writer(folder, described), np.random.default_rng(0)
    for shard in writer.missing:
        rows = list(described.shard_range(shard))
        lengths = np.array([LENGTHS[row] for row in rows])
        batch: dict[str, Any] = {}
        for name, facts in described.arrays.items():
            number = lengths.sum() if "ragged" in facts else len(rows)
            values = generator.standard_normal((number, *facts["shape"])).astype("float32")
            batch[name] = Ragged(values, lengths) if "ragged" in facts else values
        writer.write(shard, [{**batch, "key": np.array([rows, rows], "uint64").T + 10}])
    writer.finish()


def relist(folder: Path, file: Path) -> None:
    """Enter a file's new size and checksum into its list, as an attacker would."""
    listed = folder / f"{file.name.split('.')[0]}.json"
    try:
        values = json.loads(listed.read_text())
        values[file.name] = {"bytes": file.stat().st_size, "blake2b": cache_files.checksum(file)}
        listed.write_text(json.dumps(values))
    except (ValueError, TypeError, OSError, UnicodeDecodeError):
        pass  # the list is damaged too


def edit_json(file: Path, draw: random.Random) -> None:
    """Replace, remove or add a field at any depth."""
    values = json.loads(file.read_text())
    section, trail = values, [values]
    while True:
        inner = [value for value in section.values() if isinstance(value, dict)]
        if not inner or draw.random() < 0.3:
            break
        section = draw.choice(inner)
        trail.append(section)
    name = draw.choice([*section, draw.choice(FIELDS)])
    if draw.random() < 0.15:
        section.pop(name, None)
    else:
        section[name] = draw.choice(VALUES)
    file.write_text(json.dumps(values))


def edit(folder: Path, draw: random.Random) -> str:
    """One edit of one file, or of two."""
    files = sorted(folder.iterdir())
    file, other = draw.sample(files, 2)
    kinds = ["flip", "flip", "truncate", "extend", "swap", "copy", "remove", "header"]
    kind = draw.choice(["json"] * 6 + ["flip"] if file.suffix == ".json" else kinds)
    content = bytearray(file.read_bytes())
    if kind == "json":
        try:
            edit_json(file, draw)
        except ValueError:
            kind = "json that was damaged before"
    elif kind == "flip":
        # mostly in the numbers after the header
        start = 128 if file.suffix == ".npy" and len(content) > 128 and draw.random() < 0.8 else 0
        for _ in range(draw.choice([1, 1, 4, 40])):
            content[draw.randrange(start, len(content))] = draw.randrange(256)
        file.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(1, len(content))])
    elif kind == "extend":
        file.write_bytes(content + bytes(draw.choice([1, 4, 400])))
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "copy":
        file.write_bytes(other.read_bytes())
    elif kind == "remove":
        file.unlink()
    else:
        shape = draw.choice([b"(400000000000,", b"(-1,", b"(2,", b"(True,"])
        file.write_bytes(bytes(content).replace(b"(4,", shape))
    if file.suffix == ".npy" and file.exists() and draw.random() < 0.7:
        relist(folder, file)
    return f"{kind} of {file.name}"


def is_right(reader: Reader) -> bool:
    """Whether everything that is read has the shape that the manifest says."""
    rows = np.arange(min(reader.manifest.rows, 50))
    right = True
    for name, values in reader.read(rows).items():
        shape = tuple(reader.manifest.arrays[name]["shape"])
        count = len(rows)
        if isinstance(values, Ragged):
            count, values = int(values.lengths.sum()), values.values
        if isinstance(values, tuple):
            right &= values[0].shape == values[1].shape == (count, *shape[:-1], values[0].shape[-1])
            right &= bool((values[0] < shape[-1]).all() and (values[0] >= 0).all())
        else:
            right &= values.shape == (count, *shape)
    if reader.manifest.key is not None:
        found_rows = reader.find(np.arange(30, dtype="uint64"))
        right &= found_rows.shape == (30,) and bool((found_rows < reader.manifest.rows).all())
        right &= reader.input_digests(rows).shape == (len(rows),)
    return right


def write_top_k(folder: Path) -> None:
    """The likeliest classes in 8 bits."""
    write_cache(folder, arrays={"output": {"shape": [300], "dtype": "uint8", "top_k": 4}}, layers={})


@pytest.mark.parametrize("write", [write_cache, write_top_k, write_ragged])
def test_c25_edited_files_give_numbers_of_the_right_shape_or_an_error_with_their_name(
    tmp_path: Path, write: Any
) -> None:
    """C25: also with checksums that fit; neither memory nor paths beyond the folder."""
    folder, draw = tmp_path / "cache", random.Random(4)
    write(folder)
    assert is_right(Reader(folder))
    original = {file.name: file.read_bytes() for file in folder.iterdir()}
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for number in range(EDITS):
        edits = [edit(folder, draw) for _ in range(draw.choice([1, 1, 2]))]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            reader = Reader(folder)
            assert is_right(reader), edits
            reader.verify()
            outcomes["read"] += 1
        except CacheError as error:
            words = str(error)
            assert "manifest.json" in words or "shard-0000" in words, (number, edits, words)
            assert len(words) < 1500, edits
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"edit {number}: {edits}") from error
        assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY, edits
        for name, content in original.items():
            if not (folder / name).exists() or (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)
    tracemalloc.stop()
    assert outcomes["refused"] > EDITS / 2
    assert outcomes["read"] > EDITS / 50
