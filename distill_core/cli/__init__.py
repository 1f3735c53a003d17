"""The parts that both command lines share. Until a command runs, only Python's own modules are imported."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from distill_core import __version__
from distill_core.terminal import one_line, write_line

EXIT_CODES: Final = (
    "Exit code 0: done. 1: it could not be done, or a file could not be read or written. 2: wrong usage, or a wrong"
    " file. Errors are written to the standard error stream."
)


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage with one line.

    Args:
        prog: Name of the command.
        epilog: Text below the options; the exit codes follow it.
        **settings: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, epilog: str = "", **settings: Any) -> None:
        super().__init__(prog, epilog=f"{epilog} {EXIT_CODES}".lstrip(), **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line."""
        self.exit(2, one_line(f"{self.prog}: {message}. See `{self.prog} --help`.") + "\n")


def new_parser(prog: str, description: str) -> tuple[Parser, Any]:
    """A parser with ``--version``, and the object that commands are added to.

    Args:
        prog: Name of the command.
        description: Purpose of the command.

    Returns:
        The parser, and the object for :func:`add_demo`, :func:`add_validate` and further commands.
    """
    parser = Parser(prog, description=description, epilog=f"See `{prog} COMMAND --help`.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser, parser.add_subparsers(dest="command", metavar="command", required=True)


def add_demo(commands: Any, output: str, writes: str, seconds: str, work: str) -> None:
    """Add the command ``demo``.

    Args:
        commands: The second object from :func:`new_parser`.
        output: Default of ``--output``.
        writes: The file that is written besides the figures and a plot, in words.
        seconds: The duration, in words.
        work: The function that runs the command, as ``module:function``.
    """
    demo = commands.add_parser(
        "demo",
        help="distil a small network on handwritten digits and compare it with training alone",
        description="Train a convolutional teacher on scikit-learn's handwritten digits, then a small student alone,"
        " with the teacher's logits, and with its logits and features: once with a label on 10 % of the images, once"
        f" on all. Print a table, and write the figures, a plot and {writes} into a folder.",
        epilog=f"Needs no download; takes about {seconds} on one core.",
    )
    demo.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="output folder (%(default)s)")
    demo.add_argument("--seeds", type=count, metavar="N", help="number of seeds for each student, 1 or more (3)")
    demo.add_argument("--quick", action="store_true", help="one seed and two epochs: shows that it runs, not more")
    demo.set_defaults(work=work)


def add_validate(commands: Any, configured: str, work: str) -> None:
    """Add the command ``validate-config``.

    Args:
        commands: The second object from :func:`new_parser`.
        configured: Name of the class whose files are checked.
        work: The function that runs the command, as ``module:function``.
    """
    validate = commands.add_parser(
        "validate-config",
        help="check a YAML file of the launcher",
        description=f"Check a YAML file of {configured} without training. Print one line if it is right, otherwise a"
        " line for each wrong value, with its path within the file. Nothing that the file names is imported or run.",
    )
    validate.add_argument("file", type=Path, metavar="FILE", help="the YAML file")
    validate.set_defaults(work=work)


def count(word: str) -> int:
    """A whole number of 1 or more, for argparse."""
    number = int(word) if word.isascii() and word.isdigit() and len(word) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"Expected a whole number, 1 or more, but got {word!r}")
    return number


def run(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse the words of a command line and run the command.

    Args:
        parser: The parser; each command sets ``work``, the function that runs it, as ``module:function``.
        argv: The words; None takes them from the process.

    Returns:
        The exit code.
    """
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help, the version or an error
        return stop.code if isinstance(stop.code, int) else 0
    return call(parser.prog, arguments.command, arguments.work, arguments)


def call(prog: str, command: str, work: str, arguments: Any) -> int:
    """Import the function that runs a command, and call it.

    Args:
        prog: Name of the program.
        command: Name of the command.
        work: The function, as ``module:function``.
        arguments: The argument of the function.

    Returns:
        The exit code of the function; 1, after one line, if a package is not installed or too old.
    """
    module, _, function = work.partition(":")
    try:
        run_command: Callable[[Any], int] = getattr(importlib.import_module(module), function)
        return run_command(arguments)
    except ImportError as error:
        if "pip install" not in str(error):  # a mistake here, or user code that the command ran
            raise
        return fail(prog, command, error)


def run_demo(prog: str, module: str, arguments: Any) -> int:
    """Import a demonstration and run it: the command ``demo``.

    Args:
        prog: Name of the program.
        module: The module of the demonstration, which has the function ``run``.
        arguments: ``output``, ``seeds`` and ``quick``.

    Returns:
        The exit code.

    Raises:
        ImportError: If scikit-learn or Matplotlib is not installed or too old.
    """
    from distill_core.installed import unusable  # imported late: --help and --version need nothing

    if problem := unusable("The demo", "matplotlib", "sklearn"):
        raise problem
    demo = importlib.import_module(module)
    try:
        demo.run(arguments.output, seeds=arguments.seeds, quick=arguments.quick)
    except OSError as error:
        return fail(prog, "demo", f"cannot write to {arguments.output}: {error.strerror or error}")
    return 0


def validate(prog: str, file: Path, check: Callable[[Path], Any]) -> int:
    """Check a file, and print its errors.

    Args:
        prog: Name of the program.
        file: The file.
        check: Function that raises a ValueError with a line for each wrong value.

    Returns:
        The exit code.
    """
    try:
        with warnings.catch_warnings(record=True) as warned, working_directory(first=False):
            warnings.simplefilter("always")
            check(file)
    except OSError as error:
        return fail(prog, "validate-config", f"cannot read {file}: {error.strerror or error}")
    except ValueError as error:
        for line in str(error).split("\n"):
            write_line(sys.stderr, line if line.startswith(str(file)) else f"{file}: {line}")
        return 2
    for warning in warned:
        write_line(sys.stderr, f"{file}: {warning.message}")
    write_line(sys.stdout, f"{file}: OK")
    return 0


def fail(prog: str, command: str, message: Any, code: int = 1) -> int:
    """Write an error on one line.

    Args:
        prog: Name of the program.
        command: Name of the command.
        message: The error.
        code: The exit code.

    Returns:
        The exit code.
    """
    write_line(sys.stderr, one_line(f"{prog} {command}: {message}"))
    return code


@contextmanager
def working_directory(*, first: bool) -> Iterator[None]:
    """A context in which modules of the working directory can be imported.

    Args:
        first: If True, the working directory comes before all other places, as with ``python -m``; if False after
            them, so that its modules do not hide installed packages.
    """
    before = list(sys.path)
    sys.path.insert(0 if first else len(sys.path), "")
    try:
        yield
    finally:
        sys.path[:] = before
