"""The machine, the versions and the command of a comparison, for its readers."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from distill_core import __version__
from distill_core.terminal import write_line


def machine(device: str, **versions: str) -> dict[str, Any]:
    """Entries of ``comparison.json`` on where the runs were made.

    Args:
        device: The device of the trainings, in words.
        **versions: Versions of the framework's packages.

    Returns:
        ``machine``, ``versions``, ``commit`` of the working directory's repository or None, and ``command``.
    """
    return {
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": device,
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "lightning-distill": __version__,
            **versions,
        },
        "commit": _commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def version(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def shown_on_console(progress: bool | Callable[[str], None]) -> Callable[[str], None]:
    """A function that prints a line for each finished run, or does nothing.

    Args:
        progress: Whether it prints, or the function itself.
    """
    if callable(progress):
        return progress
    return (lambda line: write_line(sys.stderr, line)) if progress else (lambda line: None)


def _processor() -> str:
    """The processor's model, where the system says it; otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    words = [git, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
