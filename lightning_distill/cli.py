"""The command ``lightning-distill``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_distill import __version__


class _Parser(argparse.ArgumentParser):
    """A parser that answers bad usage with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command's exit code: 0 when done, 1 where it could not be done, 2 for bad usage.

    Args:
        argv: The words after the command's name; ``None`` takes them from the command line.

    Returns:
        0, 1 or 2. What went wrong stands on one line of the standard error stream.

    Example:
        >>> main(["--version"])
        lightning-distill 0.1.0
        0
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] == ["fit"]:
        return _fit(None if argv is None else words)
    try:
        arguments = _parser().parse_args(words)
    except SystemExit as stop:  # argparse has printed its help, the version or what is wrong
        return stop.code if isinstance(stop.code, int) else 0
    return _demo(arguments) if arguments.command == "demo" else _validate(arguments.config)


def _parser() -> _Parser:
    parser = _Parser("lightning-distill", description="Knowledge distillation for PyTorch Lightning.")
    parser.epilog = "See `lightning-distill COMMAND --help`."
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="distil a small network on handwritten digits and show what it gains",
        description="Train a convolutional teacher on scikit-learn's handwritten digits, then a small student alone,"
        " with the teacher's logits, and with its logits and features: once with a label on 10 % of the images, once"
        " on all. Print a table, and write the figures, a plot and the student's state_dict into a folder.",
        epilog="Needs no download; takes about a minute and a half on two cores.",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output"), metavar="DIR", help="folder to write to (%(default)s)"
    )
    demo.add_argument("--seeds", type=_count, metavar="N", help="number of seeds for each student, 1 or more (3)")
    demo.add_argument("--quick", action="store_true", help="one seed and two epochs: shows that it runs, not more")
    commands.add_parser(
        "fit",
        help="train what a YAML file describes, with Lightning's command line",
        description="Build model, data and Trainer from a YAML file and fit.",
    )
    validate = commands.add_parser(
        "validate-config",
        help="check a YAML file of the launcher",
        description="Check a YAML file of lightning_distill.Distillation: every wrong value with its path in the file.",
        epilog="Exit code 0: the file is good. 2: it is not, or is not there.",
    )
    validate.add_argument("config", type=Path, metavar="FILE", help="the YAML file")
    return parser


def _fit(words: list[str] | None) -> int:
    """Lightning's own command line; `model`, `data` and `trainer` come from the file."""
    try:
        from jsonargparse import ArgumentError
        from lightning.pytorch.cli import LightningCLI
    except (ModuleNotFoundError, ImportError):
        return _fail("fit", 'it needs jsonargparse. Install it with: pip install "lightning-distill[cli]"')
    sys.path.insert(0, "")  # classes in the working directory are found, as with `python -m`
    settings = {"prog": "lightning-distill", "exit_on_error": False}
    try:
        LightningCLI(
            parser_kwargs={**settings, "fit": settings},
            save_config_kwargs={"overwrite": True},  # a second run in the same folder is no mistake
            args=words,  # None: it reads the command line itself
        )
    except (ArgumentError, FileNotFoundError) as error:
        return _fail("fit", " ".join(str(error).split()), code=2)
    except SystemExit as stop:  # the help has been printed
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.path.remove("")
    return 0


def _validate(path: Path) -> int:
    from lightning_distill.launcher.conf import DistillationConf

    try:
        DistillationConf(path)
    except OSError as error:
        return _fail("validate-config", f"cannot read {path}: {error.strerror or error}", code=2)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{path}: good\n")
    return 0


def _count(word: str) -> int:
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"Expected a whole number, 1 or more, but got {word!r}")
    return number


def _demo(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401

        from lightning_distill.demo import run
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "sklearn"):
            raise
        return _fail("demo", f'the demo needs {error.name}. Install it with: pip install "lightning-distill[plots]"')
    try:
        run(arguments.output, seeds=arguments.seeds, quick=arguments.quick)
    except OSError as error:
        return _fail("demo", f"cannot write to {arguments.output}: {error.strerror or error}")
    return 0


def _fail(command: str, message: str, code: int = 1) -> int:
    sys.stderr.write(f"lightning-distill {command}: {message}\n")
    return code
