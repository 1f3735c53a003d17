"""The commands of ``lightning-distill``; :mod:`distill_core.cli.lightning` parses its words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import TracebackType

from distill_core import PACKAGES
from distill_core.cli import fail, run_demo, validate, working_directory
from distill_core.installed import unusable
from distill_core.terminal import write_line

_PROG = "lightning-distill"


def demo(arguments: argparse.Namespace) -> int:
    """The command ``demo``.

    Args:
        arguments: ``output``, ``seeds`` and ``quick``.

    Returns:
        The exit code.
    """
    return run_demo(_PROG, "lightning_distill.demo", arguments)


def fit(words: list[str] | None) -> int:
    """The command ``fit``: Lightning's own command line, with `model`, `data` and `trainer` from the file.

    Args:
        words: ``fit`` and its options; None lets Lightning read the command line itself.

    Returns:
        The exit code. Errors of user code in training keep their traceback.
    """
    if problem := unusable("This command", "jsonargparse"):
        raise problem
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningCLI

    if missing := _missing_config(sys.argv[1:] if words is None else words):
        return fail(_PROG, "fit", f"cannot read {missing}: No such file")
    settings = {"prog": _PROG, "exit_on_error": False}
    try:
        with working_directory(first=True):
            LightningCLI(
                parser_kwargs={**settings, "fit": settings},
                save_config_kwargs={"overwrite": True},  # a second run in the same folder is allowed
                args=words,
            )
    except FileNotFoundError as error:
        return fail(_PROG, "fit", error)
    except (ArgumentError, MisconfigurationException) as error:
        return fail(_PROG, "fit", error, code=2)
    except (TypeError, ValueError) as error:
        if not _raised_here(error.__traceback__):
            raise
        return fail(_PROG, "fit", error, code=2)
    except SystemExit as stop:  # the help has been printed
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def validate_config(arguments: argparse.Namespace) -> int:
    """The command ``validate-config``.

    Args:
        arguments: ``file``.

    Returns:
        The exit code.
    """
    from lightning_distill.launcher.conf import DistillationConf
    from lightning_distill.launcher.criteria import criterion_of

    def check(file: Path) -> None:
        criterion_of(DistillationConf(file).distillation.train.criterion)

    return validate(_PROG, arguments.file, check)


def cache(arguments: argparse.Namespace) -> int:
    """The commands ``cache build``, ``cache info`` and ``cache verify``.

    Args:
        arguments: ``command`` and ``path``.

    Returns:
        The exit code.
    """
    from lightning_distill.cache import CacheError, TeacherCache
    from lightning_distill.cache.command import build_from_file, describe

    command, path = arguments.command, arguments.path
    try:
        if command == "cache build":
            build_from_file(path)
        elif command == "cache verify":
            TeacherCache.open(path).verify()
            write_line(sys.stdout, f"{path}: OK")
        else:
            describe(TeacherCache.open(path))
    except CacheError as error:
        return fail(_PROG, command, error)
    except OSError as error:
        return fail(_PROG, command, f"{error.filename or path}: {error.strerror or error}")
    except ValueError as error:
        return fail(_PROG, command, error, code=2)
    return 0


def _missing_config(words: list[str]) -> str | None:
    """The first configuration file among the words that does not exist."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        file = value if equals else "".join(words[index + 1 : index + 2])
        if file and not file.lstrip().startswith("{") and "\n" not in file and not Path(file).exists():
            return file
    return None


def _raised_here(trace: TracebackType | None) -> bool:
    """Whether an error was raised by a check of this project rather than by user code."""
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name.partition(".")[0] in PACKAGES
