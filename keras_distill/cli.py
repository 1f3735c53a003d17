"""The command ``keras-distill``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from keras_distill import __version__


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
        keras-distill 0.1.0
        0
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help, the version or what is wrong
        return stop.code if isinstance(stop.code, int) else 0
    return _demo(arguments) if arguments.command == "demo" else _validate_config(arguments.file)


def _parser() -> _Parser:
    parser = _Parser("keras-distill", description="Knowledge distillation for Keras.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="distil a small network on handwritten digits and show what it gains",
        description="Train a convolutional teacher on scikit-learn's handwritten digits, then a small student alone,"
        " with the teacher's logits, and with its logits and features: once with a label on 10 % of the images, once"
        " on all. Print a table, and write the figures, a plot and the student as a .keras file into a folder.",
        epilog="Needs no download; takes about a minute on two cores.",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output/keras"), metavar="DIR", help="folder to write to (%(default)s)"
    )
    demo.add_argument("--seeds", type=_count, metavar="N", help="number of seeds for each student, 1 or more (3)")
    demo.add_argument("--quick", action="store_true", help="one seed and two epochs: shows that it runs, not more")
    validate = commands.add_parser(
        "validate-config",
        help="check a YAML file of the launcher",
        description="Check a YAML file of keras_distill.Distillation without training: exit code 0 and one line if it"
        " is right, 2 and a line for each wrong value, with its path within the file, if not.",
    )
    validate.add_argument("file", type=Path, metavar="FILE", help="the YAML file")
    return parser


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

        from keras_distill.demo import run
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "sklearn"):
            raise
        return _fail(f'the demo needs {error.name}. Install it with: pip install "lightning-distill[keras,plots]"')
    try:
        run(arguments.output, seeds=arguments.seeds, quick=arguments.quick)
    except OSError as error:
        return _fail(f"cannot write to {arguments.output}: {error.strerror or error}")
    return 0


def _validate_config(file: Path) -> int:
    try:
        from keras_distill.launcher.conf import DistillationConf
        from keras_distill.launcher.criteria import criterion_of
    except ModuleNotFoundError as error:
        if error.name not in ("pydantic", "yaml"):
            raise
        sys.stderr.write(
            f"keras-distill validate-config: needs {error.name}. Install it with: pip install pydantic pyyaml\n"
        )
        return 1
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            criterion_of(DistillationConf(file).distillation.train.criterion)
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}\n")
        return 2
    except ValueError as error:
        lines = str(error).splitlines()
        sys.stderr.writelines(f"{line if line.startswith(str(file)) else f'{file}: {line}'}\n" for line in lines)
        return 2
    sys.stderr.writelines(f"{file}: {one.message}\n" for one in warned)
    sys.stdout.write(f"{file}: OK\n")
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"keras-distill demo: {message}\n")
    return 1
