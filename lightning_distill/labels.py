"""Where a batch keeps its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

LABEL_NAMES = ("labels", "label", "target", "y")


def find_labels(batch: Any, where: str | int | Callable[[Any], Tensor] | None) -> Tensor:
    """The labels in a batch.

    Args:
        batch: What the data loader gave.
        where: A key or field name, an index, a callable on the batch, or ``None``: ``batch[1]`` of a tuple or list,
            else the entry ``"labels"``, ``"label"``, ``"target"`` or ``"y"``.

    Returns:
        The labels.

    Raises:
        ValueError: If there are none at that place; the message says how to pass them.

    Example:
        >>> import torch
        >>> find_labels({"x": torch.zeros(2), "y": torch.tensor([3, 1])}, None)
        tensor([3, 1])
    """
    found: Any
    if callable(where):
        found = where(batch)
    elif where is not None:
        found = _entry(batch, where)
    elif isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        found = _entry(batch, 1)
    else:
        found = next((entry for name in LABEL_NAMES if (entry := _entry(batch, name)) is not None), None)
    if not isinstance(found, Tensor):
        names = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"Expected `labels` to say where a batch keeps its labels, which a term needs, but got labels={where!r} and"
            f" a batch of {names}. Pass labels=<key, index, or a function of the batch>."
        )
    return found


def _entry(batch: Any, where: str | int) -> Any:
    if isinstance(where, int):
        return batch[where] if isinstance(batch, (tuple, list)) and -len(batch) <= where < len(batch) else None
    if isinstance(batch, Mapping):
        return batch.get(where)
    return getattr(batch, where, None)
