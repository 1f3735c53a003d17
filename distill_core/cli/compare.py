"""The words of the command ``compare``, which both command lines have."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from distill_core.cli import count


def add_compare(commands: Any, prog: str, example: str, work: str) -> None:
    """Add the command ``compare``.

    Args:
        commands: The second object from :func:`new_parser`.
        prog: Name of the program.
        example: Lines of a YAML file.
        work: The function that runs the command, as ``module:function``.
    """
    compare = commands.add_parser(
        "compare",
        help="train a student alone and distilled, with several seeds, and say whether it helped",
        description="Train the student that a YAML file describes alone and with each method, with several seeds; print"
        " a table and a verdict in words, and keep a record of each run in a folder. A comparison that was stopped is"
        " resumed by the same command.",
        example=f"{prog} compare compare.yaml\n\nwhere compare.yaml holds:\n\n{textwrap.indent(example, '  ')}",
        epilog="The file runs code: each class_path is imported and called. Use only files that you trust.",
    )
    compare.add_argument("file", type=Path, metavar="FILE", help="the YAML file")
    compare.add_argument("--workers", type=count, metavar="N", help="number of processes, instead of the file's")
    compare.add_argument("--fresh", action="store_true", help="remove the runs that are in the folder already")
    compare.set_defaults(work=work)
