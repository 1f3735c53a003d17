"""The command ``completion`` of both command lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from distill_core.installed import unusable


def print_script(arguments: argparse.Namespace) -> int:
    """Print the script for a shell.

    Args:
        arguments: ``shell``, and the ``parser`` of the program.

    Returns:
        The exit code.

    Raises:
        ImportError: If shtab is not installed or too old.
    """
    if problem := unusable("This command", "shtab"):
        raise problem
    import shtab

    _mark_files(arguments.parser, shtab.FILE, shtab.DIRECTORY)
    sys.stdout.write(shtab.complete(arguments.parser, shell=arguments.shell) + "\n")
    return 0


def _mark_files(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Tell shtab which arguments are files and which are folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _mark_files(inner, file, folder)
        elif action.type is Path:
            action.complete = folder if action.metavar in ("DIR", "FOLDER") else file  # type: ignore[attr-defined]
