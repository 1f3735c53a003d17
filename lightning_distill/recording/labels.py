"""Where a batch keeps its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

LABEL_NAMES = ("labels", "label", "target", "y")


def find_labels(batch: Any, where: str | int | Callable[[Any], Tensor] | None) -> Tensor:
    """The labels in a batch.

    Args:
        batch: The batch, as the data loader returned it.
        where: A key or field name, an index, a callable on the batch, or ``None``: the second entry of a pair, else the
            entry ``"labels"``, ``"label"``, ``"target"`` or ``"y"``.

    Returns:
        The labels.

    Raises:
        ValueError: If they are not there, or nothing says which entry of a longer tuple they are; the message says how
            to pass them.

    Example:
        >>> import torch
        >>> find_labels({"x": torch.zeros(2), "y": torch.tensor([3, 1])}, None)
        tensor([3, 1])
    """
    labels: Any = None
    unnamed = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
    if where is not None:
        labels = entry_of_batch(batch, where)
    elif unnamed:
        labels = batch[1] if len(batch) == 2 else None  # of three or more the second may well be an index or a weight
    else:
        labels = next((entry for name in LABEL_NAMES if (entry := _entry(batch, name)) is not None), None)
    if not isinstance(labels, Tensor):
        names = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        size = f" of {len(batch)} entries" if unnamed else ""
        raise ValueError(
            f"Expected `labels` to say where a batch keeps its labels, which a term needs, but got labels={where!r} and"
            f" a batch of {names}{size}. Pass labels=<key, index, or a function of the batch>."
        )
    return labels


def find_tensor(
    batch: Any, where: str | int | Callable[[Any], Tensor], argument: str = "mask", content: str = "its mask"
) -> Tensor:
    """A tensor in a batch, such as a mask.

    Args:
        batch: The batch.
        where: A key or field name, an index, or a function of the batch.
        argument: Name of the argument that says it, for the message.
        content: The tensor's content, for the message.

    Raises:
        ValueError: If the batch has no tensor at that place.
    """
    tensor = entry_of_batch(batch, where)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"Expected `{argument}` to say where a batch keeps {content}, but got {argument}={where!r} and a batch of"
            f" {type(batch).__name__}. Pass a key, an index, or a function of the batch."
        )
    return tensor


def entry_of_batch(batch: Any, where: str | int | Callable[[Any], Any]) -> Any:
    """The entry of a batch at a key, field name or index, or the value of a function of it; ``None`` if missing."""
    return where(batch) if callable(where) else _entry(batch, where)


def _entry(batch: Any, where: str | int) -> Any:
    if isinstance(where, int):
        return batch[where] if isinstance(batch, (tuple, list)) and -len(batch) <= where < len(batch) else None
    if isinstance(batch, Mapping):
        return batch.get(where)
    return getattr(batch, where, None)
