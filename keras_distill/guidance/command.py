"""The command ``keras-distill compare``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from distill_core.guidance.comparison import Comparison
from distill_core.guidance.files import read_comparison
from keras_distill.guidance.compare import compare
from keras_distill.model import DistillModel

_REQUIRED = ("student", "data", "methods", "metric", "compile", "fit", "folder")
_KNOWN = tuple(
    name
    for name in dict.fromkeys(
        [*inspect.signature(compare).parameters, *inspect.signature(DistillModel.__init__).parameters]
    )
    if name not in ("settings", "terms", "progress", "resume", "self", "kwargs")
)


def compare_from_file(file: Path, **replaced: Any) -> Comparison:
    """Make the comparison that a YAML file describes.

    Args:
        file: The file: the arguments of :func:`compare`. ``student`` and ``data`` are class_paths with init_args that
            are called for each run, and so may ``compile`` be; elsewhere a class_path stands for the object that it
            makes.
        **replaced: Arguments that replace those of the file.

    Returns:
        The comparison.

    Raises:
        ValueError: If something in the file is wrong.
        OSError: If it cannot be read.
    """
    return compare(**read_comparison(file, replaced, _REQUIRED, ("student", "data", "compile"), _KNOWN))
