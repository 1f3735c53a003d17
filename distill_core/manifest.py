"""The manifest of a teacher cache, and the checks of everything that is read from its JSON files.

A cache may come from an untrusted source. Every value in its files is checked against a table of rules before it is
used. A folder that breaks a rule is refused with a :class:`CacheError` that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from distill_core.codecs import make
from distill_core.columns import Codec, Column
from distill_core.terminal import short

FORMAT_VERSION: Final = 2
BY_KEY: Final = "by key"  # stands for the digest of the data where samples are found by key
KEY: Final = "key"  # the name of the keys among a shard's files
MANIFEST, BUILDING = "manifest.json", "building.json"
_NAME: Final = re.compile(r"output|feature(0|[1-9][0-9]{0,4})")
_LARGEST: Final = 2**53  # the largest integer that every JSON reader holds exactly
_MOST_DIMENSIONS: Final = 30  # NumPy has arrays of 32 at most before version 2, and rows are stacked


Content = bytes  # `Manifest.bytes` hides the built-in name in its class


class CacheError(ValueError):
    """A folder that is not a complete cache, or not the requested one."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a cache.

    Attributes:
        length: Number of samples in the data; 0 for a stream while it is being built.
        views: Number of augmented views of each sample.
        shard_rows: Rows in a shard; the last may have fewer.
        arrays: Description of each stored array by its name, ``"output"`` or ``"feature0"``...: ``shape`` of an item,
            ``dtype``; ``top_k`` where only the likeliest classes are stored, ``sampled`` where some are drawn at
            random; ``channels`` where each channel has a scale, its dimension; and ``ragged`` where rows have differing
            lengths and an item is a position of a row: the place of the mask of the tokens in a batch, None for a
            function.
        layers: The layer that each feature comes from, by its name in ``arrays``.
        teacher: ``class`` and ``fingerprint`` of the teacher.
        data: ``fingerprint`` of the data and ``transform_seed``.
        versions: Versions of the libraries that wrote it.
        version: Version of the format; 1 has neither ragged rows nor keys.
        key: Where the keys of the samples come from, if rows are found by key and not by number: ``kind`` is
            ``"column"`` with its ``column``, ``"content"`` or ``"function"``.
    """

    length: int
    views: int
    shard_rows: int
    arrays: dict[str, dict[str, Any]]
    layers: dict[str, str]
    teacher: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    version: int = FORMAT_VERSION
    key: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        """Number of rows: samples times views."""
        return self.length * self.views

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The rows of a shard; of a stream whose length is not known yet those of a full shard."""
        stop = (shard + 1) * self.shard_rows
        return range(shard * self.shard_rows, min(stop, self.rows) if self.length else stop)

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each array."""
        return {name: make(description) for name, description in self.arrays.items()}

    def is_ragged(self, name: str) -> bool:
        """Whether the rows of an array have differing lengths."""
        return name in self.arrays and "ragged" in self.arrays[name]

    @property
    def columns(self) -> dict[tuple[str, str], Column]:
        """The stored arrays of a shard, by the name of the array and of the column."""
        columns = {
            (name, column): described
            for name, codec in self.codecs.items()
            for column, described in codec.columns.items()
        }
        columns |= {(name, "lengths"): Column((), "uint32", "row") for name in self.arrays if self.is_ragged(name)}
        return columns if self.key is None else {**columns, (KEY, "values"): Column((2,), "uint64", "row")}

    def to_json(self) -> str:
        """The text of the manifest's file."""
        values = asdict(self)
        if self.version == 1:
            del values["key"]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, content: Content, file: Path) -> Manifest:
        """The manifest in a file's content.

        Args:
            content: The bytes of the file.
            file: The file, for messages.

        Raises:
            CacheError: If the content is not a manifest, is one of another format version, or breaks a rule.

        Example:
            >>> Manifest.from_json(b'{"version": 1, "length": -3}', Path("manifest.json"))
            Traceback (most recent call last):
            distill_core.manifest.CacheError: Expected `length` in manifest.json to be a whole number from 1 to \
9007199254740992, but got length=-3. Build the cache again.
        """
        values = read_json(content, file)
        version = values.get("version")
        if among(1, FORMAT_VERSION)(version):
            got = "none" if version is None else short(version)
            raise CacheError(
                f"Expected {file} to be of format version 1 to {FORMAT_VERSION}, but got {got}. Build the cache again."
            )
        check(values, file)
        return cls(**values)


def read_json(content: bytes, file: Path) -> dict[str, Any]:
    """The object in a JSON file, which may come from an untrusted source.

    Args:
        content: The bytes of the file.
        file: The file, for messages.

    Returns:
        The object, without NaN, infinities and repeated keys.

    Raises:
        CacheError: If the content is anything else.
    """

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"it holds the number {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("it holds a key twice")
        return values

    try:
        values = json.loads(content.decode("utf-8"), parse_constant=refused, object_pairs_hook=unique)
    except RecursionError:
        raise CacheError(f"Expected a JSON object in {file}, but it is nested too deeply.") from None
    except ValueError as error:
        raise CacheError(f"Expected a JSON object in {file}, but got something else ({short(error)}).") from None
    if not isinstance(values, dict):
        raise CacheError(f"Expected a JSON object in {file}, but got a {type(values).__name__}.")
    return values


# A rule returns an empty string for a valid value, otherwise words for the value that it expects.
Rule = Callable[[Any], str]


def whole(minimum: int, maximum: int = _LARGEST) -> Rule:
    """Rule: a whole number from a minimum to a maximum; True is not a number."""
    words = f"a whole number from {minimum} to {maximum}"
    return lambda value: "" if type(value) is int and minimum <= value <= maximum else words


def text(limit: int = 10_000) -> Rule:
    """Rule: a string that is neither empty nor longer than a limit."""
    words = f"a string of 1 to {limit} characters"
    return lambda value: "" if isinstance(value, str) and 0 < len(value) <= limit else words


def matching(pattern: str, words: str) -> Rule:
    """Rule: a string that a pattern matches as a whole."""
    return lambda value: "" if isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) else words


def among(*choices: Any) -> Rule:
    """Rule: one of a few values, of the same type."""
    words = f"one of {', '.join(map(repr, choices))}"
    return lambda value: "" if any(type(value) is type(choice) and value == choice for choice in choices) else words


def or_none(rule: Rule) -> Rule:
    """Rule: null, or a value that another rule accepts."""

    def checked(value: Any) -> str:
        words = "" if value is None else rule(value)
        return f"null or {words}" if words else ""

    return checked


def row_shape(value: Any) -> str:
    """Rule: the shape of a row."""
    words = f"a list of at most {_MOST_DIMENSIONS} whole numbers, 1 or more, whose product is at most {_LARGEST}"
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS or any(whole(1)(size) for size in value):
        return words
    product = 1
    for size in value:
        product *= size
    return words if product > _LARGEST else ""


def place_in_batch(value: Any) -> str:
    """Rule: a key or an index of an entry of a batch."""
    is_index = type(value) is int and abs(value) <= 1000
    return "" if is_index or not text()(value) else "a string, or a whole number from -1000 to 1000"


def scalar(value: Any) -> str:
    """Rule: a string, a number, True, False or null."""
    return "" if value is None or isinstance(value, (str, int, float)) else "a string, a number, true, false or null"


Rules = Mapping[str, Rule]
DIGEST: Final = matching("[0-9a-f]{32}", "32 hexadecimal digits")
_TOP: Final[Rules] = {
    "version": among(1, FORMAT_VERSION),
    "length": whole(1),
    "views": whole(1),
    "shard_rows": whole(1),
}
_ARRAY: Final[Rules] = {"shape": row_shape, "dtype": among("float16", "bfloat16", "float32", "uint8")}
_OF_OUTPUT: Final[Rules] = {"top_k": whole(1), "sampled": whole(2)}
_OF_FEATURE: Final[Rules] = {"channels": whole(0, _MOST_DIMENSIONS)}
_OF_ANY: Final[Rules] = {"ragged": or_none(place_in_batch)}
_TEACHER: Final[Rules] = {"class": text(), "fingerprint": text(200)}
_DATA: Final[Rules] = {
    "fingerprint": text(200),
    "transform_seed": or_none(whole(0, 2**64 - 1)),
    "stale": among(True, False),
    "kind": among("torch", "keras"),
}
_KEY: Final[Rules] = {"kind": among("column", "content", "function")}
_FILE: Final[Rules] = {"bytes": whole(1), "blake2b": DIGEST}


def check(values: Mapping[str, Any], file: Path) -> None:
    """Check every field of a manifest.

    Args:
        values: The manifest as JSON holds it.
        file: Its file, for the message.

    Raises:
        CacheError: If a field breaks a rule; the message names the field and the file.
    """
    sections = ("arrays", "layers", "teacher", "data", "versions")
    rules = {**_TOP, **dict.fromkeys(sections, _object)}
    if file.name == BUILDING:
        rules["length"] = whole(0)  # the length of a stream is known at its end
    if values["version"] > 1:
        rules["key"] = or_none(_object)
    _fields(values, rules, "", file)
    arrays = values["arrays"]
    if not arrays:
        _refuse("arrays", "at least one array", arrays, file)
    for name, description in arrays.items():
        if not _NAME.fullmatch(name):
            _refuse("arrays", 'arrays named "output" or "feature0", "feature1", ...', name, file)
        _array(name, description, file, values["version"])
    features = {name for name in arrays if name != "output"}
    if set(values["layers"]) != features:
        _refuse("layers", f"one layer for each of {sorted(features)}", sorted(values["layers"]), file)
    place = matching(r".{0,10000}\|(input|output)", "a layer's name, a bar and 'input' or 'output'")
    _fields(values["layers"], dict.fromkeys(features, place), "layers.", file)
    _fields(values["teacher"], _TEACHER, "teacher.", file, others=scalar)
    _fields(values["data"], _DATA, "data.", file, others=scalar)
    _fields(values["versions"], {}, "versions.", file, others=text(1000))
    if (key := values.get("key")) is not None:
        column: Rules = {"column": place_in_batch} if key.get("kind") == "column" else {}
        _fields(key, {**_KEY, **column}, "key.", file)
    rows = values["length"] * values["views"]
    if rows > _LARGEST:
        _refuse("length", f"at most {_LARGEST} rows in all its views", values["length"], file)


def check_file_list(values: Mapping[str, Any], names: Iterable[str], file: Path) -> None:
    """Check the list of a shard's files: the expected names, each with its size and its checksum.

    Args:
        values: The list as JSON holds it.
        names: The names that it must have, no others.
        file: The list's file, for the message.

    Raises:
        CacheError: If it is wrong; the message names the file.
    """
    if set(values) != set(names):
        raise CacheError(f"Expected {file} to list {sorted(names)}, but got {short(sorted(values))}.")
    for name, facts in values.items():
        if _object(facts):
            _refuse(name, _object(facts), facts, file)
        _fields(facts, _FILE, f"{name}: ", file)


def _object(value: Any) -> str:
    return "" if isinstance(value, dict) else "a JSON object"


def _array(name: str, description: Any, file: Path, version: int) -> None:
    path = f"arrays.{name}"
    if not isinstance(description, dict):
        _refuse(path, "a JSON object", description, file)
    allowed = {**(_OF_OUTPUT if name == "output" else _OF_FEATURE), **_OF_ANY}
    if version == 1:
        allowed = {"top_k": allowed["top_k"]} if name == "output" else {}
    rules = {**_ARRAY, **{setting: rule for setting, rule in allowed.items() if setting in description}}
    _fields(description, rules, f"{path}.", file)
    if ("top_k" in description or "sampled" in description) and not description["shape"]:
        _refuse(f"{path}.shape", "at least one size, the number of classes", description["shape"], file)
    try:
        make(description)
    except ValueError as error:  # the codec's own checks: top_k against the classes, dtype against top_k
        raise CacheError(f"{file}: {path}: {error}") from None


def _fields(values: Mapping[str, Any], rules: Rules, prefix: str, file: Path, others: Rule | None = None) -> None:
    """Check the fields of an object: those in `rules` are required, and all others must pass the rule `others`."""
    for name, rule in rules.items():
        if name not in values:
            raise CacheError(f"Expected {file} to hold `{prefix}{name}`, but it does not. Build the cache again.")
        if words := rule(values[name]):
            _refuse(f"{prefix}{name}", words, values[name], file)
    for name in values:
        if name in rules:
            continue
        if others is None:
            raise CacheError(
                f"Expected {file} to hold only {', '.join(rules)}, but got {short(prefix + name)}."
                " It may come from a later version of this package."
            )
        if words := others(values[name]):
            _refuse(f"{prefix}{name}", words, values[name], file)


def _refuse(name: str, words: str, value: Any, file: Path) -> NoReturn:
    got = f"{name.rpartition('.')[2]}={short(value)}"
    raise CacheError(f"Expected `{name}` in {file} to be {words}, but got {got}. Build the cache again.")
