"""A small cache written with NumPy alone, and many ways to falsify its JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill_core.store import Manifest, Writer, begin

LENGTH, CLASSES = 8, 5


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "length": LENGTH,
        "views": 1,
        "shard_rows": 4,
        "arrays": {
            "output": {"shape": [CLASSES], "dtype": "float16", "top_k": 2},
            "feature0": {"shape": [3], "dtype": "float32"},
        },
        "layers": {"feature0": "body|output"},
        "teacher": {"class": "Net", "fingerprint": "0" * 32},
        "data": {"fingerprint": "1" * 32, "transform_seed": None, "stale": False, "kind": "torch"},
        "versions": {"numpy": "2.0"},
    }
    return Manifest(**{**fields, **changes})


def write_cache(folder: Path, **changes: Any) -> None:
    """A complete cache of two shards."""
    described = manifest(**changes)
    begin(folder, described, resume=True)
    writer, generator = Writer(folder, described), np.random.default_rng(0)
    for shard in writer.missing:
        rows = len(described.shard_range(shard))
        values = {name: generator.random((rows, *facts["shape"])) for name, facts in described.arrays.items()}
        writer.write(shard, [{name: array.astype("float32") for name, array in values.items()}])
    writer.finish()


def parent(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the last key of a path with slashes, and the key."""
    *parents, key = path.split("/")
    for name in parents:
        values = values[name]
    return values, key


def at(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """An edit that sets the value at a path with slashes."""

    def edit(values: dict[str, Any]) -> Any:
        section, key = parent(values, path)
        section[key] = value
        return values

    return edit


def without(path: str) -> Callable[[dict[str, Any]], Any]:
    """An edit that removes the key at a path with slashes."""

    def edit(values: dict[str, Any]) -> Any:
        section, key = parent(values, path)
        del section[key]
        return values

    return edit


def named(name: str) -> Callable[[dict[str, Any]], Any]:
    """An edit that renames the feature."""

    def edit(values: dict[str, Any]) -> Any:
        values["arrays"][name] = values["arrays"].pop("feature0")
        values["layers"][name] = values["layers"].pop("feature0")
        return values

    return edit


# Each value is an edit of the manifest's object, or the whole content of its file.
MANIFESTS: dict[str, Callable[[dict[str, Any]], Any] | bytes] = {
    "shard_rows of 0": at("shard_rows", 0),
    "shard_rows that is a fraction": at("shard_rows", 4.0),
    "shard_rows of 10**15": at("shard_rows", 10**15),
    "a length in words": at("length", "8"),
    "a negative length": at("length", -8),
    "a length of 0": at("length", 0),
    "a length that is true": at("length", True),
    "a length of 10**15": at("length", 10**15),
    "a length and shard_rows of 10**15": lambda values: {**values, "length": 10**15, "shard_rows": 10**15},
    "a length of 10**400": at("length", 10**400),
    "a length of null": at("length", None),
    "no length": without("length"),
    "views of 0": at("views", 0),
    "views of 10**12": at("views", 10**12),
    "more rows than a number can count": lambda values: {**values, "length": 2**50, "views": 2**50},
    "another version": at("version", 99),
    "a version that is true": at("version", True),
    "an unknown field": at("compressed", True),
    "arrays in a list": at("arrays", []),
    "no arrays at all": lambda values: {**values, "arrays": {}, "layers": {}},
    "an array that is a list": at("arrays/output", []),
    "an array without a shape": without("arrays/output/shape"),
    "an array without a dtype": without("arrays/output/dtype"),
    "an array with an unknown field": at("arrays/output/codec", "x"),
    "a shape in words": at("arrays/output/shape", "5"),
    "a shape of 10**14": at("arrays/feature0/shape", [10**14]),
    "a negative shape": at("arrays/feature0/shape", [-3]),
    "a shape whose negatives cancel out": at("arrays/feature0/shape", [-3, -1]),
    "a shape with a 0": at("arrays/feature0/shape", [3, 0]),
    "a shape of fractions": at("arrays/feature0/shape", [3.0]),
    "a shape of 40 dimensions": at("arrays/feature0/shape", [1] * 39 + [3]),
    "another shape of as many bytes for each row": at("arrays/feature0/shape", [2]),
    "a shape whose product overflows": at("arrays/feature0/shape", [2**40, 2**40]),
    "no number of classes": at("arrays/output/shape", []),
    "an unknown dtype": at("arrays/feature0/dtype", "int8"),
    "a dtype of objects": at("arrays/feature0/dtype", "O"),
    "a dtype of 8 bits without top_k": at("arrays/feature0/dtype", "uint8"),
    "another dtype": at("arrays/feature0/dtype", "float16"),
    "top_k of 0": at("arrays/output/top_k", 0),
    "top_k as large as the classes": at("arrays/output/top_k", CLASSES),
    "top_k of null": at("arrays/output/top_k", None),
    "top_k of true": at("arrays/output/top_k", True),
    "top_k of a feature": at("arrays/feature0/top_k", 2),
    "ragged of a fraction": at("arrays/output/ragged", 1.5),
    "ragged rows that are not": at("arrays/feature0/ragged", "attention_mask"),
    "channels of -1": at("arrays/feature0/channels", -1),
    "channels that the shape does not have": at("arrays/feature0/channels", 1),
    "channels of the output": at("arrays/output/channels", 0),
    "one sampled class": at("arrays/output/sampled", 1),
    "sampled classes of a feature": at("arrays/feature0/sampled", 2),
    "a key in words": at("key", "id"),
    "a key of an unknown kind": at("key", {"kind": "rows"}),
    "a key without its column": at("key", {"kind": "column"}),
    "a key with a column that is a list": at("key", {"kind": "column", "column": ["id"]}),
    "keys that are not stored": at("key", {"kind": "content"}),
    "no key": without("key"),
    "a field of the second format in the first": at("version", 1),
    "a name that leaves the folder": named("./../../secret/x"),
    "a name that is absolute": named("/etc/passwd"),
    "a name with leading zeros": named("feature00"),
    "an unknown name": named("hidden"),
    "an empty name": named(""),
    "layers of null": at("layers", None),
    "a layer that is a number": at("layers/feature0", 3),
    "a layer without a side": at("layers/feature0", "body"),
    "a layer of an unknown side": at("layers/feature0", "body|middle"),
    "a layer without an array": at("layers/feature1", "body|output"),
    "no layer for an array": without("layers/feature0"),
    "a teacher of null": at("teacher", None),
    "a teacher without a fingerprint": without("teacher/fingerprint"),
    "a teacher whose fingerprint is a number": at("teacher/fingerprint", 0),
    "data whose fingerprint is null": at("data/fingerprint", None),
    "a teacher whose class is a list": at("teacher/class", ["Net"]),
    "a teacher that holds a nest": at("teacher/more", [[[]]]),
    "no data": without("data"),
    "data of an unknown kind": at("data/kind", "jax"),
    "data whose kind is a list": at("data/kind", ["torch"]),
    "a negative transform_seed": at("data/transform_seed", -1),
    "a transform_seed in words": at("data/transform_seed", "0"),
    "stale of 1": at("data/stale", 1),
    "no stale": without("data/stale"),
    "versions in a list": at("versions", []),
    "a version of a library that is a number": at("versions/numpy", 2),
    "a list": lambda values: [values],
    "a number": b"1",
    "an empty file": b"",
    "a file that is not JSON": b"{]",
    "a deep nest": b"[" * 100_000,
    "a deep nest of objects": b'{"version": ' * 100_000,
    "a file that is not text": b"\xff\xfe\x00{",
    "NaN": lambda values: json.dumps({**values, "length": float("nan")}).encode(),
    "Infinity": lambda values: json.dumps({**values, "length": float("inf")}).encode(),
    "1e400": lambda values: json.dumps(values).replace('"length": 8', '"length": 1e400').encode(),
    "a number of 10,000 digits": lambda values: (
        json.dumps(values).replace('"length": 8', f'"length": {"9" * 10_000}').encode()
    ),
    "a field twice": lambda values: json.dumps(values).replace('"length": 8', '"length": 8, "length": 8').encode(),
}

FIRST = "shard-00000.feature0.values.npy"
# The same for the list of the first shard's files.
LISTS: dict[str, Callable[[dict[str, Any]], Any] | bytes] = {
    "no sizes": at(FIRST, {}),
    "facts of null": at(FIRST, None),
    "a size in words": at(f"{FIRST}/bytes", "176"),
    "a negative size": at(f"{FIRST}/bytes", -176),
    "another size": at(f"{FIRST}/bytes", 177),
    "no checksum": without(f"{FIRST}/blake2b"),
    "a checksum of null": at(f"{FIRST}/blake2b", None),
    "a checksum of another length": at(f"{FIRST}/blake2b", "0"),
    "a file that leaves the folder": lambda values: {**values, "../x": {"bytes": 1, "blake2b": "0" * 32}},
    "a missing file": without(FIRST),
    "a list": b"[]",
    "a file that is not JSON": b"{]",
    "a deep nest": b"[" * 100_000,
    "a file that is not text": b"\xff\xfe\x00{",
}


def falsify(file: Path, edit: Callable[[dict[str, Any]], Any] | bytes) -> None:
    """Apply an edit of one of the tables to a file."""
    changed = edit if isinstance(edit, bytes) else edit(json.loads(file.read_text()))
    file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
