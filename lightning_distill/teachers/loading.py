"""A teacher from a file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Keys under which training scripts keep a state_dict, the most common first.
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")


def load_teacher(checkpoint: str | PathLike[str], model: nn.Module, prefix: str | None = None) -> nn.Module:
    """A teacher with the weights of a plain state_dict file or a Lightning checkpoint.

    The file is read with ``weights_only=True``: it cannot run code.

    Args:
        checkpoint: Path of the file: a state_dict, or a dict that holds one under ``"state_dict"``, ``"model"`` or
            a similar key.
        model: The network to fill, of the architecture that was saved.
        prefix: The text before the network's own parameter names in the file, such as ``"model."``; ``None`` finds it.

    Returns:
        ``model``, with every parameter and buffer loaded, in eval mode.

    Raises:
        ValueError: If the file is not a checkpoint, lacks a parameter of the model, has one of another shape or weights
            that are NaN, holds objects other than tensors and plain values, or fits under several prefixes. The model
            is then left as it was.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"net.weight": torch.full((1, 2), 3.0)}}, f"{folder}/last.ckpt")
        ...     load_teacher(f"{folder}/last.ckpt", nn.Linear(2, 1, bias=False)).weight
        Parameter containing:
        tensor([[3., 3.]], requires_grad=True)
    """
    saved = read_state_dict(checkpoint)
    names = {_plain(key): key for key in model.state_dict()}
    if prefix is None:
        prefix = _prefix(saved, names)
    state = {names[name]: saved[prefix + name] for name in names if prefix + name in saved}
    missing = sorted(set(names.values()) - set(state))
    if missing:
        raise ValueError(
            f"Expected `checkpoint` to hold every parameter of {type(model).__name__} under prefix={prefix!r}, but"
            f" {len(missing)} are missing, first {missing[0]!r}. Pass the architecture that was saved, or prefix=...;"
            f" the file's first names are {list(saved)[:3]}."
        )
    _check_values(state, model)
    extra = [key for key in saved if key.startswith(prefix) and key[len(prefix) :] not in names]
    if extra:
        warnings.warn(
            f"{checkpoint} also holds {len(extra)} parameters under prefix={prefix!r} that {type(model).__name__} does"
            f" not have, first {extra[0]!r}: they are ignored.",
            stacklevel=2,
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Expected `checkpoint` to fit {type(model).__name__}, but got {' '.join(str(error).split())}"
        ) from None
    return model.eval()


def read_state_dict(checkpoint: str | PathLike[str]) -> dict[str, Any]:
    """The state_dict in a file, with the names that its modules have outside of DDP and torch.compile.

    The file is read with ``weights_only=True``: it cannot run code.

    Args:
        checkpoint: Path of the file, as for :func:`load_teacher`.

    Returns:
        The values by their names.

    Raises:
        ValueError: If the file does not hold a state_dict of tensors and plain values.
        FileNotFoundError: If the file does not exist.
    """
    return {_plain(key): value for key, value in _state_dict(_read(checkpoint), checkpoint).items()}


def _read(checkpoint: str | PathLike[str]) -> Any:
    """The content of a file, which must be of tensors and plain values.

    Raises:
        ValueError: If it is something else.
    """
    expected = f"Expected `checkpoint` to be a file written by torch.save, but {checkpoint}"
    path = Path(checkpoint)
    if path.stat().st_size == 0:
        raise ValueError(f"{expected} is empty.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")  # refused below
            return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        objects = _objects(path)
        if objects:
            raise ValueError(
                f"Expected `checkpoint` to hold tensors and plain values only, but {checkpoint} also holds"
                f" {', '.join(objects)}: in its hyper-parameters, or because a whole model was saved. Save"
                " `model.state_dict()` alone. If you trust the file, allow these classes first:"
                f" torch.serialization.add_safe_globals([{', '.join(objects)}])."
            ) from None
        if "TorchScript" in str(error):
            raise ValueError(f"{expected} is a TorchScript archive. Save `model.state_dict()`.") from None
        if path.suffix == ".safetensors":
            remedy = "Load it with safetensors.torch.load_file and pass the result to `model.load_state_dict`."
            raise ValueError(f"{expected} is a safetensors file. {remedy}") from None
        with open(path, "rb") as handle:
            start = handle.read(12)
        raise ValueError(
            f"{expected} is not, or is damaged: it begins with {start!r}. Download or save it again."
        ) from None


def _objects(path: Path) -> list[str]:
    """The classes of objects in a file that `weights_only=True` refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is not a checkpoint at all
        return []


def _state_dict(content: Any, checkpoint: Any) -> dict[str, Any]:
    """The state_dict in the content of a file.

    Raises:
        ValueError: If the file holds no state_dict.
    """
    expected = f"Expected `checkpoint` to hold a state_dict, but {checkpoint} holds"
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise ValueError(f"{expected} a value of type {type(content).__name__}. Save `model.state_dict()`.")
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = f"a dict without tensors; its keys are {list(content)[:5]}" if content else "an empty dict"
        raise ValueError(f"{expected} {keys}. Save `model.state_dict()`.")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{expected} keys that are not names, first {wrong[0]!r}. Save `model.state_dict()`.")
    return dict(content)


def _prefix(saved: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The prefix under which the file holds every name.

    Returns:
        If no prefix has every name, the prefix with the most names, the shortest of equals.

    Raises:
        ValueError: If there are several.
    """
    fitting: Counter[str] = Counter()
    for key in saved:
        starts = [0, *(index + 1 for index, character in enumerate(key) if character == ".")]
        fitting.update(key[:start] for start in starts if key[start:] in names)
    complete = sorted(prefix for prefix, number in fitting.items() if number == len(names))
    if len(complete) > 1:
        raise ValueError(
            "Expected `checkpoint` to hold the parameters once, but they fit under several prefixes:"
            f" {', '.join(map(repr, complete))}. Pass one of these as prefix=..."
        )
    if complete:
        return complete[0]
    return min(fitting, key=lambda prefix: (-fitting[prefix], len(prefix), prefix), default="")


def _check_values(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise if a value does not fit its parameter, before any is loaded."""
    parameters, current = dict(model.named_parameters()), model.state_dict()
    for name, value in state.items():
        if name.endswith("_extra_state"):  # any object that the module's `get_extra_state` returned
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"Expected {name!r} in `checkpoint` to be a tensor, but got a {type(value).__name__}.")
        if not is_lazy(current[name]) and value.shape != current[name].shape:
            raise ValueError(
                f"Expected `checkpoint` to fit {type(model).__name__}, but got size mismatch for {name!r}:"
                f" {tuple(value.shape)} in the file, {tuple(current[name].shape)} in the model."
            )
        if not (value.is_floating_point() or value.is_complex()):
            continue
        numbers = value.float() if value.element_size() == 1 else value  # torch has no such tests for 8-bit floats
        # a buffer may hold infinities, such as a mask of attention scores
        if numbers.isnan().any() or (name in parameters and not numbers.isfinite().all()):
            raise ValueError(
                f"Expected `checkpoint` to hold finite weights, but {name!r} has entries that are NaN or infinite."
                " The training that wrote it has diverged: take an earlier checkpoint."
            )


def _plain(name: str) -> str:
    # torch.compile and DDP wrap a module and so lengthen its parameters' names
    name = name.replace("_orig_mod.", "")
    return name[len("module.") :] if name.startswith("module.") else name
