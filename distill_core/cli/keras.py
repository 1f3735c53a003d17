"""The command ``keras-distill``. Keras is imported when a command needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from distill_core.cli import Parser, add_completion, add_demo, add_export, add_validate, new_parser, run
from distill_core.cli.compare import add_compare
from distill_core.cli.report import add_report

_PROG: Final = "keras-distill"
_COMPARE_EXAMPLE: Final = """\
student: {class_path: my_project.make_student}
data: {class_path: my_project.make_arrays}
teacher:
  class_path: keras.saving.load_model
  init_args: {filepath: teacher.keras}
methods:
  soft targets:
    - class_path: keras_distill.LogitsDistillation
  DIST, half the task:
    terms:
      - class_path: keras_distill.LogitsDistillation
        init_args: {loss: {class_path: keras_distill.DISTLoss}}
    task_weight: 0.5
metric: val_accuracy
seeds: 5
compile:
  optimizer: adam
  loss:
    class_path: keras.losses.SparseCategoricalCrossentropy
    init_args: {from_logits: true}
  metrics: [accuracy]
fit: {epochs: 10}
folder: results"""


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
    return run(_parser(), argv)


def parse(words: Sequence[str]) -> None:
    """Parse the words of a command line.

    Args:
        words: The words after the command's name.

    Raises:
        SystemExit: After help, the version or an error of usage.
    """
    _parser().parse_args(words)


def _parser() -> Parser:
    parser, commands = new_parser(
        _PROG,
        "Knowledge distillation for Keras.",
        example=f"{_PROG} demo\n{_PROG} export distillation.keras student.tflite",
    )
    add_demo(
        commands,
        _PROG,
        output="demo_output/keras",
        writes="the student as a .keras file",
        seconds="two minutes",
        work="keras_distill.cli:demo",
    )
    add_compare(commands, _PROG, _COMPARE_EXAMPLE, work="keras_distill.cli:compare")
    add_validate(commands, _PROG, "keras_distill.Distillation", work="keras_distill.cli:validate_config")
    export = add_export(
        commands,
        _PROG,
        source="a .keras file of a DistillModel, or of a plain model such as StudentCheckpoint saves",
        outputs=".keras, .weights.h5, .onnx (needs tf2onnx on TensorFlow, onnx and onnxscript on PyTorch), .tflite for"
        " LiteRT, or no suffix for a SavedModel folder (needs TensorFlow)",
        example=f"{_PROG} export distillation.keras student.keras\n"
        f"{_PROG} export distillation.keras student_folder\n"
        f"{_PROG} export best.keras student.onnx --import my_layers",
        work="keras_distill.cli:export",
    )
    export.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours to import first, with the classes that the file names; may be repeated",
    )
    add_report(commands, _PROG)
    add_completion(commands, _PROG)
    return parser
