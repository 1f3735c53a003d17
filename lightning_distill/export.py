"""The command ``export``: a student alone, out of a checkpoint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from distill_core.class_paths import make_from_class_path
from distill_core.cli import ExportError, replaced, working_directory
from distill_core.installed import unusable
from distill_core.terminal import one_line
from distill_core.yaml_files import read_yaml
from lightning_distill.teachers.loading import load_teacher, read_state_dict

_STUDENT: Final = "student."  # the student's names in a DistillModule
_WEIGHTS: Final = (".pt", ".pth", ".safetensors")
_GRAPHS: Final = (".pt2", ".onnx")


def export_student(
    source: Path,
    output: Path,
    *,
    model: str | None = None,
    config: Path | None = None,
    shapes: Sequence[str] = (),
    prefix: str | None = None,
) -> str:
    """Write the student of a checkpoint.

    Args:
        source: The checkpoint.
        output: The file to write; its suffix says the form.
        model: Class path of the network, or in YAML a class_path with init_args.
        config: YAML file of ``fit`` that describes the network.
        shapes: Shapes of the network's inputs, for ``.pt2`` and ``.onnx``.
        prefix: Text before the student's names; ``None`` finds it.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: If an argument is wrong, or the checkpoint does not fit.
        OSError: If a file cannot be read or written.
        ExportError: If the network cannot be exported.
        ImportError: If a package that the form needs is not installed or too old.
    """
    suffix = output.suffix.lower()
    if suffix not in (*_WEIGHTS, *_GRAPHS):
        raise ValueError(
            f"Expected OUTPUT to end with one of {', '.join((*_WEIGHTS, *_GRAPHS))}, but got {str(output)!r}."
        )
    if output.is_dir():
        raise ValueError(f"Expected OUTPUT to be a file, but got the folder {str(output)!r}.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"Expected OUTPUT to be another file than SOURCE, but got {str(output)!r} for both.")
    if suffix in _GRAPHS and not (shapes and (model or config)):
        raise ValueError(
            f"Expected --input-shape, and --model or --config, for a {suffix} file, but they are missing. Pass for"
            " example: --model my_project.Net --input-shape 1,3,32,32"
        )
    inputs = [_input(shape) for shape in shapes]
    saved = read_state_dict(source)
    if prefix is None and any(name.startswith(_STUDENT) for name in saved):
        prefix = _STUDENT
    if model is None and config is None:
        state = _student_state(saved, prefix, source)
    else:
        network, whole = _network(model, config)
        load_teacher(source, network, "" if whole else prefix)
        state = network.state_dict()
        if suffix in _GRAPHS:
            with replaced(output) as file:
                _write_graph(network, inputs, file)
            return f"{output}: {type(network).__name__}"
    with replaced(output) as file:
        _write_weights(state, file)
    return f"{output}: {len(state)} entries, first {next(iter(state))!r}"


def _student_state(saved: dict[str, Any], prefix: str | None, source: Path) -> dict[str, Any]:
    """The student's part of a state_dict, under its own names."""
    if prefix is None and not any("." in name for name in saved):  # a single layer
        prefix = ""
    if prefix is None:
        starts = [*dict.fromkeys(name.partition(".")[0] + "." for name in saved)]
        if len(starts) > 1:
            raise ValueError(
                f"Expected one network in {source}, but its names begin with {', '.join(map(repr, starts[:8]))}. Pass"
                f" --prefix with one of these, such as --prefix {starts[0]}, or --prefix '' for all of them."
            )
        prefix = starts[0]
    state = {name[len(prefix) :]: value for name, value in saved.items() if name.startswith(prefix)}
    if not state or "" in state:
        raise ValueError(
            f"Expected names that begin with --prefix {prefix!r} in {source}, but its first names are"
            f" {list(saved)[:3]}."
        )
    return state


def _write_weights(state: dict[str, Any], file: Path) -> None:
    if file.suffix.lower() != ".safetensors":
        torch.save(dict(state), file)
        return
    if problem := unusable("A .safetensors file", "safetensors"):
        raise problem
    from safetensors.torch import save

    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"Expected tensors for a .safetensors file, but {wrong[0]!r} is not one. Write a .pt file.")
    # copies, since tied weights are refused; written here, since the library would make the file private
    file.write_bytes(save({name: value.detach().clone().contiguous() for name, value in state.items()}))


# A network and its input ---------------------------------------------------------------------------------------------


def _network(model: str | None, config: Path | None) -> tuple[nn.Module, bool]:
    """The network, and whether it is the whole LightningModule of a file."""
    key, where, whole = "--model", "", False
    if config is None:
        spec = _parsed(model or "")
    else:
        key, where, spec = "model", f"{config}: ", read_yaml(config).get("model")
        init_args = spec.get("init_args") if isinstance(spec, dict) else None
        whole = not isinstance(init_args, dict) or "student" not in init_args
        if isinstance(init_args, dict) and not whole:
            key, spec = "model.init_args.student", init_args["student"]
    with working_directory(first=True):
        network = make_from_class_path(key, {"class_path": spec} if isinstance(spec, str) else spec, where)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{where}Expected `{key}` to make a torch.nn.Module, but got a {type(network).__name__}.")
    return network, whole


def _parsed(model: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(model)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected --model to be a class path, or YAML, but got {one_line(error)}.") from None


def _input(shape: str) -> tuple[Tensor, bool]:
    """An example of an input, and whether its batch size is free."""
    match = re.fullmatch(r"(N|\d+)((?:,\d+)*)(?::(\w+))?", shape.replace(" ", ""))
    dtype = getattr(torch, (match[3] if match else None) or "float32", None)
    if match is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"Expected --input-shape to be numbers, such as 1,3,32,32 or N,16:int64, but got {shape!r}. N is a batch of"
            " any size, and what follows a colon is a dtype."
        )
    sizes = [int(size) for size in match[2].split(",")[1:]]
    free = match[1] == "N"
    return torch.zeros(2 if free else int(match[1]), *sizes, dtype=dtype), free  # 1 would be taken for a fixed size


def _write_graph(network: nn.Module, inputs: Sequence[tuple[Tensor, bool]], file: Path) -> None:
    onnx = file.suffix.lower() == ".onnx"
    if onnx and (problem := unusable("An .onnx file", "onnx", "onnxscript")):
        raise problem
    examples = tuple(example for example, _ in inputs)
    batch = torch.export.Dim("N")
    free = tuple({0: batch} if is_free else None for _, is_free in inputs) if any(each[1] for each in inputs) else None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(network, examples, dynamic_shapes=free, strict=False)
            if onnx:
                torch.onnx.export(program, (), file, dynamo=True, external_data=False, verbose=False)
            else:
                torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(example.shape)) for example in examples)
        raise ExportError(
            f"torch cannot export {type(network).__name__} with inputs of shape {shapes}:"
            f" {type(error).__name__}: {one_line(error)[:300]}"
        ) from error
