"""The commands of ``lightning-distill``; :mod:`distill_core.cli.lightning` parses its words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill_core.cli import fail, file_error, run_demo, run_export, validate
from distill_core.installed import unusable
from distill_core.terminal import write_line

_PROG = "lightning-distill"


def demo(arguments: argparse.Namespace) -> int:
    """The command ``demo``.

    Args:
        arguments: ``task``, ``output``, ``seeds`` and ``quick``.

    Returns:
        The exit code.
    """
    if arguments.task == "language":
        return run_demo(_PROG, "lightning_distill.demo.language", arguments, data="tokenizers")
    module = "lightning_distill.demo.vision" if arguments.task == "vision" else "lightning_distill.demo"
    return run_demo(_PROG, module, arguments)


def fit(words: list[str] | None) -> int:
    """The command ``fit``: Lightning's own command line, with `model`, `data` and `trainer` from the file.

    Args:
        words: ``fit`` and its options; None lets Lightning read the command line itself.

    Returns:
        The exit code. Errors of user code in training keep their traceback.
    """
    if problem := unusable("This command", "jsonargparse"):
        raise problem
    from lightning_distill.fitting import run_fit

    return run_fit(_PROG, words)


def compare(arguments: argparse.Namespace) -> int:
    """The command ``compare``.

    Args:
        arguments: ``file``, ``workers`` and ``fresh``.

    Returns:
        The exit code.
    """
    if problem := unusable("This command", "yaml"):
        raise problem
    from distill_core.guidance.files import run_compare
    from lightning_distill.guidance.command import compare_from_file

    replaced = {} if arguments.workers is None else {"workers": arguments.workers}
    return run_compare(
        _PROG, arguments.file, lambda: compare_from_file(arguments.file, resume=not arguments.fresh, **replaced)
    )


def export(arguments: argparse.Namespace) -> int:
    """The command ``export``.

    Args:
        arguments: ``source``, ``output``, ``model``, ``config``, ``input_shape`` and ``prefix``.

    Returns:
        The exit code.
    """
    from lightning_distill.export import export_student

    return run_export(
        _PROG,
        arguments.output,
        lambda: export_student(
            arguments.source,
            arguments.output,
            model=arguments.model,
            config=arguments.config,
            shapes=arguments.input_shape,
            prefix=arguments.prefix,
        ),
    )


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
    """The commands ``cache build``, ``cache merge``, ``cache info`` and ``cache verify``.

    Args:
        arguments: ``command`` and ``path``; ``part`` of a build, ``parts`` of a merge.

    Returns:
        The exit code.
    """
    from lightning_distill.cache import CacheError, TeacherCache
    from lightning_distill.cache.command import build_from_file, describe

    command, path = arguments.command, arguments.path
    try:
        if command == "cache build":
            build_from_file(path, arguments.part)
        elif command == "cache merge":
            cache = TeacherCache.merge(path, arguments.parts)
            write_line(sys.stdout, f"{path}: {cache.manifest.rows:,} rows in {cache.manifest.shards} shards")
        elif command == "cache verify":
            TeacherCache.open(path).verify()
            write_line(sys.stdout, f"{path}: OK")
        else:
            describe(TeacherCache.open(path))
    except CacheError as error:
        return fail(_PROG, command, error)
    except OSError as error:
        action = "write" if command in ("cache build", "cache merge") else "read"
        return fail(_PROG, command, file_error(error, path, action))
    except ValueError as error:
        return fail(_PROG, command, error, code=2)
    return 0
