"""The command ``report`` of both command lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from distill_core.cli import fail, file_error
from distill_core.terminal import write_line

_NAME = "report"


def add_report(commands: Any, prog: str) -> None:
    """Add the command ``report``.

    Args:
        commands: The second object from :func:`distill_core.cli.new_parser`.
        prog: Name of the program.
    """
    parser = commands.add_parser(
        _NAME,
        help="write one HTML file on a comparison of methods",
        description="Write one HTML file on the results folder of a comparison: the verdict, curves, accuracy and"
        " agreement, calibration, classes, examples, costs, and the next steps with their reasons. The file loads"
        " nothing and runs no script, so that it can be opened offline and sent to others.",
        example=f"{prog} report results\n{prog} report results --output report.html",
        epilog="It needs Jinja2: pip install jinja2.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the results folder of a comparison")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write (report.html in the folder)")
    parser.set_defaults(work="distill_core.cli.report:report")


def report(arguments: argparse.Namespace) -> int:
    """The command ``report``.

    Args:
        arguments: ``folder``, ``output``, and the ``parser`` of the program.

    Returns:
        The exit code.

    Raises:
        ImportError: If Jinja2 is not installed or too old.
    """
    from distill_core.guidance.report import FILE, write_report

    prog, output = arguments.parser.prog, arguments.output or arguments.folder / FILE
    try:
        path = write_report(arguments.folder, output)
    except OSError as error:
        action = "write" if error.filename == str(output) else "read"
        return fail(prog, _NAME, file_error(error, arguments.folder, action))
    except ValueError as error:
        return fail(prog, _NAME, error, code=2)
    write_line(sys.stdout, f"{path}: {path.stat().st_size:,} bytes")
    return 0
