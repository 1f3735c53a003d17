"""The parts that both command lines share. Until a command runs, only Python's own modules are imported."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
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
SHOW_TRACEBACK: Final = "DISTILL_TRACEBACK"  # an environment variable
TRACEBACK_HINT: Final = f"(Set {SHOW_TRACEBACK}=1 to see where.)"


_WIDTH: Final = 80


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage with one line.

    Args:
        prog: Name of the command.
        description: Purpose of the command.
        example: Command lines, or other lines that stand as they are below the options.
        epilog: Text below the example; the exit codes follow it.
        **settings: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, description: str = "", example: str = "", epilog: str = "", **settings: Any) -> None:
        parts = [f"example:\n{textwrap.indent(example, '  ')}"] if example else []
        parts.append(textwrap.fill(f"{epilog} {EXIT_CODES}".lstrip(), _WIDTH))
        super().__init__(
            prog,
            description=textwrap.fill(description, _WIDTH),
            epilog="\n\n".join(parts),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line."""
        self.exit(2, one_line(f"{self.prog}: {message}. See `{self.prog} --help`.") + "\n")


def new_parser(prog: str, description: str, example: str) -> tuple[Parser, Any]:
    """A parser with ``--version``, and the object that commands are added to.

    Args:
        prog: Name of the command.
        description: Purpose of the command.
        example: Command lines.

    Returns:
        The parser, and the object for :func:`add_demo`, :func:`add_validate` and further commands.
    """
    parser = Parser(prog, description, example, f"See `{prog} COMMAND --help`.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser, parser.add_subparsers(dest="command", metavar="command", required=True)


def add_demo(commands: Any, prog: str, output: str, writes: str, seconds: str, work: str) -> Parser:
    """Add the command ``demo``.

    Args:
        commands: The second object from :func:`new_parser`.
        prog: Name of the program.
        output: Default of ``--output``.
        writes: The file that is written besides the figures and a plot, in words.
        seconds: The duration, in words.
        work: The function that runs the command, as ``module:function``.

    Returns:
        The parser of the command, for further options.
    """
    demo: Parser = commands.add_parser(
        "demo",
        help="distil a small network on handwritten digits and compare it with training alone",
        description="Train a convolutional teacher on scikit-learn's handwritten digits, then a small student alone,"
        " with the teacher's logits, and with its logits and features: once with a label on 10 % of the images, once"
        f" on all. Print tables and verdicts, and write the records of all runs, a plot and {writes} into a folder.",
        example=f"{prog} demo --output results --seeds 1",
        epilog=f"Needs no download; takes about {seconds} on one core.",
    )
    demo.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="output folder (%(default)s)")
    demo.add_argument("--seeds", type=count, metavar="N", help="number of seeds for each student, 1 or more (5)")
    demo.add_argument("--quick", action="store_true", help="one seed and two epochs: shows that it runs, not more")
    demo.set_defaults(work=work)
    return demo


def add_validate(commands: Any, prog: str, configured: str, work: str) -> None:
    """Add the command ``validate-config``.

    Args:
        commands: The second object from :func:`new_parser`.
        prog: Name of the program.
        configured: Name of the class whose files are checked.
        work: The function that runs the command, as ``module:function``.
    """
    validate = commands.add_parser(
        "validate-config",
        help="check a YAML file of the launcher",
        description=f"Check a YAML file of {configured} without training. Print one line if it is right, otherwise a"
        " line for each wrong value, with its path within the file. Nothing that the file names is imported or run.",
        example=f"{prog} validate-config launch.yaml",
    )
    validate.add_argument("file", type=Path, metavar="FILE", help="the YAML file")
    validate.set_defaults(work=work)


def add_export(commands: Any, prog: str, source: str, outputs: str, example: str, work: str) -> Parser:
    """Add the command ``export``.

    Args:
        commands: The second object from :func:`new_parser`.
        prog: Name of the program.
        source: The file that holds the student, in words.
        outputs: The forms of the output, in words.
        example: Command lines.
        work: The function that runs the command, as ``module:function``.

    Returns:
        The parser of the command, for further options.
    """
    export: Parser = commands.add_parser(
        "export",
        help="write the student alone, without teacher, adapters and optimizer",
        description=f"Write the student of {source}, alone: no teacher, no adapters, no optimizer. The end of OUTPUT"
        f" says the form: {outputs}. An existing file is replaced.",
        example=example,
        epilog=f"{SHOW_TRACEBACK}=1 in the environment shows where an error was raised.",
    )
    export.add_argument("source", type=Path, metavar="SOURCE", help=source)
    export.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write")
    export.set_defaults(work=work)
    return export


def add_completion(commands: Any, prog: str) -> None:
    """Add the command ``completion``.

    Args:
        commands: The second object from :func:`new_parser`.
        prog: Name of the program.
    """
    completion = commands.add_parser(
        "completion",
        help="print a script that lets a shell complete the commands",
        description="Print a script with which the Tab key completes commands, options and files. It needs shtab: pip"
        " install shtab.",
        example=f'eval "$({prog} completion bash)"    # in ~/.bashrc\n'
        f'eval "$({prog} completion zsh)"     # in ~/.zshrc, after compinit\n'
        f"{prog} completion fish > ~/.config/fish/completions/{prog}.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"), help="the shell")
    completion.set_defaults(work="distill_core.cli.completion:print_script")


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
    arguments.parser = parser
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


def run_demo(prog: str, module: str, arguments: Any, data: str = "sklearn") -> int:
    """Import a demonstration and run it: the command ``demo``.

    Args:
        prog: Name of the program.
        module: The module of the demonstration, which has the function ``run``.
        arguments: ``output``, ``seeds`` and ``quick``.
        data: The package that its data need, besides Matplotlib for the figure.

    Returns:
        The exit code.

    Raises:
        ImportError: If one of the two packages is not installed or too old.
    """
    from distill_core.installed import unusable  # imported late: --help and --version need nothing

    if problem := unusable("The demo", "matplotlib", data):
        raise problem
    demo = importlib.import_module(module)
    try:
        demo.run(arguments.output, seeds=arguments.seeds, quick=arguments.quick)
    except OSError as error:
        return fail(prog, "demo", file_error(error, arguments.output, "write"))
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
        return fail(prog, "validate-config", file_error(error, file))
    except ValueError as error:
        for line in str(error).split("\n"):
            write_line(sys.stderr, line if line.startswith(str(file)) else f"{file}: {line}")
        return 2
    for warning in warned:
        write_line(sys.stderr, f"{file}: {warning.message}")
    write_line(sys.stdout, f"{file}: OK")
    return 0


def fail(prog: str, command: str, message: Any, code: int = 1) -> int:
    """Write an error on one line, after its traceback if the environment variable ``DISTILL_TRACEBACK`` asks for it.

    Args:
        prog: Name of the program.
        command: Name of the command.
        message: The error: text, or an exception.
        code: The exit code.

    Returns:
        The exit code.
    """
    if os.environ.get(SHOW_TRACEBACK, "0") not in ("", "0") and sys.exc_info()[0] is not None:
        traceback.print_exc()
    write_line(sys.stderr, one_line(f"{prog} {command}: {message}"))
    return code


def file_error(error: OSError, file: Path, action: str = "read") -> str:
    """The message for a file that cannot be read or written.

    Args:
        error: The error.
        file: The file, where the error does not name it.
        action: ``"read"`` or ``"write"``.

    Returns:
        The message.

    Example:
        >>> file_error(FileNotFoundError(2, "No such file or directory", "a.yaml"), Path("b.yaml"))
        'cannot read a.yaml: No such file or directory'
    """
    return f"cannot {action} {error.filename or file}: {error.strerror or error}"


class ExportError(Exception):
    """A student cannot be exported."""


def run_export(prog: str, output: Path, write: Callable[[], str]) -> int:
    """Export a student and print what was written: the command ``export``.

    Args:
        prog: Name of the program.
        output: The file to write.
        write: Function that writes it and returns a line for the user.

    Returns:
        The exit code.
    """
    try:
        line = write()
    except OSError as error:
        action = "write" if error.filename == str(output) else "read"
        return fail(prog, "export", file_error(error, output, action))
    except ExportError as error:
        return fail(prog, "export", error if error.__cause__ is None else f"{error} {TRACEBACK_HINT}")
    except ValueError as error:
        return fail(prog, "export", error, code=2)
    write_line(sys.stdout, line)
    return 0


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A context in which a file is written under another name, and then takes the place of ``output``.

    Nothing is left behind where the context ends with an exception.

    Args:
        output: The file, or the folder.

    Returns:
        The name to write to, in the same folder and with the same suffix.

    Raises:
        OSError: If the folder cannot be written.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from None
    with temporary as folder:
        written = Path(folder) / output.name
        yield written
        if output.is_dir():
            shutil.rmtree(output)
        written.replace(output)


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
