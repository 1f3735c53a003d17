"""A quick demonstration, run once for all tests of a file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console


class Outcome(NamedTuple):
    """Its folder, the text that it printed, its runs, and its file of results."""

    folder: Path
    printed: str
    runs: list[Any]
    results: dict[str, Any]


def outcome_of(run: Callable[..., list[Any]], parent: Path, file: str = "results.json") -> Outcome:
    """Run a demonstration in a folder that does not exist yet.

    Args:
        run: The demonstration.
        parent: An empty folder.
        file: Name of the file of results.
    """
    folder = parent / "made" / "for it"
    console = Console(file=io.StringIO(), width=80)
    runs = run(folder, quick=True, console=console)
    results = json.loads((folder / file).read_text(encoding="utf-8"))
    return Outcome(folder, console.file.getvalue(), runs, results)
