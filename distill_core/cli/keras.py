"""The command ``keras-distill``. Keras is imported when a command needs it."""

from __future__ import annotations

from collections.abc import Sequence

from distill_core.cli import add_demo, add_validate, new_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after the command's name; ``None`` takes them from the command line.

    Returns:
        The exit code, as in :data:`distill_core.cli.EXIT_CODES`. An error is one line on the standard error stream.

    Example:
        >>> main(["--version"])
        keras-distill ...
        0
    """
    parser, commands = new_parser("keras-distill", "Knowledge distillation for Keras.")
    add_demo(
        commands,
        output="demo_output/keras",
        writes="the student as a .keras file",
        seconds="40 seconds",
        work="keras_distill.cli:demo",
    )
    add_validate(commands, "keras_distill.Distillation", work="keras_distill.cli:validate_config")
    return run(parser, argv)
