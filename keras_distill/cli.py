"""The commands of ``keras-distill``; :mod:`distill_core.cli.keras` parses its words."""

from __future__ import annotations

import argparse
from pathlib import Path

from distill_core.cli import run_demo, run_export, validate
from distill_core.installed import unusable

_PROG = "keras-distill"


def demo(arguments: argparse.Namespace) -> int:
    """The command ``demo``.

    Args:
        arguments: ``output``, ``seeds`` and ``quick``.

    Returns:
        The exit code.
    """
    return run_demo(_PROG, "keras_distill.demo", arguments)


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
    from keras_distill.guidance.command import compare_from_file

    replaced = {} if arguments.workers is None else {"workers": arguments.workers}
    return run_compare(
        _PROG, arguments.file, lambda: compare_from_file(arguments.file, resume=not arguments.fresh, **replaced)
    )


def export(arguments: argparse.Namespace) -> int:
    """The command ``export``.

    Args:
        arguments: ``source``, ``output`` and ``modules``.

    Returns:
        The exit code.
    """
    from keras_distill.export import export_student

    return run_export(
        _PROG, arguments.output, lambda: export_student(arguments.source, arguments.output, arguments.modules)
    )


def validate_config(arguments: argparse.Namespace) -> int:
    """The command ``validate-config``.

    Args:
        arguments: ``file``.

    Returns:
        The exit code.
    """
    from keras_distill.launcher.conf import DistillationConf
    from keras_distill.launcher.criteria import criterion_of

    def check(file: Path) -> None:
        criterion_of(DistillationConf(file).distillation.train.criterion)

    return validate(_PROG, arguments.file, check)
