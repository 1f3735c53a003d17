"""The command ``export``: a student alone, out of a .keras file."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import keras

from distill_core.cli import ExportError, replaced, working_directory
from distill_core.installed import unusable
from distill_core.terminal import one_line
from keras_distill.model import DistillModel

_SUFFIXES: Final = (".keras", ".weights.h5", ".onnx", ".tflite")
# By backend and suffix; Keras itself names the packages of the other pairs.
_NEEDS: Final = {
    ("tensorflow", ".onnx"): ["tf2onnx"],
    ("torch", ".onnx"): ["onnx", "onnxscript"],
    ("torch", ""): ["tensorflow"],
    ("jax", ""): ["tensorflow"],
}
_FORMATS: Final = {".onnx": "onnx", ".tflite": "litert", "": "tf_saved_model"}


def export_student(source: Path, output: Path, modules: Sequence[str] = ()) -> str:
    """Write the student of a saved model.

    Args:
        source: File of a :class:`DistillModel`, or of a plain model.
        output: The file to write; its suffix says the form. Without a suffix it is a SavedModel folder.
        modules: Modules to import first, with the classes that the file names.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: If an argument or the file is wrong.
        OSError: If a file cannot be read or written.
        ExportError: If the student cannot be exported.
        ImportError: If a package that the form needs is not installed or too old.
    """
    suffix = next((suffix for suffix in _SUFFIXES if output.name.endswith(suffix)), "")
    if output.suffix and not suffix:
        raise ValueError(
            f"Expected OUTPUT to end with one of {', '.join(_SUFFIXES)}, or to have no suffix for a SavedModel folder,"
            f" but got {str(output)!r}."
        )
    if output.is_dir() and (suffix or not (output / "saved_model.pb").exists()):
        raise ValueError(f"Expected OUTPUT to be a new file or a SavedModel, but got the folder {str(output)!r}.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"Expected OUTPUT to be another file than SOURCE, but got {str(output)!r} for both.")
    if problem := unusable("This form", *_NEEDS.get((keras.backend.backend(), suffix), [])):
        raise problem
    with working_directory(first=True):
        for module in modules:
            _import(module)
        student = _load(source)
    with replaced(output) as file:
        _write(student, file, suffix)
    return f"{output}: {student.name}, {student.count_params():,} parameters"


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"Expected --import to name a module, but got {module!r}: {error}.") from None


def _load(source: Path) -> keras.Model:
    """The student in a file. It is read in safe mode: the file cannot run code.

    Raises:
        ValueError: If it is not the file of a model.
        OSError: If the file cannot be read.
    """
    with open(source, "rb"):
        pass
    try:
        model = keras.saving.load_model(source, compile=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"Expected {source} to be a .keras file of a whole model, but it cannot be loaded: {one_line(error)[:300]}"
        ) from error
    return model.student if isinstance(model, DistillModel) else model


def _write(student: keras.Model, file: Path, suffix: str) -> None:
    if suffix == ".keras":
        student.save(file)
        return
    if suffix == ".weights.h5":
        student.save_weights(file)
        return
    form = _FORMATS[suffix]
    try:
        if getattr(student, "inputs", None):  # Keras exports a model to ONNX only after a call
            inputs = student.inputs[0] if isinstance(student, keras.Sequential) else student.input
            student(keras.tree.map_structure(_zeros, inputs), training=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converters, about themselves
            student.export(str(file), format=form, verbose=False)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"Keras cannot export {student.name} to {form}: {type(error).__name__}: {one_line(error)[:300]}"
        ) from error


def _zeros(tensor: keras.KerasTensor) -> Any:
    return keras.ops.zeros([size or 1 for size in tensor.shape], tensor.dtype)
