"""The command ``lightning-distill``. PyTorch and Lightning are imported when a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from distill_core.cli import (
    SHOW_TRACEBACK,
    Parser,
    add_completion,
    add_demo,
    add_export,
    add_validate,
    call,
    new_parser,
    run,
)
from distill_core.cli.compare import add_compare
from distill_core.cli.report import add_report

_PROG: Final = "lightning-distill"
_FIT_EXAMPLE: Final = """\
lightning-distill fit --config distill.yaml --trainer.max_epochs 20

where distill.yaml holds:

  model:
    class_path: lightning_distill.DistillModule
    init_args:
      student: {class_path: my_project.Net, init_args: {width: 8}}
      teacher:
        class_path: lightning_distill.load_teacher
        init_args:
          checkpoint: teacher.ckpt
          model: {class_path: my_project.Net, init_args: {width: 64}}
      terms:
        - class_path: lightning_distill.LogitsDistillation
          init_args:
            loss:
              class_path: lightning_distill.SoftTargetLoss
              init_args: {temperature: 2.0}
      optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
  data:
    class_path: my_project.MyDataModule
  trainer:
    max_epochs: 10

`model` may be a LightningModule of yours; then distil in a callback:

  trainer:
    callbacks:
      - class_path: lightning_distill.DistillCallback
        init_args: {teacher: ..., terms: [...]}

A term is a LogitsDistillation, FeatureDistillation or SelfDistillation, or any
loss on logits. To see the arguments of a class:

  lightning-distill fit --model.help lightning_distill.DistillModule
  lightning-distill fit --trainer.callbacks.help lightning_distill.DistillCallback"""

_COMPARE_EXAMPLE: Final = """\
module: {class_path: my_project.LitClassifier}
data: {class_path: my_project.make_loaders}
teacher:
  class_path: lightning_distill.load_teacher
  init_args: {checkpoint: teacher.ckpt, model: {class_path: my_project.Net}}
methods:
  soft targets:
    - class_path: lightning_distill.LogitsDistillation
  DIST, half the task:
    terms:
      - class_path: lightning_distill.LogitsDistillation
        init_args: {loss: {class_path: lightning_distill.DISTLoss}}
    task_weight: 0.5
metric: val_acc
seeds: 5
trainer: {max_epochs: 10}
folder: results"""

_BUILD_EXAMPLE: Final = """\
lightning-distill cache build cache.yaml

where cache.yaml holds:

  path: cache
  teacher: {class_path: my_project.teacher}
  dataset: {class_path: my_project.MyDataset, init_args: {folder: data}}
  batch_size: 256
  # and other arguments of TeacherCache.build: layers, outputs, top_k, dtype,
  # views, transform_seed, num_workers, device, allow_stale_augmentation,
  # shard_bytes"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after the command's name; ``None`` takes them from the command line.

    Returns:
        The exit code, as in :data:`distill_core.cli.EXIT_CODES`. An error is one line on the standard error stream.

    Example:
        >>> main(["--version"])
        lightning-distill ...
        0
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if _is_fit(words):
        return call(_PROG, "fit", "lightning_distill.cli:fit", None if argv is None else words)
    return run(_parser(), words)


def parse(words: Sequence[str]) -> None:
    """Parse the words of a command line.

    Args:
        words: The words after the command's name.

    Raises:
        SystemExit: After help, the version or an error of usage.
    """
    if not _is_fit(words):
        _parser().parse_args(words)


def _is_fit(words: Sequence[str]) -> bool:
    """Whether Lightning's command line reads the words: those of ``fit``, except for a request for help."""
    return list(words[:1]) == ["fit"] and not {"-h", "--help"} & {*words}


def _parser() -> Parser:
    parser, commands = new_parser(
        _PROG,
        "Knowledge distillation for PyTorch Lightning.",
        example=f"{_PROG} demo\n{_PROG} fit --config distill.yaml\n{_PROG} export last.ckpt student.pt",
    )
    _add_demo(commands)
    _add_fit(commands)
    add_compare(commands, _PROG, _COMPARE_EXAMPLE, work="lightning_distill.cli:compare")
    _add_export(commands)
    add_validate(commands, _PROG, "lightning_distill.Distillation", work="lightning_distill.cli:validate_config")
    _add_cache(commands)
    add_report(commands, _PROG)
    add_completion(commands, _PROG)
    return parser


def _add_demo(commands: Any) -> None:
    demo = add_demo(
        commands,
        _PROG,
        output="demo_output",
        writes="the student's state_dict",
        seconds="a minute",
        work="lightning_distill.cli:demo",
    )
    demo.add_argument(
        "--task",
        choices=("digits", "language", "vision"),
        default="digits",
        help="digits; a small language model of Python's own sources, which needs the extra `language` and takes about"
        " five minutes on two cores; or a vision transformer's tokens to a convolutional network, without labels, which"
        " takes two (%(default)s)",
    )


def _add_fit(commands: Any) -> None:
    """Add ``fit`` for its help and for completion; Lightning's own command line parses its options."""
    fit = commands.add_parser(
        "fit",
        usage=f"{_PROG} fit --config FILE [options]",
        help="train the model that a YAML file describes, with Lightning's command line",
        description="Build model, data and Trainer from a YAML file, fit, and print the final numbers. The classes that"
        " the file names are imported and called: use only files that you trust.",
        example=_FIT_EXAMPLE,
        epilog=f"{SHOW_TRACEBACK}=1 in the environment shows where an error was raised.",
    )
    fit.add_argument("-c", "--config", type=Path, metavar="FILE", help="the YAML file; may be repeated")
    fit.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint of a training to resume")
    fit.add_argument("--trainer.max_epochs", metavar="N", help="like this, any value of the file can be replaced")
    fit.add_argument("--print_config", action="store_true", help="print the whole file, defaults included, and stop")
    fit.add_argument("--help-all", action="store_true", help="show every option of Lightning's command line")


def _add_export(commands: Any) -> None:
    export = add_export(
        commands,
        _PROG,
        source="a checkpoint of a DistillModule, or of a module that was trained with a DistillCallback",
        outputs=".pt for the state_dict, .safetensors, .pt2 for torch.export, or .onnx (needs onnx and onnxscript);"
        " the last two need the network and the shape of its input",
        example=f"{_PROG} export last.ckpt student.pt\n"
        f"{_PROG} export last.ckpt student.onnx --config distill.yaml --input-shape N,3,32,32\n"
        f"{_PROG} export last.ckpt student.pt2 --model my_project.net --input-shape N,16:int64",
        work="lightning_distill.cli:export",
    )
    network = export.add_mutually_exclusive_group()
    network.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the YAML file of `fit`: the network is its `model.init_args.student`, else its `model`. Runs code",
    )
    network.add_argument(
        "--model",
        metavar="CLASS",
        help="class or function that makes the network, such as my_project.Net, or in YAML with its arguments:"
        " '{class_path: my_project.Net, init_args: {width: 8}}'. Runs code",
    )
    export.add_argument(
        "--input-shape",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of the network's input, such as 1,3,32,32; N as the first number allows any batch size; with"
        " :int64 or another dtype at its end where it is not float32; repeat it for several inputs",
    )
    export.add_argument(
        "--prefix",
        metavar="TEXT",
        help='text before the student\'s names in the checkpoint, such as "model."; found if only one fits',
    )


def _place(text: str) -> str | Path:
    """A folder, or a URL of one, in which a path would lose a slash."""
    return text if "://" in text else Path(text)


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="build, merge, describe or check a cache of a teacher's outputs",
        description="A cache holds a teacher's outputs for every sample of a dataset, so that training does not need"
        " the teacher.",
        example=f"{_PROG} cache build cache.yaml\n{_PROG} cache info cache",
        epilog=f"See `{_PROG} cache ACTION --help`.",
    )
    actions = cache.add_subparsers(dest="action", metavar="action", required=True)
    build = actions.add_parser(
        "build",
        help="run a teacher over the dataset that a YAML file names",
        description="Run a teacher over a dataset. The YAML file holds `path`, the folder to write; `teacher` and"
        " `dataset`, each with class_path and init_args; and the settings of TeacherCache.build. A build that was"
        " stopped is resumed.",
        example=_BUILD_EXAMPLE,
        epilog="The file runs code: each class_path is imported and called with its init_args. Build only from files"
        " that you trust.",
    )
    build.add_argument("path", type=Path, metavar="FILE", help="the YAML file")
    build.add_argument(
        "--part",
        metavar="K/N",
        help="build the K-th of N parts, in a folder with the ending -part-K-of-N; `cache merge` joins the folders",
    )
    build.set_defaults(work="lightning_distill.cli:cache", command="cache build")
    merge = actions.add_parser(
        "merge",
        help="make one cache of the folders that `cache build --part` has built",
        description="Copy the shards of several folders into one cache, and compare every file with its checksum. A"
        " merge that was stopped is resumed.",
        example=f"{_PROG} cache merge cache cache-part-*",
    )
    merge.add_argument("path", type=_place, metavar="FOLDER", help="the folder of the merged cache")
    merge.add_argument("parts", type=_place, metavar="PART", nargs="+", help="the folders of the parts")
    merge.set_defaults(work="lightning_distill.cli:cache", command="cache merge")
    for action, description in (
        ("info", "Print the arrays of a cache, and the teacher that they come from."),
        ("verify", "Compare every file of a cache with its checksum, and read it as training does."),
    ):
        parser = actions.add_parser(
            action,
            help=description[0].lower() + description[1:-1],
            description=description,
            example=f"{_PROG} cache {action} cache",
        )
        parser.add_argument("path", type=_place, metavar="FOLDER", help="the cache's folder, or its URL")
        parser.set_defaults(work="lightning_distill.cli:cache", command=f"cache {action}")
