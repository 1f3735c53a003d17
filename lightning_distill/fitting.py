"""The command ``fit``: Lightning's command line, with one line for each error and the final numbers at the end."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Final

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from distill_core import PACKAGES
from distill_core.cli import TRACEBACK_HINT, fail, file_error, working_directory
from distill_core.terminal import write_line
from distill_core.yaml_files import read_yaml
from lightning_distill import compat
from lightning_distill.config_errors import cause, explain, raised_in

_LIGHTNING: Final = ("lightning", "pytorch_lightning")


class _CommandLine(LightningCLI):
    """Lightning's command line; ``files`` are the names of its YAML files, for messages."""

    files = ""

    def before_fit(self) -> None:
        """Check that there are data."""
        if self.datamodule is None and not compat.overrides(self.model, "train_dataloader"):
            raise MisconfigurationException(
                f"Expected {self.files or 'the options'} to say where the data come from, but got no `data`. Add"
                " `data: {class_path: my_project.MyDataModule}`, a LightningDataModule of yours, or give the model a"
                " `train_dataloader`."
            )

    def after_fit(self) -> None:
        """Print the final numbers."""
        if self.trainer.is_global_zero:
            print_numbers(self.trainer)


def print_numbers(trainer: Trainer) -> None:
    """Print the numbers that were logged last, and the best checkpoint.

    Args:
        trainer: The Trainer, after a fit.
    """
    rows = [("epochs", str(trainer.current_epoch)), ("steps", str(trainer.global_step))]
    rows += [(name, f"{float(value):.6g}") for name, value in sorted(trainer.callback_metrics.items())]
    if best := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        rows.append(("checkpoint", str(best)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        write_line(sys.stdout, f"{name:<{width}}  {value}")


def run_fit(prog: str, words: list[str] | None) -> int:
    """Run the command.

    Args:
        prog: Name of the program.
        words: ``fit`` and its options; None lets Lightning read the command line itself.

    Returns:
        The exit code.

    Raises:
        Exception: An error in code of the user's, or of the libraries, that no check has found.
    """
    files = _config_files(sys.argv[1:] if words is None else words)
    try:
        for file in files:
            read_yaml(file)
    except OSError as error:
        return fail(prog, "fit", file_error(error, file))
    except ValueError as error:
        return fail(prog, "fit", error, code=2)
    if words is None:
        sys.argv[1:] = _shown_in_full(sys.argv[1:])  # processes of DDP are started with the same words
    settings = {"prog": prog, "exit_on_error": False}
    command_line = type("_Named", (_CommandLine,), {"files": " and ".join(map(str, files))})
    try:
        with working_directory(first=True):
            command_line(
                parser_kwargs={**settings, "fit": settings},
                save_config_kwargs={"overwrite": True},  # a second run in the same folder is allowed
                args=None if words is None else _shown_in_full(words),
            )
    except SystemExit as stop:  # the help has been printed
        return stop.code if isinstance(stop.code, int) else 0
    except ArgumentError as error:
        return fail(prog, "fit", explain(files, error), code=2)
    except OSError as error:
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise
        message = error if error.filename is None else f"{error.filename}: {error.strerror}"
        return fail(prog, "fit", f"{message} {TRACEBACK_HINT}")
    except (MisconfigurationException, TypeError, ValueError) as error:
        if raised_in(error) == "jsonargparse":
            return fail(prog, "fit", f"{cause(error)} {TRACEBACK_HINT}", code=2)
        if not (isinstance(error, MisconfigurationException) or _is_check(error)):
            raise
        return fail(prog, "fit", f"{error} {TRACEBACK_HINT}", code=2)
    return 0


def _config_files(words: list[str]) -> list[Path]:
    """The configuration files among the words; text in the place of a file is left to Lightning."""
    files = []
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            file = value if equals else "".join(words[index + 1 : index + 2])
            if file and not file.lstrip().startswith("{") and "\n" not in file:
                files.append(Path(file))
    return files


def _shown_in_full(words: list[str]) -> list[str]:
    return ["--help" if word == "--help-all" else word for word in words]


def _is_check(error: BaseException) -> bool:
    """Whether an error was raised on purpose, by a check of this project or of Lightning, rather than by a bug."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return raised_in(error) in (*PACKAGES, *_LIGHTNING) and (last.line or "").startswith("raise")
