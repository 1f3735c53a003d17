"""Loading a teacher's weights from a file."""

from __future__ import annotations

from os import PathLike

import torch
from torch import nn


def load_teacher(checkpoint: str | PathLike[str], model: nn.Module, prefix: str | None = None) -> nn.Module:
    """A teacher with the weights of a plain state_dict file or a Lightning checkpoint.

    The file is read with ``weights_only=True``: it cannot run code.

    Args:
        checkpoint: Path of the file.
        model: The network to fill, of the architecture that was saved.
        prefix: What precedes the network's own parameter names in the file, such as ``"model."``. ``None`` finds it.

    Returns:
        ``model``, with every parameter and buffer loaded, in eval mode.

    Raises:
        ValueError: If the file lacks a parameter of the model, or has one of another shape.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"net.weight": torch.full((1, 2), 3.0)}}, f"{folder}/last.ckpt")
        ...     load_teacher(f"{folder}/last.ckpt", nn.Linear(2, 1, bias=False)).weight
        Parameter containing:
        tensor([[3., 3.]], requires_grad=True)
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    saved = {_plain(key): value for key, value in saved.get("state_dict", saved).items()}
    names = {_plain(key): key for key in model.state_dict()}
    if prefix is None:
        ends = [key[: -len(name)] for key in saved for name in names if key.endswith(name)]
        # the prefix under which most names are found, the shortest of equals
        prefix = max(sorted(set(ends), key=len), key=ends.count, default="")
    state = {names[name]: saved[prefix + name] for name in names if prefix + name in saved}
    missing = sorted(set(names.values()) - set(state))
    if missing:
        raise ValueError(
            f"Expected `checkpoint` to hold every parameter of {type(model).__name__} under prefix={prefix!r}, but"
            f" {len(missing)} are missing, first {missing[0]!r}. Pass the architecture that was saved, or prefix=...;"
            f" the file's first names are {list(saved)[:3]}."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Expected `checkpoint` to fit {type(model).__name__}, but got {' '.join(str(error).split())}"
        ) from None
    return model.eval()


def _plain(name: str) -> str:
    # torch.compile and DDP wrap a module and so lengthen its parameters' names
    name = name.replace("_orig_mod.", "")
    return name[len("module.") :] if name.startswith("module.") else name
