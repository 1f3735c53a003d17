"""The command ``lightning-distill``. PyTorch and Lightning are imported when a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_core.cli import Parser, add_demo, add_validate, call, new_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after the command's name; ``None`` takes them from the command line.

    Returns:
        The exit code, as in :data:`distill_core.cli.EXIT_CODES`. An error is one line on the standard error stream.

    Example:
        >>> main(["--version"])
        lightning-distill ...
        0
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] == ["fit"]:  # its options are those of Lightning's own command line
        return call("lightning-distill", "fit", "lightning_distill.cli:fit", None if argv is None else words)
    return run(_parser(), words)


def _parser() -> Parser:
    parser, commands = new_parser("lightning-distill", "Knowledge distillation for PyTorch Lightning.")
    add_demo(
        commands,
        output="demo_output",
        writes="the student's state_dict",
        seconds="40 seconds",
        work="lightning_distill.cli:demo",
    )
    commands.add_parser(
        "fit",
        help="train the model that a YAML file describes, with Lightning's command line",
        description="Build model, data and Trainer from a YAML file and fit. The classes that the file names are"
        " imported and called: use only files that you trust.",
    )
    add_validate(commands, "lightning_distill.Distillation", work="lightning_distill.cli:validate_config")
    _add_cache(commands)
    return parser


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="build, describe or check a cache of a teacher's outputs",
        description="A cache holds a teacher's outputs for every sample of a dataset, so that training does not need"
        " the teacher.",
        epilog="See `lightning-distill cache ACTION --help`.",
    )
    actions = cache.add_subparsers(dest="action", metavar="action", required=True)
    build = actions.add_parser(
        "build",
        help="run a teacher over the dataset that a YAML file names",
        description="Run a teacher over a dataset. The YAML file holds `path`, the folder to write; `teacher` and"
        " `dataset`, each with class_path and init_args; and the settings of TeacherCache.build. A build that was"
        " stopped is resumed.",
        epilog="The file runs code: each class_path is imported and called with its init_args. Build only from files"
        " that you trust.",
    )
    build.add_argument("path", type=Path, metavar="FILE", help="the YAML file")
    build.set_defaults(work="lightning_distill.cli:cache", command="cache build")
    for action, description in (
        ("info", "Print the arrays of a cache, and the teacher that they come from."),
        ("verify", "Compare every file of a cache with its checksum, and read it as training does."),
    ):
        parser = actions.add_parser(action, help=description[0].lower() + description[1:-1], description=description)
        parser.add_argument("path", type=Path, metavar="FOLDER", help="the cache's folder")
        parser.set_defaults(work="lightning_distill.cli:cache", command=f"cache {action}")
