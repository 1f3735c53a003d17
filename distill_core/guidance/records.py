"""The results folder of a comparison: one file of settings, and a line for each finished run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from distill_core.cache_files import fingerprint
from distill_core.checks import message
from distill_core.guidance.run_records import RunRecord, read_runs
from distill_core.terminal import short

FORMAT: Final = 1
ALONE: Final = "student alone"
EQUAL_COMPUTE: Final = "student alone, equal compute"
COMPARISON: Final = "comparison.json"
RUNS: Final = "runs.jsonl"
_SHOWN: Final = 200  # the most examples of samples.npz
_DIFFERENCES: Final = 3  # the most settings whose differences an error shows
_CONTEXT: Final = 60  # characters that it shows before a difference; twice as many after it


class ResultsFolder:
    """The folder of a comparison. One process writes it.

    A run's line is written at once and flushed to the disk, so that a process that is killed leaves all finished runs,
    and at most one incomplete line, which is ignored and removed by the next call.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """The content of ``comparison.json``; None if the file does not exist.

        Raises:
            ValueError: If it is not a file of this format.
        """
        file = self.path / COMPARISON
        try:
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(message(f"{file} to hold JSON", short(error), "Pass another folder.")) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            expected, got = f"{file} to be a comparison of format {FORMAT}", short(content)
            raise ValueError(message(expected, got, "Pass another folder."))
        return content

    def write(self, comparison: Mapping[str, Any]) -> None:
        """Write ``comparison.json``; a reader sees the whole old or the whole new file.

        Args:
            comparison: Its content.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **plain(comparison)}, indent=2, ensure_ascii=False)
        unfinished = self.path / f".{COMPARISON}.unfinished"
        with open(unfinished, "w", encoding="utf-8") as handle:
            handle.write(text + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(unfinished, self.path / COMPARISON)

    def runs(self) -> dict[tuple[str, int], RunRecord]:
        """The last record of each method and seed. An incomplete last line is left out.

        Raises:
            ValueError: If another line is not a record.
        """
        file = self.path / RUNS
        read = read_runs(file)
        for number, error in read.damaged:
            got = f"{error} in line {number}"
            raise ValueError(message(f"{file} to hold records of runs", got, "Pass another folder."))
        return read.records

    def append(self, record: RunRecord) -> None:
        """Add a run.

        Args:
            record: The run.
        """
        line = json.dumps(plain(asdict(record)), ensure_ascii=False).encode() + b"\n"
        with open(self.path / RUNS, "ab") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())

    def repair(self) -> None:
        """Remove an incomplete last line, which a killed process has left."""
        file = self.path / RUNS
        if file.exists():
            content = file.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(file, whole)

    def clear(self) -> None:
        """Remove the settings and the runs of an earlier comparison."""
        for name in (COMPARISON, RUNS):
            (self.path / name).unlink(missing_ok=True)


def write_predictions(folder: Path, name: str, logits: Any, labels: Any) -> str:
    """Write the predictions for a validation set.

    Args:
        folder: The results folder.
        name: Name of the file, without its ending.
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``.

    Returns:
        The path of the file within the folder.
    """
    arrays = {"logits": np.asarray(logits, np.float32), "labels": np.asarray(labels, np.int64)}
    return _write_arrays(folder, f"predictions/{name}.npz", arrays)


def write_samples(folder: Path, images: Any) -> str | None:
    """Write the first images of a validation set, at most 200, for people to look at.

    Args:
        folder: The results folder.
        images: Numbers of any range, shape ``(N, H, W, C)``; with other than 1 or 3 channels nothing is written.

    Returns:
        The path of the file within the folder, or None.
    """
    images = np.asarray(images)[:_SHOWN]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        return None
    if images.dtype != np.uint8:
        images = images.astype(np.float64)
        low, high = images.min(), images.max()
        images = np.round((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return _write_arrays(folder, "samples.npz", {"images": images, "index": np.arange(len(images))})


def _write_arrays(folder: Path, name: str, arrays: Mapping[str, Any]) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    with open(unfinished, "wb") as handle:
        np.savez(handle, **arrays)
    os.replace(unfinished, file)
    return name


def file_name(method: str, seed: int | None = None) -> str:
    """A name for the files of a method, or of one of its runs.

    Example:
        >>> file_name("Soft targets, T=4", 0)
        'soft-targets-t-4-0'
    """
    words = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-") or "method"
    return words if seed is None else f"{words}-{seed}"


def plain(value: Any) -> Any:
    """A value for JSON, in which numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def described(value: Any) -> str:
    """A setting in words that are the same in another process, so that two calls can be compared.

    Functions and classes are named by their module, and objects whose text holds their address by their class and their
    plain attributes.

    Args:
        value: The setting.

    Returns:
        The text.

    Example:
        >>> described({"max_epochs": 2, "loss": described})
        "{'max_epochs': 2, 'loss': distill_core.guidance.records.described}"
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, partial):
        return f"{described(value.func)}{described(value.args)}{described(value.keywords)}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = " ".join(repr(value).split())
    if not re.search(r" at 0x[0-9a-f]+", text):
        return text
    kind = type(value)
    simple = {
        name: entry
        for name, entry in sorted(getattr(value, "__dict__", {}).items())
        if entry is None or isinstance(entry, (str, int, float))
    }
    return f"{kind.__module__}.{kind.__qualname__}({described(simple) if simple else ''})"


def digest(arrays: Iterable[Any]) -> str:
    """A short digest of arrays, to see whether two runs began with the same numbers.

    Args:
        arrays: NumPy arrays, texts or numbers.
    """
    return fingerprint(arrays)[:16]


def settings_fingerprint(settings: Mapping[str, str]) -> str:
    """The digest of settings in words, in any order."""
    return fingerprint(part for name in sorted(settings) for part in (name, settings[name]))


def _around_difference(before: str, after: str) -> tuple[str, ...]:
    """Two texts, of which long ones are cut to the place where they begin to differ."""
    pairs = enumerate(zip(before, after, strict=False))
    common = next((place for place, pair in pairs if pair[0] != pair[1]), min(len(before), len(after)))
    start = max(common - _CONTEXT, 0)
    end = start + 3 * _CONTEXT
    return tuple(
        text if len(text) <= 3 * _CONTEXT else "..." * (start > 0) + text[start:end] + "..." * (len(text) > end)
        for text in (before, after)
    )


def check_settings(folder: Path, before: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Refuse to mix the runs of different settings in one folder.

    Args:
        folder: The folder.
        before: The settings of its runs, in words.
        settings: The settings of this call.

    Raises:
        ValueError: If they differ; the message names each setting that does, and shows how the first ones do.
    """
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        parts = [
            "{}: {} there, {} in this call".format(
                name, *_around_difference(str(before.get(name)), str(settings.get(name)))
            )
            for name in names[:_DIFFERENCES]
        ]
        more = names[_DIFFERENCES:]
        differences = "; ".join(parts) + (f"; and also {', '.join(more)}" if more else "")
        expected = f"the folder {str(folder)!r} to hold runs of the same settings"
        remedy = "Pass another folder, the settings of the first call, or resume=False to remove its runs."
        raise ValueError(message(expected, differences, remedy))


def check_names(methods: Sequence[str]) -> None:
    """Check the names of methods.

    Args:
        methods: The names.

    Raises:
        ValueError: If the list is empty, a name is empty or taken, or two would have the same file name.
    """
    if not methods:
        raise ValueError(message("`methods` to hold at least one method", "an empty dict"))
    taken = {file_name(name): name for name in (ALONE, EQUAL_COMPUTE, "teacher")}
    for name in methods:
        if not str(name).strip():
            raise ValueError(message("`methods` to have names", repr(name)))
        if file_name(name) in taken:
            raise ValueError(
                message("`methods` to have distinct names", f"{name!r} beside {taken[file_name(name)]!r}", "Rename it.")
            )
        taken[file_name(name)] = name
