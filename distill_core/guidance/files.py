"""A comparison from a YAML file: the parts that it names, and the command ``compare``."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core import PACKAGES
from distill_core.checks import Checks, message
from distill_core.class_paths import check_class_path, import_class_path, make_from_class_path
from distill_core.cli import TRACEBACK_HINT, fail, file_error, working_directory
from distill_core.guidance.comparison import Comparison
from distill_core.store import CacheError
from distill_core.terminal import write_line
from distill_core.yaml_files import read_yaml


@dataclass(frozen=True)
class FromFile:
    """A function that makes what a file names, as often as it is called. It can be pickled.

    Args:
        key: Its key in the file.
        class_path: Path of the class or function.
        init_args: Its arguments.
        where: Text before messages.
    """

    key: str
    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def __call__(self, **further: Any) -> Any:
        """Make it, with further arguments."""
        value = {"class_path": self.class_path, "init_args": {**self.init_args, **further}}
        return make_from_class_path(self.key, value, self.where)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the class or function, without the arguments that the file gives."""
        signature = inspect.signature(import_class_path(self.class_path))
        return signature.replace(
            parameters=[entry for name, entry in signature.parameters.items() if name not in self.init_args]
        )


def factory(key: str, value: Any, where: str) -> FromFile:
    """The function that makes what a file names.

    Args:
        key: The key.
        value: A mapping with ``class_path`` and perhaps ``init_args``, or the path alone.
        where: Text before messages.

    Raises:
        ValueError: If the value is not such a mapping, or names something that does not exist.
    """
    value = {"class_path": value} if isinstance(value, str) else value
    expected = f"{where}Expected `{key}` to be a class_path, perhaps with init_args"
    if not isinstance(value, dict) or value.keys() - {"init_args"} != {"class_path"}:
        raise ValueError(f"{expected}, but got {key}={value!r}.")
    arguments = value.get("init_args", {})
    if not isinstance(value["class_path"], str) or not isinstance(arguments, dict):
        raise ValueError(f"{expected}, but got {key}={value!r}.")
    try:
        check_class_path(value["class_path"])
    except ValueError as error:
        raise ValueError(f"{expected}, but got {value['class_path']!r}: {str(error).removesuffix('.')}.") from None
    return FromFile(key, value["class_path"], arguments, where)


def made(key: str, value: Any, where: str) -> Any:
    """A value of a file in which each class_path is replaced by the object that it makes.

    Args:
        key: The key of the value.
        value: The value.
        where: Text before messages.

    Raises:
        ValueError: If an object cannot be made.
    """
    if isinstance(value, dict) and "class_path" in value:
        arguments = value.get("init_args")
        if isinstance(arguments, dict):
            value = {
                **value,
                "init_args": {name: _inner(f"{key}.{name}", arguments[name], where) for name in arguments},
            }
        return make_from_class_path(key, value, where)
    if isinstance(value, dict):
        return {name: made(f"{key}.{name}", entry, where) for name, entry in value.items()}
    if isinstance(value, list):
        return [made(f"{key}[{index}]", entry, where) for index, entry in enumerate(value)]
    return value


def _inner(key: str, value: Any, where: str) -> Any:
    """An argument: lists of objects are made here, and single objects when the whole is."""
    return value if isinstance(value, dict) and "class_path" in value else made(key, value, where)


def read_comparison(
    file: Path,
    replaced: Mapping[str, Any],
    required: tuple[str, ...],
    factories: tuple[str, ...],
    known: tuple[str, ...],
) -> dict[str, Any]:
    """The arguments of ``compare`` from a YAML file. This runs the code that the file names.

    Args:
        file: The file.
        replaced: Arguments that replace those of the file, which are then not made.
        required: The keys that it must have.
        factories: The keys of functions that are called for each run.
        known: All keys.

    Returns:
        The arguments; the folder is relative to that of the file.

    Raises:
        ValueError: If something in the file is wrong; the message begins with its name.
        OSError: If it cannot be read.
    """
    values, where = read_yaml(file), f"{file}: "
    for key in values:
        if key not in known:
            remedy = Checks().closest(key, known)
            raise ValueError(f"{where}Expected `{key}` to be a known key, but it is not. {remedy}")
    for key in required:
        if key not in values:
            raise ValueError(f"{where}Expected `{key}` to be given, but it is not.")
    if not isinstance(values["methods"], dict):
        raise ValueError(where + message("`methods` to be a mapping of names to terms", f"{values['methods']!r}"))
    if not isinstance(values["folder"], str) or not values["folder"]:
        raise ValueError(where + message("`folder` to name a folder", f"folder={values['folder']!r}"))
    arguments: dict[str, Any] = {}
    with working_directory(first=True):
        for key, value in values.items():
            if key in replaced:
                continue
            is_factory = key in factories and not (key == "compile" and "class_path" not in value)
            arguments[key] = factory(key, value, where) if is_factory else made(key, value, where)
    return {**arguments, "folder": file.parent / values["folder"], **replaced}


def run_compare(prog: str, file: Path, compare: Callable[[], Comparison]) -> int:
    """Make a comparison and print it: the command ``compare``.

    Args:
        prog: Name of the program.
        file: The YAML file.
        compare: Makes the comparison.

    Returns:
        The exit code. Errors of user code in training keep their traceback.
    """
    try:
        with working_directory(first=True):
            comparison = compare()
    except CacheError as error:
        return fail(prog, "compare", error)
    except OSError as error:
        if error.filename is None:
            raise
        action = "read" if str(error.filename) == str(file) else "write"
        return fail(prog, "compare", file_error(error, file, action))
    except (ValueError, TypeError) as error:
        if not _is_check(error):
            raise
        return fail(prog, "compare", f"{error} {TRACEBACK_HINT}", code=2)
    for line in str(comparison).split("\n"):
        write_line(sys.stdout, line)
    write_line(sys.stdout, f"All records: {comparison.folder}")
    return 0


def _is_check(error: BaseException) -> bool:
    """Whether an error was raised on purpose by a check of this project."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return any(f"{package}/" in last.filename.replace("\\", "/") for package in PACKAGES) and (
        last.line or ""
    ).startswith("raise")
