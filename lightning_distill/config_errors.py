"""One readable line for an error of jsonargparse: it lists every type that a value could have had."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distill_core.class_paths import check_class_path, import_class_path
from distill_core.terminal import one_line, short
from distill_core.yaml_files import read_yaml
from lightning_distill.checks import closest

_SECTIONS: Final = (
    *("model", "data", "trainer", "seed_everything", "optimizer", "lr_scheduler"),
    *("ckpt_path", "weights_only", "config"),
)
_LONGEST: Final = 300
_HELP: Final = "See `lightning-distill fit --help`."


def explain(files: Sequence[Path], error: ArgumentError) -> str:
    """The cause of an error of jsonargparse, on one line.

    The values of the files are checked one by one, the innermost first. Where no file has an error, the message is
    jsonargparse's own, cut to a readable length.

    Args:
        files: The configuration files.
        error: The error.

    Returns:
        The message, which begins with the file where one is wrong.
    """
    for file in files:
        for path, problem in _problems(read_yaml(file)):
            return f"{file}: {path}: {problem}"
    message = re.sub(r"\bfit\.", "--", one_line(error))
    message = message[message.rfind("Problem with given class_path") :] if "Problem with given" in message else message
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]}..."
    return f"{message.removesuffix('.')}. {_HELP}"


def cause(error: BaseException) -> str:
    """The error of a constructor, out of what jsonargparse raises in its place, with every type that it has tried.

    Args:
        error: The error of jsonargparse.

    Returns:
        The message of a check of this project if there is one, otherwise of the first error of other code.
    """
    if checks := re.findall(r"- (Expected [^\n]*, but [^\n]*)", str(error)):
        return str(checks[-1])
    while error.__cause__ is not None and raised_in(error) == "jsonargparse":
        error = error.__cause__
    return one_line(error)[:_LONGEST]


def raised_in(error: BaseException) -> str:
    """Name of the package whose code has raised an error."""
    trace, name = error.__traceback__, ""
    while trace is not None:
        name, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return name.partition(".")[0]


def _problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The place and description of everything that is wrong in a file."""
    for key in values:
        if key not in _SECTIONS:
            yield key, f"Expected a section of the file, but got `{key}`. {closest(key, _SECTIONS)}"
    for path, spec in _specs(values, ""):
        yield from _problems_of(path, spec)
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping):
        yield from _wrong_arguments("trainer", Trainer, trainer)
    model = values.get("model")
    if isinstance(model, Mapping) and "class_path" not in model:
        yield "model", f"Expected `class_path` and `init_args`, but got {short(dict(model))}."


def _specs(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a class_path, the innermost first, and its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _specs(inner, f"{path}.{key}" if path else str(key))
        if "class_path" in value:
            yield path, value
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _specs(inner, f"{path}[{index}]")


def _problems_of(path: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    class_path, init_args = spec["class_path"], spec.get("init_args") or {}
    if not isinstance(class_path, str) or "." not in class_path:
        return  # jsonargparse also knows short names
    try:
        check_class_path(class_path)
        target = import_class_path(class_path)
    except ValueError as error:
        yield f"{path}.class_path", f"Expected a class or a function, but {error}"
        return
    for key in spec:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            yield path, f"Expected `class_path` and `init_args`, but got `{key}`. Arguments stand under `init_args`."
    if isinstance(init_args, Mapping):
        yield from _wrong_arguments(f"{path}.init_args", target, init_args)


def _wrong_arguments(path: str, target: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Arguments that a class or function does not take, those of a wrong type, and those that are missing."""
    name = target.__qualname__
    known = [*dict.fromkeys(argument.partition(".")[0] for argument in _added(ArgumentParser(), target))]
    if not known and any(each.kind is each.VAR_KEYWORD for each in _parameters(target).values()):
        return  # it takes anything
    for key, value in arguments.items():
        if key not in known:
            yield path, f"Expected arguments of {name}, but got `{key}`. {closest(str(key), known)}"
            continue
        parser = ArgumentParser(exit_on_error=False)
        _added(parser, target, skip={other for other in known if other != key})
        try:
            parser.parse_object({key: value})
        except ArgumentError:
            function = _without_type(value)
            remedy = f" Write in Python what {function} returns: `def {function}(...) -> torch.nn.Module`."
            yield (
                f"{path}.{key}",
                (f"Expected {_annotation(target, key)}, but got {short(value)}.{remedy if function else ''}"),
            )
    made_later = isinstance(target, type) and issubclass(target, (Optimizer, LRScheduler, ReduceLROnPlateau))
    missing = [] if made_later else [key for key in _required(target) if key in known and key not in arguments]
    if missing:
        yield path, f"Expected `{missing[0]}`, which {name} requires, but it is missing."


def _without_type(value: Any) -> str | None:
    """The name of the function that a class_path names, if jsonargparse refuses it because it has no return type."""
    try:
        target = import_class_path(value["class_path"])
    except (TypeError, KeyError, ValueError, AttributeError):  # of another form
        return None
    untyped = inspect.isfunction(target) and "return" not in target.__annotations__
    return target.__name__ if untyped else None


def _added(parser: ArgumentParser, target: Any, skip: set[str | int] | None = None) -> list[str]:
    """Add the arguments of a class or function to a parser, and return their names."""
    add = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    names: list[str] = add(target, skip=skip or set(), fail_untyped=False)
    return names


def _required(target: Any) -> list[str]:
    parameters = _parameters(target)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, each in parameters.items() if each.default is each.empty and each.kind in kinds]


def _annotation(target: Any, key: str) -> str:
    parameter = _parameters(target).get(key)
    if parameter is None or parameter.annotation is parameter.empty:
        return "another value"
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}
